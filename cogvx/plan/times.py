"""From the work of a phase to its time on a card.   [no torch]"""

from __future__ import annotations

from dataclasses import dataclass, fields

from cogvx.options.cards import RAM_GB_PER_SECOND, Card
from cogvx.options.train import Attention
from cogvx.plan.found import Phase, at_layers

# How far the time of a step may be off, as a share.
UNCERTAIN = 0.35

KERNEL_SECONDS = 4e-6  # to start one kernel
SHOWN = 0.05  # seconds: shorter parts are not named


def share_of(op: str, card: Card, kernel: Attention) -> float:
    """The share of the card's peak rate that the operation's arithmetic reaches."""
    shares = card.generation
    if "attention" in op:
        # What the other kernels cannot do: 32 bits, or a mask.
        kernel = Attention.efficient if "efficient" in op else kernel
        forward, backward = shares.attention[kernel]
        return backward if "backward" in op else forward
    return shares.convolution if "conv" in op else shares.matrix


@dataclass(frozen=True)
class Times:
    """Seconds of a phase on a card, by what takes them.

    Copies beside the computation take no time of their own while they are the shorter part. A card
    copies both ways at once.
    """

    arithmetic: float  # operations whose arithmetic takes longer than their memory traffic
    memory: float  # the other operations
    starts: float  # of kernels
    to_card: float  # copies beside the computation
    to_ram: float
    waiting: float  # copies that the computation waits for
    in_ram: float  # what the CPU computes on weights in its memory

    @property
    def computing(self) -> float:
        return self.arithmetic + self.memory + self.starts

    @property
    def copying(self) -> float:
        return max(self.to_card, self.to_ram)

    @property
    def total(self) -> float:
        return max(self.computing, self.copying) + self.waiting + self.in_ram

    def at_layers(self, layers: int, three: Times) -> Times:
        """These are the times with two layers. Each grows equally with every layer."""
        names = [part.name for part in fields(Times)]
        pairs = [(getattr(self, name), getattr(three, name)) for name in names]
        return Times(*(at_layers(layers, *pair) for pair in pairs))

    def in_words(self) -> str:
        """What a step's time is made of, the longest part first."""
        computing = listed_parts({"arithmetic": self.arithmetic, "the card's memory": self.memory})
        copies = "copies between RAM and the card"
        if self.copying > self.computing:
            words = f"{copies} {self.copying:.1f} s, {computing} beside them"
        elif self.copying >= SHOWN:
            words = f"{computing}; {copies} ({self.copying:.1f} s) are hidden behind it"
        else:
            words = computing
        after = listed_parts(
            {"waiting for copies": self.waiting, "the optimizer on the CPU": self.in_ram}
        )
        return f"{words}; then {after}" if after else words


def listed_parts(seconds: dict[str, float]) -> str:
    ranked = sorted(seconds.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {time:.1f} s" for name, time in ranked if time >= SHOWN)


def times_on(card: Card, phase: Phase, wanted: Attention) -> Times:
    """The time of an operation is that of its arithmetic or of its memory traffic.

    The longer one counts, at the rates that the card really reaches. wanted: train.attention.
    """
    arithmetic = memory = starts = 0.0
    kernel = card.generation.kernel(wanted)
    for (op, dtype), w in phase.work.items():
        peak = card.tflops if dtype in ("bfloat16", "float16") else card.fp32_tflops
        computing = w.flops / (peak * 1e12 * share_of(op, card, kernel))
        traffic = w.bytes / (card.gb_per_second * 1e9 * card.generation.memory)
        if computing > traffic:
            arithmetic += computing
        else:
            memory += traffic
        starts += w.count * KERNEL_SECONDS
    moved, link = phase.moved, card.link_gb_per_second * 1e9
    return Times(
        arithmetic,
        memory,
        starts,
        to_card=moved.to_device / link,
        to_ram=moved.to_host / link,
        waiting=moved.waited_for / link,
        in_ram=moved.within_host / (RAM_GB_PER_SECOND * 1e9),
    )
