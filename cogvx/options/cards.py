"""GPU cards by name: memory, peak rates, and the share of them that training reaches.   [no torch]

The shares are fitted to published times; expect +-35 %:

| | published | planned |
|---|---|---|
| CogVideoX-5B, 50 steps of inference, A100 (THUDM) | about 180 s | 203 s |
| the same on H100, with FlashAttention-2 | about 90 s | 105 s |
| 5B LoRA, a step, H100, FlashAttention-2 | about 3.9 s | 4.1 s |
| 1.5-5B LoRA, a step, A800 (CogVideo issue 715) | about 40 s | 37 s |
| 5B image-to-video LoRA, a step, RTX 4090 (users) | about 11 s | 12.6 s |

CARDS is the list that task.card chooses from. A Generation also says which kernels of attention
a card of this generation can run.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from cogvx.options.train import Attention

GIB = 2**30

# GB/s each way that copies from and to pinned memory reach over one lane of PCI Express: about
# 80 % of what the standard allows. 16 lanes: 12 (3.0), 25 (4.0) and 50 GB/s (5.0). An assumption.
PER_LANE = {3: 0.75, 4: 1.5625, 5: 3.125}
# GB/s that an optimizer on the CPU reaches in RAM, reading and writing. An assumption: two
# channels of DDR5 have 80 to 90 GB/s on paper, servers have several times as much.
RAM_GB_PER_SECOND = 40


@dataclass(frozen=True)
class Generation:
    """The share of the peak rate that each kind of operation reaches, on cards of one kind."""

    name: str
    majors: tuple[int, ...]  # of the compute capability
    # The kernels that a card of this generation runs, with their shares in the forward and in the
    # backward pass. Head size 64, 16 bits, no mask.
    attention: dict[Attention, tuple[float, float]]
    usual: Attention  # the fastest of them that needs no package
    matrix: float
    convolution: float
    memory: float = 0.90
    bf16: bool = True

    def kernel(self, wanted: Attention) -> Attention:
        """The kernel wanted, or the usual one for auto and for what these cards do not run."""
        return wanted if wanted in self.attention else self.usual


# Turing and Volta have no flash attention in torch. Assumptions: nothing is published.
VOLTA = Generation(
    "Volta or Turing",
    (7,),
    {Attention.efficient: (0.30, 0.22)},
    Attention.efficient,
    matrix=0.60,
    convolution=0.30,
    bf16=False,
)
# Ampere and Ada. FlashAttention-2 on A100: Dao 2023, figures 4 to 6. efficient: about 0.6 of it.
AMPERE = Generation(
    "Ampere or Ada",
    (8,),
    {Attention.flash: (0.62, 0.50), Attention.efficient: (0.37, 0.28)},
    Attention.flash,
    matrix=0.80,
    convolution=0.35,
)
# Their rates with fp32 sums are half of what the cores can do, so more of it is reached.
GEFORCE = replace(
    AMPERE,
    attention={Attention.flash: (0.80, 0.70), Attention.efficient: (0.48, 0.39)},
    matrix=0.90,
)
# Of 989 TFLOP/s, forward and backward, at 16k tokens and heads of 64 on an H100 (Shah et al. 2024,
# FlashAttention-3): FlashAttention-2 324 and 291, cuDNN 413 and 433, FlashAttention-3 497 and 474.
# Nothing is published for FlashAttention-4 on this card at this head size: it is planned as 3.
HOPPER = Generation(
    "Hopper",
    (9,),
    {
        Attention.flash: (324 / 989, 291 / 989),
        Attention.cudnn: (413 / 989, 433 / 989),
        Attention.fa3: (497 / 989, 474 / 989),
        Attention.fa4: (497 / 989, 474 / 989),
        Attention.efficient: (0.20, 0.16),
    },
    Attention.cudnn,
    matrix=0.70,
    convolution=0.30,
)
# Published for heads of 128 only: FlashAttention-4 up to 1613 of 2250 TFLOP/s, cuDNN 1/1.3 of it
# (FlashAttention-4's paper, 2026). Heads of 64 need twice the exponentials for the same
# arithmetic, so 0.6 of these rates are assumed.
BLACKWELL = Generation(
    "Blackwell (B200)",
    (10,),
    {
        Attention.flash: (0.15, 0.13),
        Attention.cudnn: (0.33, 0.28),
        Attention.fa4: (0.43, 0.36),
        Attention.efficient: (0.10, 0.08),
    },
    Attention.cudnn,
    matrix=0.60,
    convolution=0.25,
)
# torch's flash attention is planned as on a GeForce card of Ada, and cuDNN alike: nothing is
# published.
BLACKWELL_RTX = replace(
    GEFORCE,
    name="Blackwell (RTX)",
    majors=(12,),
    attention={**GEFORCE.attention, Attention.cudnn: GEFORCE.attention[Attention.flash]},
)
# GEFORCE is of the same compute capability as AMPERE.
GENERATIONS = [VOLTA, AMPERE, HOPPER, BLACKWELL, BLACKWELL_RTX]


def generation_of(major: int) -> Generation | None:
    """By the major number of the compute capability. None: older than Volta, or not known yet."""
    return next((each for each in GENERATIONS if major in each.majors), None)


@dataclass(frozen=True)
class Card:
    """Peak rates are those of the makers' data sheets and white papers, for dense matrices.

    GeForce cards add up in fp32 at half the rate of their data sheets' fp16 figures, and bf16
    always adds up in fp32.
    """

    memory_gib: float  # as CUDA reports it: less than the nominal size
    tflops: float  # 16 bits with fp32 sums
    fp32_tflops: float  # without TF32, which torch does not use unless it is told to
    gb_per_second: float
    generation: Generation
    pcie: tuple[int, int]  # generation, lanes
    context_gib: float = 0.6  # taken by CUDA itself, before the first tensor

    @property
    def usable(self) -> float:
        """Memory for tensors, in bytes."""
        return (self.memory_gib - self.context_gib) * GIB

    @property
    def link_gb_per_second(self) -> float:
        """Between the card and RAM, each way."""
        generation, lanes = self.pcie
        return PER_LANE[generation] * lanes


CARDS = {
    "t4_16gb": Card(14.6, 65, 8.1, 320, VOLTA, (3, 16)),
    "v100_16gb": Card(15.8, 125, 15.7, 900, VOLTA, (3, 16)),
    "v100_32gb": Card(31.7, 125, 15.7, 900, VOLTA, (3, 16)),
    "rtx3060_12gb": Card(11.7, 25.5, 12.7, 360, GEFORCE, (4, 16)),
    "rtx4060_8gb": Card(7.7, 30, 15, 272, GEFORCE, (4, 8)),
    "rtx4060_ti_16gb": Card(15.6, 44, 22, 288, GEFORCE, (4, 8)),
    "rtx3090_24gb": Card(23.6, 71, 35.6, 936, GEFORCE, (4, 16)),
    "rtx4070_ti_super_16gb": Card(15.6, 88, 44, 672, GEFORCE, (4, 16)),
    "rtx4080_16gb": Card(15.7, 97, 48.7, 717, GEFORCE, (4, 16)),
    "rtx4090_24gb": Card(23.6, 165, 82.6, 1008, GEFORCE, (4, 16)),
    "rtx5090_32gb": Card(31.4, 209, 105, 1792, BLACKWELL_RTX, (5, 16)),
    "rtx_a6000_48gb": Card(47.5, 155, 38.7, 768, AMPERE, (4, 16)),
    "rtx6000_ada_48gb": Card(47.5, 364, 91, 960, AMPERE, (4, 16)),
    "a10g_24gb": Card(22.1, 70, 31.5, 600, AMPERE, (4, 16)),
    "l4_24gb": Card(22.1, 121, 30.3, 300, AMPERE, (4, 16)),
    "l40s_48gb": Card(44.4, 362, 91.6, 864, AMPERE, (4, 16)),
    "a100_40gb": Card(39.4, 312, 19.5, 1555, AMPERE, (4, 16)),
    "a100_80gb": Card(79.2, 312, 19.5, 2039, AMPERE, (4, 16)),
    "h100_80gb": Card(79.2, 989, 67, 3350, HOPPER, (5, 16)),
    "h200_141gb": Card(139.8, 989, 67, 4800, HOPPER, (5, 16)),
    "b200_180gb": Card(178.4, 2250, 80, 8000, BLACKWELL, (5, 16)),
}


def named(device: str, memory_gib: float) -> str | None:
    """The name in CARDS of a device that CUDA calls "NVIDIA GeForce RTX 4090" or the like.

    Its memory must fit too, within -20 % and +10 %. None: no card of CARDS.
    """
    found = [
        name
        for name, card in CARDS.items()
        if 0.8 < memory_gib / card.memory_gib < 1.1 and says(device, words_of(name))
    ]
    # "RTX 4060 Ti" holds the words of "RTX 4060" too.
    return max(found, key=lambda name: len(words_of(name)), default=None)


def words_of(name: str) -> list[str]:
    """rtx4060_ti_16gb -> 4060, ti: without the maker's "rtx" and without the memory."""
    return [word for word in name.rpartition("_")[0].removeprefix("rtx").split("_") if word]


def says(device: str, words: list[str]) -> bool:
    """Whether these words stand one after the other in the device's name."""
    said = device.lower().replace("-", " ").split()
    return any(said[start : start + len(words)] == words for start in range(len(said)))


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, without importing torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    command, settings = ["nvidia-smi", "-L"], {"capture_output": True, "text": True, "timeout": 30}
    try:
        listing = subprocess.run(command, **settings).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = sum(line.startswith("GPU ") for line in listing.splitlines())
    return [str(number) for number in range(count)]


def may_have_gpu() -> bool:
    """False only if this machine surely has none: no NVIDIA or AMD driver, and no Mac."""
    return bool(visible_gpus()) or Path("/dev/kfd").exists() or sys.platform == "darwin"
