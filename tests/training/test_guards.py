"""Steps without a finite gradient are skipped and named; losses are traced to clip and timestep."""

import json
import time

import pytest
import torch

from cogvx.files import read_json_lines
from cogvx.model import lora
from cogvx.model.pretrained import PretrainedModel
from cogvx.training import dtypes, trainer
from cogvx.training.loss_log import LossLog
from cogvx.training.torch_optimizer import set_learning_rate

SHORT = [
    "train.max_train_steps=12",
    "train.checkpointing_steps=4",
    "train.logging_steps=3",
    "scheduler.lr_warmup_steps=0",
]


@pytest.fixture
def spoil(monkeypatch):
    """spoil(steps, value): the losses of these micro-steps become loss * value."""

    def start(steps, value=float("nan")):
        real, count = trainer.training_losses, iter(range(10**6))

        def losses_of(model, batch, draw):
            losses, timesteps = real(model, batch, draw)
            return losses * (value if next(count) in steps else 1.0), timesteps

        monkeypatch.setattr(trainer, "training_losses", losses_of)

    return start


def lines(folder, name):
    return [line for line in read_json_lines(folder / "metrics.jsonl") if name in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)]
)
def test_a_step_that_is_not_finite_is_left_out_and_its_clip_is_named(run, spoil, capfd, value):
    spoil({4}, value)
    folder = run("a", *SHORT)
    [skipped] = lines(folder, "skipped")
    assert skipped["step"] == 5
    assert "videos.txt:" in skipped["skipped"][0] and " at timestep " in skipped["skipped"][0]
    assert "warning step 5 is skipped" in capfd.readouterr().out
    assert all(tensor.isfinite().all() for tensor in lora.read_adapter(folder)[0].values())
    assert len(lines(folder, "loss")) == 4 and "NaN" not in (folder / "metrics.jsonl").read_text()
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_the_wait_for_data_is_logged(run):
    folder = run("a", *SHORT, "train.max_train_steps=4")
    assert all(0 < line["data_seconds"] < line["seconds"] for line in lines(folder, "data_seconds"))
    assert len(lines(folder, "data_seconds")) == 2


@pytest.mark.slow
def test_a_step_is_timed_until_the_device_is_done(run, monkeypatch):
    """Reading the losses waits for the device, here for half a second."""
    means = LossLog.means

    def waiting(self):
        time.sleep(0.5)
        return means(self)

    monkeypatch.setattr(LossLog, "means", waiting)
    folder = run("a", *SHORT, "train.max_train_steps=2", "train.logging_steps=1")
    assert [line["seconds"] > 0.5 for line in lines(folder, "seconds")] == [True, True]


@pytest.mark.slow
def test_a_step_left_out_changes_no_weight(run, spoil):
    """All but the first step spoilt: the result is that of one step."""
    spoil(set(range(1, 12)))
    folder = run("a", *SHORT)
    one = run("b", *SHORT, "train.max_train_steps=1")
    assert lora.compare(lora.read_adapter(folder)[0], lora.read_adapter(one)[0], values=True) == []


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_and_keep_what_was_before(run, spoil, capfd):
    spoil(set(range(5, 12)))
    folder = run("a", *SHORT, "train.max_skipped_steps=3", expect=2)
    said = capfd.readouterr().err
    assert (
        "3 steps in a row had no finite gradient" in said
        and "at timestep" in said
        and "Traceback" not in said
    )
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000004"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        ("0", "trained weights are not finite after step 4"),
        ("0.2", "the held-out loss is nan after step 4"),
    ],
)
def test_weights_that_are_not_finite_are_not_kept(run, capfd, monkeypatch, held_out, said):
    monkeypatch.setattr(
        trainer,
        "set_learning_rate",
        lambda optimizer, rate: set_learning_rate(optimizer, float("inf")),
    )
    folder = run("a", *SHORT, f"data.validation_fraction={held_out}", expect=2)
    found = capfd.readouterr().err
    assert (
        said in found
        and "optimizer.learning_rate=0.0005 too high" in found
        and "Traceback" not in found
    )
    assert not list((folder / "checkpoints").iterdir())


@pytest.mark.slow
def test_the_highest_loss_is_traced_to_its_clip_and_timestep(run, spoil):
    spoil({7}, 100.0)
    folder = run("a", *SHORT)
    logged = lines(folder, "highest_loss")
    worst = max(logged, key=lambda line: line["highest_loss"])
    assert worst["step"] == 9 and worst["highest_loss"] > 10 * logged[0]["highest_loss"]
    assert (
        worst["highest_loss_clip"].startswith("videos.txt:")
        and 0 <= worst["highest_loss_timestep"] < 1000
    )


def test_the_audit_counts_every_weight_and_insists_on_fp32(nano_folder, compose):
    transformer = PretrainedModel(nano_folder, torch.device("cpu"), torch.bfloat16).transformer()
    frozen = sum(p.numel() for p in transformer.parameters())
    compose("lora.rank=4").lora.attach(transformer, seed=0)
    found = dtypes.count_dtypes(transformer, torch.bfloat16)
    trained = sum(p.numel() for p in lora.trainable(transformer))
    assert (found["trained"], found["frozen"]) == ({"float32": trained}, {"bfloat16": frozen})
    assert "arithmetic bfloat16" in dtypes.dtypes_line(found)
    lora.trainable(transformer)[0].data = lora.trainable(transformer)[0].data.bfloat16()
    with pytest.raises(TypeError, match="small updates survive in float32 only"):
        dtypes.count_dtypes(transformer, torch.bfloat16)
