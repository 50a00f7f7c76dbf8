"""The memory that each memory mode takes and the time that it costs, as the planner has them.

python tests/benchmarks/modes.py            10 minutes on 2 cores; writes tests/golden/modes.md

It needs no GPU and no weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(PROJECT)]

from cogvx.compose import compose_config  # noqa: E402
from cogvx.options.cards import CARDS  # noqa: E402
from cogvx.options.train import Attention  # noqa: E402
from cogvx.plan.allocator import GIB  # noqa: E402
from cogvx.plan.found import PHASES  # noqa: E402
from cogvx.plan.planner import trace_run  # noqa: E402
from cogvx.plan.times import times_on  # noqa: E402
from cogvx.plan.traces import traces  # noqa: E402
from cogvx.progress import quiet_libraries  # noqa: E402

TABLE = PROJECT / "tests" / "golden" / "modes.md"
ROWS = [
    *(
        f"model={model} memory={memory}"
        for model in ("2b", "5b")
        for memory in ("fast", "balanced", "low", "minimal")
    ),
    *(f"model=1_5_5b memory={memory}" for memory in ("low", "minimal")),
    *(f"model={model} memory=low_full lora=null" for model in ("2b", "5b")),
]
CARD = CARDS["a100_80gb"]
AGAIN, FULL = (
    "memory.gradient_checkpointing=true",
    "model=2b lora=null memory.gradient_checkpointing=true",
)
# An option, what it is added to, the phase that it is for, and how the tests found its results.
OPTIONS = [
    ("memory.gradient_checkpointing=true", "", "train", "same bits"),
    ("memory.recompute=selective", AGAIN, "train", "same bits"),
    ("memory.offload_activations=true", AGAIN, "train", "same bits; bus"),
    ("memory.feed_forward_chunks=4", AGAIN, "train", "rounding"),
    ("memory.base_storage=fp8", AGAIN, "train", "output off by < 3 %"),
    ("memory.base_storage=int8", AGAIN, "train", "output off by < 1 %"),
    ("memory.base_storage=nf4", AGAIN, "train", "output off by < 10 %"),
    ("memory.stream_weights=true", AGAIN, "train", "same bits; bus"),
    ("optimizer=adamw8bit", f"{AGAIN} lora.rank=256", "train", "another optimizer"),
    ("memory.vae_tiling=true", "", "encode clips", "blended seams"),
    ("memory.stream_text_encoder=true", "", "encode prompts", "same bits; bus"),
    ("memory.frugal_videos=true", "memory.vae_tiling=true", "video", "rounding; bus"),
    (
        "memory.step_in_backward=true train.max_grad_norm=null",
        FULL,
        "train",
        "same bits, not clipped",
    ),
    ("memory.offload_optimizer=true", FULL, "train", "same bits in fp32; bus, CPU"),
    ("optimizer=adamw8bit", FULL, "train", "another optimizer"),
]


def row(overrides: str) -> str:
    config = compose_config([*overrides.split(), "train.mixed_precision=bf16"])
    outcome, necessary = trace_run(config)
    found = {phase.name: phase for phase in outcome.phases}
    sizes = " | ".join(f"{found[name].peak.reserved / GIB:.1f}" for name in PHASES)
    ratio, host = found["train"].flops / necessary, outcome.host / GIB
    most = max(phase.peak.reserved for phase in found.values()) / 1e9
    return f"| {overrides} | {sizes} | **{most:.1f}** | {ratio:.2f} | {host:.0f} |"


def option_rows() -> list[str]:
    """Each option by itself, on 5b unless another model is named."""
    jobs = []
    for option, base, phase, _ in OPTIONS:
        for overrides in (base, f"{base} {option}"):
            settings = ["model=5b", *overrides.split(), "train.mixed_precision=bf16"]
            jobs.append((compose_config(settings), [phase], None))
    outcomes, rows = traces(jobs), []
    for (option, base, phase, found), without, added in zip(
        OPTIONS, outcomes[::2], outcomes[1::2], strict=True
    ):
        before, after = without.phase(phase), added.phase(phase)
        sizes = f"{before.peak.reserved / GIB:.1f} | {after.peak.reserved / GIB:.1f}"
        took = [times_on(CARD, each, Attention.auto).total for each in (before, after)]
        times = f"{took[1] / took[0]:.2f}"
        rows.append(f"| {option} | {base or 'fast'} | {phase} | {sizes} | {times} | {found} |")
    return rows


if __name__ == "__main__":
    quiet_libraries()
    lines = [
        "# Memory by mode, predicted",
        "",
        "Reserved at most, GiB by phase and GB over all; LoRA rank 64 unless lora=null, batch 1, "
        "bf16, the model's own size and length; AdamW.",
        "Computed: executed over necessary FLOPs of a step. "
        "RAM: GiB of weights and activations that wait there.",
        "Made by `python tests/benchmarks/modes.py`; nothing here was measured on a GPU.",
        "",
        f"| | {' | '.join(PHASES)} | most, GB | computed | RAM |",
        "|---" * (len(PHASES) + 4) + "|",
    ]
    for overrides in ROWS:
        lines.append(row(overrides))
        print(lines[-1], flush=True)
    lines += [
        "",
        "## Each option by itself",
        "",
        "5b, LoRA rank 64, unless the second column says otherwise: GiB reserved in the phase "
        "without and with it, how many times as long",
        "the phase takes by the plan for an A100 (`bus`: and what the copies between RAM and the "
        "card do not hide), and its results beside",
        "those without it (tests/model/test_blocks.py, tests/training).",
        "",
        "| option | added to | phase | without | with | time | results |",
        "|---|---|---|---|---|---|---|",
        *option_rows(),
    ]
    print("\n".join(lines[-len(OPTIONS) :]))
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
