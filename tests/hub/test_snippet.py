"""The lines of a model card, run by somebody who has plain diffusers and the hub."""

import re
import subprocess

import imageio.v3
import numpy
import pytest
import warm
from settings import QUICK
from stand_in import OWNER

from cogvx.data.mp4 import write_video
from cogvx.export.card import CURVE

NAME = "zai/tiny-5b"
RUN = [
    *("model=5b", f"model.path={NAME}", "train.mixed_precision=no", "train.max_train_steps=6"),
    *("data.height=64", "data.width=64", "data.max_num_frames=9", "train.checkpointing_steps=3"),
    *("optimizer.learning_rate=0.05", "validation.heldout_steps=2", "validation.scheduler=dpm"),
    *("validation.num_validation_videos=1", "validation.num_inference_steps=3"),
    "validation.validation_prompt='a cat that sleeps'",
]


def frames_of(path) -> numpy.ndarray:
    return imageio.v3.imread(path, plugin="FFMPEG").astype(float)


def snippet_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.mark.slow
def test_the_cards_lines_make_the_validation_video(checkpoint, hub, launch, cache, clips, tmp_path):
    hub.add(NAME, checkpoint)
    run, env = tmp_path / "run", hub.environment(tmp_path / "home", token=OWNER)
    more = [
        f"output_dir='{run}'",
        f"data.cache_dir='{cache}'",
        f"data.instance_data_root='{clips}'",
    ]
    said = launch(*QUICK, *RUN, "train.hub_repo_id=me/cat", *more, env=env)
    assert said.returncode == 0, said.stdout + said.stderr
    merged = ["task.format=merged", "task.hub_repo_id=me/cat-merged"]
    said = launch("task=export", f"task.run={run}", *merged, env=env)
    assert said.returncode == 0, said.stdout + said.stderr

    cards = [hub.repos["model", f"me/{name}"].files["README.md"] for name in ("cat", "cat-merged")]
    lines = [snippet_of(card.decode()) for card in cards]
    kept = [f"numpy.save('{name}.npy', numpy.stack(video))" for name in ("video", "merged")]
    # Somebody else's cache, and a Python that does not know cogvx.
    theirs = hub.environment(tmp_path / "another home", token=OWNER)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    unknown = "assert 'cogvx' not in sys.modules"
    text = "\n".join(["import numpy, sys", lines[0], kept[0], lines[1], kept[1], unknown])
    process = warm.python("-c", text, cold=True, cwd=tmp_path, env=theirs, **pipes)
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out

    tuned = frames_of(run / "validation" / "step_000006" / "01_seed42.mp4")
    base = frames_of(run / "validation" / "base" / "01_seed42.mp4")
    changed = abs(tuned - base).mean()
    assert changed > 1, "what was learned can be seen"
    for name in ("video", "merged"):
        # diffusers writes mp4 files in another way, so the frames are compared.
        path = tmp_path / f"{name}.mp4"
        write_video(path, numpy.load(tmp_path / f"{name}.npy"), fps=8)
        assert abs(frames_of(path) - tuned).mean() < 0.1 * changed
    files = hub.repos["model", "me/cat"].files
    assert CURVE in files and f"base_model: {NAME}" in files["README.md"].decode()
