"""Real runs whose clips are removed after they were encoded."""

import pytest

from cogvx.files import read_json, read_json_lines
from cogvx.records.pages import REAL_CLIPS


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nano", "nano_i2v"])
def test_a_run_whose_clips_have_all_vanished_goes_on(run, clips, capfd, model):
    settings = [
        f"model={model}",
        f"data.instance_data_root={clips}",
        "data.max_num_frames=5",
        "validation.num_validation_videos=1",
        "validation.num_inference_steps=1",
        "train.checkpointing_steps=2",
        "train.logging_steps=1",
        "train.max_train_steps=4",
    ]
    whole = run("whole", *settings)
    for path in (clips / "videos").iterdir():
        path.unlink()
    capfd.readouterr()
    resumed = run("resumed", *settings, f"train.resume={whole / 'checkpoints' / 'step_000002'}")
    said = capfd.readouterr().out
    assert "warning 6 listed files do not exist any more" in said and "videos.txt:1 0.mp4" in said
    losses = [
        [line["loss"] for line in read_json_lines(folder / "metrics.jsonl") if "loss" in line][-2:]
        for folder in (whole, resumed)
    ]
    assert losses[0] == losses[1], "what is trained is what it would have been"
    assert read_json(resumed / "summary.json")["status"] == "done"
    assert [*resumed.glob(f"validation/{REAL_CLIPS}/*.mp4")]
