"""From the work of a phase to its time on a card.   [no torch]"""

from __future__ import annotations

from cogvx.options.cards import Card
from cogvx.options.train import Attention
from cogvx.plan.found import Work

# How far the time of a step may be off, as a share.
UNCERTAIN = 0.35

KERNEL_SECONDS = 4e-6  # to start one kernel


def share_of(op: str, card: Card, kernel: Attention) -> float:
    """The share of the card's peak rate that the operation's arithmetic reaches."""
    shares = card.generation
    if "attention" in op:
        # What the other kernels cannot do: 32 bits, or a mask.
        kernel = Attention.efficient if "efficient" in op else kernel
        forward, backward = shares.attention[kernel]
        return backward if "backward" in op else forward
    return shares.convolution if "conv" in op else shares.matrix


def seconds_on(card: Card, work: dict[tuple[str, str | None], Work], wanted: Attention) -> float:
    """The time of an operation is that of its arithmetic or of its memory traffic.

    The longer one counts, at the rates that the card really reaches. wanted: train.attention.
    """
    total, kernel = 0.0, card.generation.kernel(wanted)
    for (op, dtype), w in work.items():
        peak = card.tflops if dtype in ("bfloat16", "float16") else card.fp32_tflops
        arithmetic = w.flops / (peak * 1e12 * share_of(op, card, kernel))
        traffic = w.bytes / (card.gb_per_second * 1e9 * card.generation.memory)
        total += max(arithmetic, traffic) + w.count * KERNEL_SECONDS
    return total
