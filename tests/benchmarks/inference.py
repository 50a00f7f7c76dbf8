"""The memory and the time of making a video, as the planner has them, beside published figures.

python tests/benchmarks/inference.py        15 minutes on 2 cores; writes tests/golden/inference.md

It needs no GPU and no weights.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(PROJECT)]

from cogvx.compose import compose_config  # noqa: E402
from cogvx.config import Config  # noqa: E402
from cogvx.options.cards import CARDS  # noqa: E402
from cogvx.plan.allocator import GIB  # noqa: E402
from cogvx.plan.found import VIDEO_PHASES, Outcome  # noqa: E402
from cogvx.plan.making import video_facts  # noqa: E402
from cogvx.plan.planner import trace_video  # noqa: E402
from cogvx.progress import quiet_libraries  # noqa: E402

TABLE = PROJECT / "tests" / "golden" / "inference.md"
SHOWN = ("rtx4090_24gb", "a100_80gb", "h100_80gb")


@dataclass(frozen=True)
class Row:
    settings: str
    published: str = ""  # GB, of the seed's table


TILED = "memory.vae_tiling=true"
FRUGAL = f"{TILED} memory.frugal_videos=true"
ROWS = [
    *(
        Row(f"model=2b train.mixed_precision=fp16 {memory}", published)
        for memory, published in (
            ("memory=fast", ""),
            ("memory=balanced", ""),
            ("memory=low", ""),
            ("memory=minimal", ""),
            (TILED, "12.5"),
            (f"{TILED} memory.base_storage=int8", "7.8"),
        )
    ),
    *(
        Row(f"model=5b {memory}", published)
        for memory, published in (
            ("memory=fast", ""),
            ("memory=balanced", ""),
            ("memory=low", ""),
            ("memory=minimal", ""),
            (TILED, "20.7"),
            (FRUGAL, ""),
            (f"{TILED} memory.base_storage=int8", "11.4"),
            ("memory=balanced memory.frugal_videos=true", ""),
            ("memory=balanced memory.base_storage=int8", ""),
            ("memory=balanced memory.base_storage=fp8", ""),
            ("memory=balanced memory.base_storage=nf4", ""),
            ("memory=balanced memory.stream_weights=true", ""),
            ("memory=minimal lora=null", ""),
        )
    ),
    *(Row(f"model=5b_i2v {memory}") for memory in ("memory=balanced", "memory=minimal")),
    *(Row(f"model=1_5_5b {memory}") for memory in ("memory=balanced", "memory=low")),
    Row("model=1_5_5b memory=minimal"),
]


def config_of(row: Row) -> Config:
    return compose_config(["task=plan", "task.of=generate", *row.settings.split()])


def planned(row: Row) -> Outcome:
    return trace_video(config_of(row))


def line(row: Row, found: Outcome) -> str:
    config = config_of(row)
    peaks = {phase.name: phase.peak.reserved for phase in found.phases}
    sizes = " | ".join(f"{peaks[name] / GIB:.1f}" if name in peaks else "" for name in VIDEO_PHASES)
    seconds = [
        f"{video_facts(config, CARDS[card], found)['seconds_per_video']:.0f}" for card in SHOWN
    ]
    most, host = max(peaks.values()) / 1e9, found.host / GIB
    cells = [sizes, f"**{most:.1f}**", row.published, f"{host:.0f}", *seconds]
    return f"| {row.settings} | {' | '.join(cells)} |"


if __name__ == "__main__":
    quiet_libraries()
    columns = [*VIDEO_PHASES, "most, GB", "published, GB", "RAM", *SHOWN]
    lines = [
        "# Memory and time of a video, predicted",
        "",
        "Reserved at most, GiB by phase and GB over all; 50 steps with guidance, the model's own "
        "size and length, a LoRA of rank 64",
        "unless lora=null. RAM: GiB of weights that wait there. Then the seconds of a video by "
        "card. Published: the figures of CogVideo's authors",
        "for diffusers. Made by `python tests/benchmarks/inference.py`; nothing here was measured "
        "on a GPU.",
        "",
        f"| | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in ROWS:
        lines.append(line(row, planned(row)))
        print(lines[-1], flush=True)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
