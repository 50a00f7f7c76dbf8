"""GPU cards by name: memory, peak rates, and the share of them that training reaches.   [no torch]

CARDS is the list that task.card chooses from.
"""

from dataclasses import dataclass

GIB = 2**30

# The share of the peak rate that each kind of operation reaches. The shares are fitted to published
# times: CogVideoX-5B inference on A100 and H100 (THUDM: about 180 and 90 s), and a step of a 1.5-5B
# LoRA on A800 (about 40 s, CogVideo issue 715). Other cards have the shares of their generation.
# Expect +-35 %.
AMPERE = {
    "matrix": 0.80,
    "attention": 0.62,
    "attention backward": 0.50,
    "convolution": 0.35,
    "memory": 0.80,
}
HOPPER = {
    "matrix": 0.65,
    "attention": 0.40,
    "attention backward": 0.33,
    "convolution": 0.30,
    "memory": 0.80,
}


@dataclass(frozen=True)
class Card:
    """Peak rates are those of the makers' data sheets, for dense matrices."""

    memory_gib: float
    tflops: float  # bf16 with fp32 sums
    gb_per_second: float
    shares: dict[str, float]
    context_gib: float = 0.6  # taken by CUDA itself, before the first tensor

    @property
    def usable(self) -> float:
        """Memory for tensors, in bytes."""
        return (self.memory_gib - self.context_gib) * GIB


CARDS = {
    "rtx3060_12gb": Card(12, 51, 360, AMPERE),
    "rtx4060_8gb": Card(8, 60, 272, AMPERE),
    "rtx3090_24gb": Card(24, 71, 936, AMPERE),
    "rtx4080_16gb": Card(16, 97, 717, AMPERE),
    "rtx4090_24gb": Card(24, 165, 1008, AMPERE),
    "l40s_48gb": Card(48, 362, 864, AMPERE),
    "a100_40gb": Card(40, 312, 1555, AMPERE),
    "a100_80gb": Card(80, 312, 2039, AMPERE),
    "h100_80gb": Card(80, 989, 3350, HOPPER),
    "h200_141gb": Card(141, 989, 4800, HOPPER),
}


def named(device: str, memory_gib: float) -> str | None:
    """The name in CARDS of a device that CUDA calls "NVIDIA GeForce RTX 4090" or the like.

    Its memory must fit too, within -20 % and +10 %. None: no card of CARDS.
    """
    words = device.lower().replace("-", " ").split()
    for name, card in CARDS.items():
        model = name.rpartition("_")[0].removeprefix("rtx")
        if model in words and 0.8 < memory_gib / card.memory_gib < 1.1:
            return name
    return None
