"""Every optimizer trains, and goes on after a resume as if it had not stopped."""

import json

import pytest
import torch

from cogvx import config as configuration
from cogvx.files import read_json_lines
from cogvx.model import lora
from cogvx.options import optimizers

SHORT = [
    "train.max_train_steps=8",
    "train.checkpointing_steps=4",
    "train.logging_steps=2",
    "validation.heldout_steps=4",
]
OPTIMIZERS = list(configuration.GROUPS["optimizer"])
# So that a small adapter's moments are in 8 bits; and rates at which eight steps show.
SETTINGS = {
    "adam8bit": ["optimizer.min_8bit_size=256"],
    "adamw8bit": ["optimizer.min_8bit_size=256"],
    "muon": ["optimizer.learning_rate=0.02"],
    "prodigy": ["optimizer.learning_rate=1", "optimizer.safeguard_warmup=false", "lora.rank=16"],
}


def metrics(folder, name):
    return [line[name] for line in read_json_lines(folder / "metrics.jsonl") if name in line]


def stopped_and_resumed(run, trained, stopped, *settings):
    whole = trained(*SHORT, *settings)
    stopped("resumed", whole, 4)
    return whole, run("resumed", *SHORT, *settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_and_resumes_bit_for_bit(run, trained, stopped, name):
    settings = [f"optimizer={name}", *SETTINGS.get(name, [])]
    whole, resumed = stopped_and_resumed(run, trained, stopped, *settings)
    assert (
        lora.compare(lora.read_adapter(whole)[0], lora.read_adapter(resumed)[0], values=True) == []
    )
    assert metrics(whole, "loss") == metrics(resumed, "loss")
    assert metrics(whole, "heldout_loss") == metrics(resumed, "heldout_loss")
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"]


@pytest.mark.parametrize("settings", [["train.ema_decay=0.9"], ["optimizer=schedule_free"]])
@pytest.mark.slow
def test_an_average_is_judged_and_delivered_and_training_goes_on_from_the_weights(
    run, trained, settings
):
    """Judging it more often changes no bit of what is trained."""
    rare = trained(*SHORT, *settings)
    often = run("often", *SHORT, *settings, "validation.heldout_steps=1")
    assert lora.compare(lora.read_adapter(rare)[0], lora.read_adapter(often)[0], values=True) == []
    weights = lora.read_adapter(rare / "checkpoints" / "step_000008")[0]
    assert lora.compare(weights, lora.read_adapter(rare)[0], values=True) != []
    if settings == ["train.ema_decay=0.9"]:
        plain = trained(*SHORT)
        assert lora.compare(weights, lora.read_adapter(plain)[0], values=True) == [], (
            "the average does not change training"
        )
        judged = read_json_lines(rare / "metrics.jsonl")[-1]
        assert (
            judged["heldout_loss_trained"]
            == metrics(plain, "heldout_loss")[-1]
            != judged["heldout_loss"]
        )


@pytest.mark.slow
def test_an_average_is_resumed_bit_for_bit(run, trained, stopped):
    whole, resumed = stopped_and_resumed(run, trained, stopped, "train.ema_decay=0.9")
    assert (
        lora.compare(lora.read_adapter(whole)[0], lora.read_adapter(resumed)[0], values=True) == []
    )


def test_eight_bits_are_used_when_asked_for():
    parameter = torch.nn.Parameter(torch.randn(64, 64))
    for size, dtype in ((4096, torch.uint8), (4097, torch.float32)):
        optimizer = optimizers.AdamW8bit(1e-3, 0.9, 0.95, 1e-8, 0.0, min_8bit_size=size).build(
            [parameter]
        )
        parameter.square().sum().backward()
        optimizer.step()
        assert optimizer.state[parameter]["state1"].dtype == dtype


@pytest.mark.slow
def test_prodigys_estimate_is_logged_and_small_rates_are_warned_of(run, capsys):
    steps = ["train.max_train_steps=80", "train.logging_steps=20", "train.checkpointing_steps=80"]
    folder = run(
        "a",
        *SHORT,
        *steps,
        "optimizer=prodigy",
        "optimizer.safeguard_warmup=false",
        "scheduler.lr_warmup_steps=0",
    )
    d, rates = metrics(folder, "d"), metrics(folder, "effective_lr")
    assert (
        len(d) == 4
        and d[-1] > d[0] >= 1e-6
        and rates == [pytest.approx(0.5 * value) for value in d]
    )
    run("b", *SHORT, "optimizer=prodigy", "optimizer.learning_rate=1e-4")
    said = capsys.readouterr().out
    assert (
        said.count("Prodigy finds the rate itself") == 1
        and "optimizer.learning_rate=0.0001" in said
    )


def test_muon_refuses_what_is_no_matrix(run, capfd, compose):
    run("a", "optimizer=muon", "lora.use_dora=true", expect=2)
    assert "trains matrices only" in capfd.readouterr().err
    with pytest.raises(configuration.UserError, match="muon trains matrices only"):
        compose("optimizer=muon", "lora=null")


@pytest.mark.parametrize("name", ["prodigy", "muon", "schedule_free", "adam", "adamw8bit"])
@pytest.mark.slow
def test_another_optimizer_cannot_go_on_from_its_states(run, trained, capfd, name):
    first = trained(*SHORT)
    run(
        "other",
        *SHORT,
        f"optimizer={name}",
        f"train.resume={first}",
        "train.max_train_steps=10",
        expect=2,
    )
    said = capfd.readouterr().err
    assert (
        "its optimizer is torch AdamW, not " in said
        and f"lora.init_from={first}/checkpoints/step_000008" in said
    )


@pytest.mark.slow
def test_an_average_may_begin_and_change_on_a_resume(run, trained):
    """An average that begins at the checkpoint is the weights, until another step is taken.

    On a resume the decay is the one asked for.
    """
    first = trained(*SHORT)
    begun = run("begun", *SHORT, "train.ema_decay=0.999", f"train.resume={first}")
    assert lora.compare(lora.read_adapter(first)[0], lora.read_adapter(begun)[0], values=True) == []
    whole = trained(*SHORT, "train.ema_decay=0.9")
    changed = run(
        "changed", *SHORT, "train.ema_decay=0.05", f"train.resume={whole}/checkpoints/step_000004"
    )
    stored = torch.load(changed / "checkpoints" / "step_000008" / "optimizer.pt", weights_only=True)
    assert stored["average"]["decay"] == 0.05


@pytest.mark.parametrize("settings", [["train.ema_decay=0.9"], ["optimizer=schedule_free"]])
@pytest.mark.slow
def test_the_weights_that_were_judged_stand_in_the_checkpoint(trained, settings):
    folder = trained(*SHORT, *settings)
    judged = lora.read_adapter(folder / "checkpoints" / "step_000008" / "averaged")[0]
    assert lora.compare(judged, lora.read_adapter(folder)[0], values=True) == []


def test_an_average_of_averages_is_refused(compose):
    with pytest.raises(configuration.UserError, match="which averages by itself"):
        compose("train.ema_decay=0.9", "optimizer=schedule_free")


def test_a_package_that_is_missing_is_named_at_the_door(compose, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(configuration.UserError, match="pip install prodigyopt"):
        compose("optimizer=prodigy")


@pytest.mark.slow
def test_fewer_clips_after_a_resume(run):
    """Losses that were not logged yet keep the names of their clips."""
    settings = ["train.logging_steps=10", "train.max_train_steps=6", "train.checkpointing_steps=3"]
    first = run("first", *settings)
    on = run(
        "on",
        *settings,
        "data.validation_fraction=0.8",
        f"train.resume={first}/checkpoints/step_000003",
    )
    assert len(metrics(on, "highest_loss_clip")) == 1
