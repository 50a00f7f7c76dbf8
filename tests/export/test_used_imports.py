"""The folder of an import is used like the folder of a run: by every task, and to train on."""

import json

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from cogvx.errors import UserError
from cogvx.model import lora
from cogvx.records import record
from cogvx.training.checkpoint import newest_checkpoint

QUICK_VIDEO = ["validation.num_inference_steps=2", "validation.num_validation_videos=1"]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A LoRA for nano as kohya's tools write it, of strength 1/2."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for number in range(6):
        for layer in ("to_q", "to_k", "to_v", "to_out_0"):
            stem = f"lora_unet_transformer_blocks_{number}_attn1_{layer}"
            tensors[f"{stem}.lora_down.weight"] = 0.1 * torch.randn(4, 128, generator=generator)
            tensors[f"{stem}.lora_up.weight"] = 0.1 * torch.randn(128, 4, generator=generator)
            tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    path = tmp_path_factory.mktemp("foreign") / "lora.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def lora_run(foreign, launch, cache, nano_folder):
    """The folder that the command makes of it."""
    folder = foreign.parent / "run"
    model = [f"data.cache_dir={cache}", f"model.path={nano_folder}"]
    made = launch("task=import", f"task.file={foreign}", f"output_dir={folder}", *model)
    assert made.returncode == 0 and made.stderr == "", made.stderr
    assert "match   72 of 72 tensors of the LoRA: 24 layers of model=nano" in made.stdout
    assert "lora    rank 4, alpha 2 (strength 0.5) on to_q, to_k, to_v, to_out.0" in made.stdout
    return folder


def test_a_mistake_is_one_line_without_a_traceback(launch, tmp_path, cache):
    (tmp_path / "lora.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    where = [f"task.file={tmp_path / 'lora.safetensors'}", f"output_dir={tmp_path / 'run'}"]
    made = launch("task=import", *where, f"data.cache_dir={cache}")
    assert made.returncode == 2 and not (tmp_path / "run").exists()
    assert made.stderr.startswith("error: ") and made.stderr.count("\n") == 1
    assert "is a pointer of git LFS" in made.stderr


@pytest.mark.slow
def test_it_is_finished_and_has_nothing_to_resume_from(lora_run, launch):
    again = launch(f"train.resume={lora_run}")
    assert again.returncode == 0 and "It was imported. To train on: lora.init_from" in again.stdout
    with pytest.raises(UserError, match="it was imported, and an import brings no optimizer state"):
        newest_checkpoint(lora_run)
    assert record.is_imported(lora_run)
    page = (lora_run / "report.html").read_text(encoding="utf-8")
    assert "<pre>python launch.py task=import task.file=" in page


@pytest.mark.slow
def test_training_goes_on_from_it(lora_run, run):
    begun = run(
        "begun",
        f"lora.init_from={lora_run}",
        "train.max_train_steps=1",
        "scheduler.lr_warmup_steps=0",
        "optimizer.learning_rate=1e-9",
        "lora.lora_alpha=2",
    )
    ours, theirs = (load_file(folder / lora.WEIGHTS) for folder in (begun, lora_run))
    assert ours.keys() == theirs.keys() and len(ours) == 48
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-7) for name in ours)


@pytest.mark.slow
def test_it_makes_videos_and_is_judged(lora_run, run, foreign):
    asked = [*QUICK_VIDEO, "task.prompt=a red circle"]
    made = run("g", "task=generate", f"task.run={lora_run}", *asked)
    added = run("h", "task=generate", f"task.add=[{foreign}]", *asked)
    videos = [folder / "videos" for folder in (made, added)]
    names = ["result/001_seed42.mp4", "base/001_seed42.mp4"]
    result, base = ((videos[0] / name).read_bytes() for name in names)
    assert result != base
    # task.add reads the foreign file itself. It folds the strength in, so bits may differ.
    assert len([*videos[1].rglob("*.mp4")]) == 2
    judged = run("e", "task=evaluate", f"task.run={lora_run}", *QUICK_VIDEO, "task.count=1")
    assert json.loads((judged / "summary.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_a_whole_transformer_makes_videos_and_is_trained_on(
    launch, run, cache, tmp_path, nano_folder
):
    transformer = CogVideoXTransformer3DModel.from_pretrained(nano_folder / "transformer")
    with torch.no_grad():
        transformer.proj_out.bias += 0.1
    transformer.save_pretrained(tmp_path / "theirs")
    model = [f"data.cache_dir={cache}", f"model.path={nano_folder}"]
    folder = tmp_path / "run"
    where = [f"task.file={tmp_path / 'theirs'}", f"output_dir={folder}"]
    assert launch("task=import", *where, *model).returncode == 0
    made = run(
        "g", "task=generate", f"task.run={folder}", *QUICK_VIDEO, "task.prompt=a", "lora=null"
    )
    assert len([*(made / "videos").rglob("*.mp4")]) == 2
    assert launch("task=export", f"task.run={folder}", "task.format=merged").returncode == 0
    merged = folder / "export" / "merged"
    found = CogVideoXPipeline.from_pretrained(merged).transformer.proj_out.bias
    assert torch.equal(found, transformer.proj_out.bias)
    short = ["train.max_train_steps=1", "scheduler.lr_warmup_steps=0"]
    run("on", f"model.path={merged}", *short)
