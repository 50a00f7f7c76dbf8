"""Full fine-tuning with the optimizer on the CPU trains, resumes and averages the same."""

import pytest
import torch

from cogvx.files import read_json_lines
from cogvx.model import full, lora

SETTINGS = [
    "lora=null",
    "memory=balanced",
    "optimizer.learning_rate=3e-4",
    "train.ema_decay=0.5",
    "train.max_train_steps=8",
    "train.checkpointing_steps=4",
    "train.logging_steps=2",
]
OFFLOADED = [*SETTINGS, "memory.offload_optimizer=true"]


def saved(folder) -> dict:
    return dict(full.saved(folder))


def losses(folder, name="heldout_loss"):
    return [line[name] for line in read_json_lines(folder / "metrics.jsonl") if name in line]


@pytest.mark.slow
def test_where_the_optimizer_steps_changes_nothing(run, trained):
    here, there = run("here", *SETTINGS), trained(*OFFLOADED)
    assert losses(here) == losses(there) and losses(here, "heldout_loss_trained") == losses(
        there, "heldout_loss_trained"
    )
    for place in (".", "checkpoints/step_000008", "checkpoints/step_000008/averaged"):
        assert lora.compare(saved(here / place), saved(there / place), values=True) == []


@pytest.mark.slow
def test_stopping_and_resuming_changes_nothing(run, trained, stopped):
    whole = trained(*OFFLOADED)
    resumed = stopped("resumed", whole, 4)
    assert run("resumed", *OFFLOADED) == resumed
    assert lora.compare(saved(whole), saved(resumed), values=True) == []
    assert losses(whole) == losses(resumed)


@pytest.mark.slow
def test_small_updates_survive_in_bf16(run):
    """In the device's bf16 copies a step of 1e-6 vanishes. The fp32 weights take every step."""
    small = ["data.height=32", "data.width=32", "data.max_num_frames=5"]  # many CPUs emulate bf16
    settings = [
        *OFFLOADED,
        *small,
        "train.mixed_precision=bf16",
        "optimizer.learning_rate=1e-6",
        "train.ema_decay=null",
    ]
    folder = run("a", *settings, "scheduler.lr_warmup_steps=0")
    early, late = (saved(folder / "checkpoints" / f"step_{step:06d}") for step in (4, 8))
    name = "transformer_blocks.0.attn1.to_q.weight"
    assert late[name].dtype == torch.float32 and saved(folder)[name].dtype == torch.bfloat16
    moved = (late[name] - early[name]).abs()
    assert (moved > 0).float().mean() > 0.9 and moved.max() < 1e-5
    assert (late[name].bfloat16() == early[name].bfloat16()).float().mean() > 0.9, (
        "in bf16 hardly any would have moved"
    )
