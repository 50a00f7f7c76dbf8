"""From the work of a phase to its time on a card."""

from __future__ import annotations

import torch

from cogvx.options.cards import Card
from cogvx.plan.trace import Work

# How far the time of a step may be off, as a share.
UNCERTAIN = 0.35

KERNEL_SECONDS = 4e-6  # to start one kernel


def kind_of(op: str) -> str:
    """The key of Card.shares."""
    if "attention" in op:
        return "attention backward" if "backward" in op else "attention"
    return "convolution" if "conv" in op else "matrix"


def seconds_on(card: Card, work: dict[tuple[str, torch.dtype | None], Work]) -> float:
    """The time of an operation is that of its arithmetic or of its memory traffic.

    The longer one counts, at the rates that the card really reaches (Card.shares).
    """
    total = 0.0
    for (op, dtype), w in work.items():
        rate = card.tflops * 1e12 * (1 if dtype in (torch.bfloat16, torch.float16) else 0.5)
        arithmetic = w.flops / (rate * card.shares[kind_of(op)])
        traffic = w.bytes / (card.gb_per_second * 1e9 * card.shares["memory"])
        total += max(arithmetic, traffic) + w.count * KERNEL_SECONDS
    return total
