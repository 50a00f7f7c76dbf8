"""Previews: colours guessed from latents, without a bit of training being changed."""

import json

import numpy
import pytest
import torch
from safetensors.torch import load_file

from cogvx.files import read_json, read_json_lines
from cogvx.training import previews
from cogvx.training.previews import LatentColours, explained_share, fit_colours, with_ones

SIX_STEPS = [
    "train.max_train_steps=6",
    "train.checkpointing_steps=3",
    "train.logging_steps=3",
    "validation.heldout_steps=3",
]
EVERY_TWO = ["validation.preview=latents", "validation.preview_steps=2"]


def test_a_linear_world_is_guessed_without_an_error():
    drawn = torch.Generator().manual_seed(0)
    true = torch.randn(17, 3, generator=drawn).double()
    inputs = with_ones(torch.randn(500, 16, generator=drawn)).double()
    halves = [(part, part @ true) for part in inputs.chunk(2)]
    found = fit_colours(halves)
    assert torch.allclose(found, true, atol=1e-4)
    assert explained_share(found, *halves[0]) > 0.9999
    assert explained_share(torch.zeros_like(true), *halves[0]) < 0.1


def test_every_latent_pixel_is_a_square_and_later_latent_frames_are_four():
    weights = torch.zeros(17, 3)
    weights[0, 0] = 1.0  # the first channel is red
    weights[16] = torch.tensor([0.0, -1.0, -1.0])
    latents = torch.zeros(3, 16, 2, 4)
    latents[1, 0, 0, 1], latents[2, 0] = 1.0, 5.0
    frames = LatentColours(weights).pixels(latents, temporal_stride=4)
    assert frames.shape == (9, 160, 320, 3) and frames.dtype == numpy.uint8
    assert frames[0, 0, 0].tolist() == [128, 0, 0] and frames[5:, :, :, 0].min() == 255
    for number in (1, 4):
        square = frames[number, :80, 80:160]
        assert (square == [255, 0, 0]).all()
        assert (frames[number] == [255, 0, 0]).all(-1).sum() == 80 * 80


def weights_and_losses(folder):
    weights = {
        (str(path.relative_to(folder)), name): tensor.numpy().tobytes()
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    lines = read_json_lines(folder / "metrics.jsonl")
    kept = ("step", "loss", "grad_norm", "lr", "heldout_by_clip")
    return weights, [{name: line[name] for name in kept if name in line} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        [],
        pytest.param(["lora=null", "optimizer.learning_rate=1e-5"], marks=pytest.mark.slow),
        pytest.param(["memory=minimal", "model=nano_i2v"], marks=pytest.mark.slow),
        pytest.param(["train.ema_decay=0.9"], marks=pytest.mark.slow),
    ],
    ids=["lora", "full", "streamed image-to-video", "averaged"],
)
def test_previews_change_no_bit_of_training(run, trained, settings):
    without = trained(*SIX_STEPS, *settings)
    within = run("with", *SIX_STEPS, *settings, *EVERY_TWO)
    (found, losses), (expected, expected_losses) = map(weights_and_losses, (within, without))
    assert losses == expected_losses
    assert len(found) == len(expected) > 0
    assert [name for name in expected if found[name] != expected[name]] == []
    steps = sorted(path.name for path in (within / "previews").glob("step_*"))
    assert steps == ["step_000002", "step_000004", "step_000006"]
    for step in steps:
        for ending in ("mp4", "gif", "png"):
            assert (within / "previews" / step / f"01_preview.{ending}").stat().st_size > 0
    said = read_json(within / "previews" / "about.json")
    assert said["r2"] > 0.8, "how much of nano's colours a linear map explains"
    assert not (without / "previews").exists()
    text = (within / "report.html").read_text(encoding="utf-8")
    assert text.count("Frames of the preview of step") == 3 and said["prompt"] in text


@pytest.mark.slow
def test_a_run_that_goes_on_makes_the_same_previews(trained, stopped, launch):
    whole = trained(*SIX_STEPS, *EVERY_TWO)
    folder = stopped("again", whole, 3)
    last = folder / "previews" / "step_000006" / "01_preview.mp4"
    before = last.read_bytes()
    last.unlink()
    ran = launch(f"train.resume={folder}")
    assert ran.returncode == 0, ran.stderr
    assert last.read_bytes() == before


@pytest.mark.slow
def test_a_preview_that_fails_is_said_once_and_stops_nothing(run, monkeypatch, capsys):
    def no_memory(self):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(previews.Previews, "latents", no_memory)
    folder = run("a", *SIX_STEPS, *EVERY_TWO)
    said = capsys.readouterr()
    assert (said.out + said.err).count("warning the preview of step 2 failed: CUDA out of") == 1
    assert "the preview of step 4" not in said.out + said.err
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"


def test_a_wrong_setting_is_said(compose):
    from cogvx.errors import UserError

    with pytest.raises(UserError, match=r"validation\.preview_steps=0: must be 1 or more"):
        compose("validation.preview_steps=0")
    with pytest.raises(UserError, match=r"validation\.preview"):
        compose("validation.preview=vae")
