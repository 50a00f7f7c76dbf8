"""The peak of memory of each phase, under the names that the plan gives them."""

import types

import numpy
import pytest
import torch

from cogvx.files import read_json, read_json_lines
from cogvx.plan.found import PHASES
from cogvx.training import peaks


@pytest.fixture
def card(monkeypatch):
    """A GPU's allocator: what is allocated now and at most. Reserved is 1 GiB more."""
    card = types.SimpleNamespace(now=0, most=0, resets=0)

    def reset():
        card.most, card.resets = card.now, card.resets + 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: card.most * peaks.GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: (card.most + 1) * peaks.GIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)

    def use(gib: int):
        """Takes the memory and gives it back."""
        card.most = max(card.most, card.now + gib)

    card.use = use
    return card


def test_every_phase_has_a_peak_of_its_own(card):
    found = peaks.MemoryPeaks()
    card.use(50)
    with found.phase("encode clips"):
        card.use(8)
    with found.phase("train"):
        card.use(20)
        with found.phase("held-out loss"):
            card.use(5)
        assert found.of_line("held-out loss") == 6
        card.use(3)
        assert found.of_line("train") == 21
        card.use(4)
        with found.phase("video"):
            card.use(30)
        with found.phase("held-out loss"):
            card.use(2)
        assert (found.of_line("train"), found.of_line("held-out loss")) == (5, 3)
    assert found.summary() == {
        "peak_memory_gib": 31,
        "memory_by_phase": {
            "encode clips": {"reserved_gib": 9, "allocated_gib": 8},
            "train": {"reserved_gib": 21, "allocated_gib": 20},
            "held-out loss": {"reserved_gib": 6, "allocated_gib": 5},
            "video": {"reserved_gib": 31, "allocated_gib": 30},
        },
    }
    assert next(found.lines()).split() == ["memory", "GiB", "at", "most", "reserved", "allocated"]
    assert list(found.lines())[2].split() == ["train", "21.00", "20.00"]
    assert card.resets >= 8 and found.of_line("load") is None


@pytest.mark.slow
def test_a_process_has_the_peak_of_each_phase_where_the_system_can_tell():
    found, size = peaks.MemoryPeaks(), 2**28
    with found.phase("one"):
        numpy.ones(size, numpy.uint8).sum()
    with found.phase("two"):
        pass
    one, two = (found.by_phase[name]["process_gib"] for name in ("one", "two"))
    try:
        peaks.RESET.write_text("5", encoding="ascii")
    except OSError:
        assert one <= two, "the peak since the process started"
    else:
        assert one - two > 0.9 * size / peaks.GIB


@pytest.mark.slow
def test_a_run_reports_its_peaks_under_the_plans_names(run, capfd):
    folder = run(
        "a",
        "train.max_train_steps=4",
        "train.logging_steps=2",
        "validation.heldout_steps=2",
        "validation.num_validation_videos=1",
        "validation.num_inference_steps=1",
    )
    summary, lines = read_json(folder / "summary.json"), read_json_lines(folder / "metrics.jsonl")
    by_phase = {name: sizes["process_gib"] for name, sizes in summary["memory_by_phase"].items()}
    assert sorted(by_phase) == sorted(PHASES)
    assert summary["peak_memory_gib"] == max(by_phase.values()) > 0.1
    for kind, phase in (("loss", "train"), ("heldout_loss", "held-out loss")):
        found = [line["peak_memory_gib"] for line in lines if kind in line]
        assert len(found) >= 2 and max(found) == by_phase[phase]
    said = capfd.readouterr().out
    assert "memory  GiB at most" in said and f"{by_phase['train']:.2f}" in said
