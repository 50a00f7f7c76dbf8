"""Full fine-tuning with the optimizer on the CPU trains, resumes and averages the same."""

import pytest
import torch
from race import FakeEvent, Races

from cogvx.files import read_json_lines
from cogvx.model import full, lora, transfer
from cogvx.training.on_cpu import Fp32Weights

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


# -- how the device may run it -------------------------------------------------------------------


def two_layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))


def train(model, parameters, before_step=lambda: None, after_step=lambda: None) -> None:
    """Three steps of two micro-batches."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(3):
        for micro_step in range(2):
            generator = torch.Generator().manual_seed(10 * step + micro_step)
            given = torch.randn(5, 8, generator=generator).to(model[0].weight.dtype)
            model(given).float().square().mean().backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def on_the_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def raced(monkeypatch, dtype, model) -> Races:
    monkeypatch.setattr(transfer, "to_device", on_the_device)
    with Races(monkeypatch, on_host=list(model.parameters())) as races:
        weights = Fp32Weights(model, torch.device("cpu"), dtype)
        train(model, weights.weights, weights.gradients.wait, weights.update_copies)
        with weights.in_the_model():
            assert all(p.dtype is torch.float32 for p in model.parameters())
        assert all(p.dtype is dtype for p in model.parameters())
        for parameter, weight in zip(model.parameters(), weights.weights, strict=True):
            assert torch.equal(parameter, weight.to(dtype))
    return races


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_or_weight_is_read_before_it_has_arrived(dtype, monkeypatch):
    plain, model = two_layers(), two_layers()
    weights = list(model.parameters())
    races = raced(monkeypatch, dtype, model)
    assert races.found == [] and races.clocks["copying"]["copying"] > 0
    if dtype is torch.float32:
        train(plain, list(plain.parameters()))
        assert all(map(torch.equal, weights, plain.parameters()))


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (FakeEvent, "synchronize"),
        (transfer.CopyStream, "wait"),
        (transfer.CopyStream, "mark"),
    ],
)
def test_such_a_race_would_be_found(owner, method, monkeypatch):
    monkeypatch.setattr(owner, method, lambda self, *event: None)
    assert raced(monkeypatch, torch.bfloat16, two_layers()).found
