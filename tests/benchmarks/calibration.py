"""Memory that the planner predicts, beside what others have measured.

python tests/benchmarks/calibration.py      4 minutes on 2 cores; writes tests/golden/calibration.md

It needs no GPU and no weights.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(PROJECT)]

from cogvx.compose import compose_config  # noqa: E402
from cogvx.plan.allocator import GIB, replay  # noqa: E402
from cogvx.progress import quiet_libraries  # noqa: E402

TABLE = PROJECT / "tests" / "golden" / "calibration.md"


@dataclass(frozen=True)
class Row:
    model: str
    rank: int | None  # None: full fine-tuning
    recompute: bool
    batch: int
    optimizer: str
    published: float  # GiB reserved at most, before validation
    note: str = ""

    @property
    def name(self) -> str:
        kind = "SFT" if self.rank is None else f"LoRA r{self.rank}"
        again = "" if self.recompute else ", nothing recomputed"
        return f"{self.model} {kind} bs{self.batch} {self.optimizer}{again}"


# README of cogvideox-factory: 49x480x720, latents precomputed, A100, max_memory_reserved before
# validation. Trainable weights fp32, torch's foreach AdamW, bitsandbytes' 8-bit Adam. Its other
# LoRA rows only show what was loaded before training, and are left out.
ROWS = [
    Row("2b", 16, False, 1, "adamw", 43.764),
    Row("2b", 64, False, 1, "adamw", 44.314),
    Row("2b", 256, False, 1, "adamw", 45.826),
    Row("2b", 16, True, 4, "adamw", 21.803),
    Row("2b", 64, True, 4, "adamw", 22.254),
    Row("2b", 256, True, 4, "adamw", 22.020),
    Row("5b", 64, True, 1, "adamw", 20.818),
    Row("5b", 256, True, 1, "adamw", 22.119),
    Row("5b", 16, True, 4, "adamw", 46.492),
    Row("5b", 64, True, 4, "adamw", 47.805),
    Row("5b", 256, True, 4, "adamw", 47.268),
    Row("2b", 64, False, 1, "adamw8bit", 44.004),
    Row("2b", 256, False, 1, "adamw8bit", 45.291),
    Row("5b", 64, True, 1, "adamw8bit", 20.818),
    Row("5b", 256, True, 1, "adamw8bit", 21.352),
    Row("5b", 64, True, 4, "adamw8bit", 46.820),
]
# The published full fine-tuning runs had two steps. fp16's scaler left the first one out, so their
# figures are those of a first step, before the optimizer has states.
FIRST_STEPS = [
    Row("2b", None, True, 1, "adamw", 33.934),
    Row("2b", None, True, 4, "adamw", 38.281, "unexplained"),
    Row("2b", None, True, 1, "adamw8bit", 16.447),
    Row("2b", None, True, 4, "adamw8bit", 27.930),
    Row("5b", None, True, 1, "adamw8bit", 52.826),
    Row("5b", None, True, 4, "adamw8bit", 66.648),
]
# The table of diffusers' guide, measured with another trainer that keeps both encoders on the GPU:
# shown, not compared.
GUIDE = [
    ("2B LoRA bs1", 47),
    ("2B LoRA bs2", 61),
    ("2B SFT", 62),
    ("5B LoRA bs1", 63),
    ("5B LoRA bs2", 80),
    ("5B SFT", 75),
]


def predicted(row: Row) -> float:
    """GiB that our step reserves, with the optimizer kernels and checkpointing of the published."""
    import torch

    from cogvx.model import blocks
    from cogvx.options import optimizers
    from cogvx.plan.phases import run_phases
    from cogvx.plan.trace import patched

    torch.set_num_threads(1)
    quiet_libraries()
    kind = "lora=null" if row.rank is None else f"lora.rank={row.rank}"
    again = f"memory.gradient_checkpointing={str(row.recompute).lower()}"
    batch, optimizer = f"train.train_batch_size={row.batch}", f"optimizer={row.optimizer}"
    config = compose_config(
        [f"model={row.model}", kind, again, batch, optimizer, "train.mixed_precision=bf16"]
    )

    def foreach(self, parameters):
        return torch.optim.AdamW(parameters, lr=self.learning_rate, foreach=True)

    def checkpointed(block, *inputs):
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)

    with (
        patched(optimizers.AdamW, build=foreach),
        patched(blocks, Checkpointing=lambda *how: checkpointed),
    ):
        recorder = run_phases(config, ["train"], begun=False, steps=1 if row.rank is None else 2)
    return replay(recorder.events)["train"].reserved / GIB


def predictions(rows: list[Row]) -> list[float]:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(predicted, rows, chunksize=1)


def lines_of(rows: list[Row], found: list[float]) -> list[str]:
    lines = ["| | published | predicted | error |", "|---|---|---|---|"]
    for row, value in zip(rows, found, strict=True):
        error = f"{value / row.published - 1:+.1%}" + (f" ({row.note})" if row.note else "")
        lines.append(f"| {row.name} | {row.published:.2f} | {value:.2f} | {error} |")
    return lines


def errors_of(rows: list[Row], found: list[float]) -> list[float]:
    return [abs(value / row.published - 1) for row, value in zip(rows, found, strict=True)]


if __name__ == "__main__":
    values = predictions([*ROWS, *FIRST_STEPS])
    lora, full = values[: len(ROWS)], values[len(ROWS) :]
    errors = errors_of(ROWS, lora)
    median, most = statistics.median(errors), max(errors)
    text = [
        "# Predicted and published memory",
        "",
        "GiB reserved at most by a training step at 49x480x720. "
        "Made by `python tests/benchmarks/calibration.py`.",
        "Published: cogvideox-factory, README, A100, before validation.",
        "",
        f"LoRA, {len(ROWS)} rows: median error {median:.1%}, at most {most:.1%}.",
        "",
        *lines_of(ROWS, lora),
        "",
        "Full fine-tuning, first step (the published runs ended before the optimizer had states; "
        "steady state is higher):",
        "",
        *lines_of(FIRST_STEPS, full),
        "",
        "Not comparable: diffusers' guide gives, with another trainer and both encoders resident, "
        + ", ".join(f"{name} {value} GB" for name, value in GUIDE)
        + ".",
    ]
    TABLE.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))
