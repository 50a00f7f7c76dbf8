"""nano's VAE: it learns, writes what model=nano loads, and resumes where it was stopped."""

import json

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogvx.data.filled import filled
from cogvx.errors import UserError
from cogvx.files import read_json_lines
from cogvx.model.pretrained import PretrainedModel
from cogvx.training import autoencoder

QUICK = [
    "task=nano_vae",
    "task.steps=4",
    "task.batch=4",
    "task.share_of_whole_frames=0.5",
    "task.bf16=false",
]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(autoencoder, "HELD_OUT", 2)
    monkeypatch.setattr(autoencoder, "SAVED_EVERY", 2)


def weights(folder) -> dict:
    return AutoencoderKLCogVideoX.from_pretrained(folder / "vae").state_dict()


@pytest.mark.slow
def test_it_leaves_parts_of_a_checkpoint(run, capfd):
    folder = run("a", *QUICK)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "done" and summary["psnr"] > 3
    assert (
        not (folder / autoencoder.STATE).exists()
        and "dB on 2 held-out clips" in capfd.readouterr().out
    )
    tokenizer, encoder = PretrainedModel(folder, torch.device("cpu"), torch.float32).text_encoder()
    assert (
        tokenizer.tokenize("A red circle") == ["▁A", "▁red", "▁circle"]
        and encoder.config.d_model == 64
    )
    config = AutoencoderKLCogVideoX.load_config(folder / "vae")
    assert config["scaling_factor"] == pytest.approx(1 / summary["latent_std"], abs=1e-3)


@pytest.mark.slow
def test_stopping_and_resuming_changes_nothing(run, monkeypatch):
    whole = run("whole", *QUICK)
    save_state, saved = autoencoder.save_state, []

    def stop(*given):
        save_state(*given)
        saved.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(autoencoder, "save_state", stop)
        stopped = run("stopped", *QUICK, expect=130)
    assert saved and (stopped / autoencoder.STATE).is_file()
    resumed = run("stopped", *QUICK)
    ours, theirs = weights(whole), weights(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [line["step"] for line in read_json_lines(resumed / "metrics.jsonl")] == [4], (
        "the line of step 2 was not written yet"
    )


def test_a_damaged_state_is_named(run, tmp_path, capfd):
    filled(tmp_path / "a", lambda partial: (partial / autoencoder.STATE).write_bytes(b"nothing"))
    run("a", *QUICK, expect=2)
    assert "cannot be read" in capfd.readouterr().err


def test_clips_are_functions_of_seed_step_and_place():
    first, again = autoencoder.draw_crop(42, 7, 1, 32), autoencoder.draw_crop(42, 7, 1, 32)
    assert (
        first.shape == (3, 9, 32, 32)
        and torch.equal(first, again)
        and first.min() >= -1
        and first.max() <= 1
    )
    assert not torch.equal(first, autoencoder.draw_crop(42, 8, 1, 32))


def test_a_crop_the_vae_cannot_take_is_refused(compose):
    with pytest.raises(UserError, match=r"task.crop=30: must be 16, 32, 48 or 64 pixels"):
        compose("task=nano_vae", "task.crop=30")
