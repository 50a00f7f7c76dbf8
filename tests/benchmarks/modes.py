"""What each memory mode takes and costs, by the planner: writes tests/golden/modes.md.

python tests/benchmarks/modes.py                about 6 minutes on 2 cores, no GPU, no weights
"""

from __future__ import annotations

import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(PROJECT)]

from cogvx.config import compose_config  # noqa: E402
from cogvx.plan.allocator import GIB  # noqa: E402
from cogvx.plan.cards import CARDS  # noqa: E402
from cogvx.plan.phases import PHASES  # noqa: E402
from cogvx.plan.planner import IN_TWO_PROCESSES, at_layers, configs_of, plainly, traces  # noqa: E402
from cogvx.runs import processes  # noqa: E402

TABLE = PROJECT / "tests" / "golden" / "modes.md"
ROWS = [
    *(f"model={model} memory={memory}" for model in ("2b", "5b") for memory in ("fast", "balanced", "low", "minimal")),
    *(f"model=1_5_5b memory={memory}" for memory in ("low", "minimal")),
    *(f"model={model} memory=low_full lora=null" for model in ("2b", "5b")),
]
CARD = CARDS["a100_80gb"]


def row(overrides: str) -> str:
    config = compose_config([*overrides.split(), "train.mixed_precision=bf16"])
    plain = plainly(config)
    first, second, two, three = traces(
        [*((config, phases, None, CARD) for phases in IN_TWO_PROCESSES), *((plain, ["train"], n, CARD) for n in (2, 3))]
    )
    found = {p.name: p for outcome in (first, second) for p in outcome.phases if outcome is second or p.name != "load"}
    layers = configs_of(config)["transformer"]["num_layers"]
    necessary = at_layers(layers, two.phase("train").flops, three.phase("train").flops)
    sizes = " | ".join(f"{found[name].peak.reserved / GIB:.1f}" for name in PHASES)
    ratio, host = found["train"].flops / necessary, max(first.host, second.host) / GIB
    return f"| {overrides} | {sizes} | **{max(p.peak.reserved for p in found.values()) / 1e9:.1f}** | {ratio:.2f} | {host:.0f} |"


if __name__ == "__main__":
    processes.quiet_libraries()
    lines = [
        "# Memory by mode, predicted", "",
        "Reserved at most, GiB by phase and GB over all; LoRA rank 64 unless lora=null, batch 1, bf16, the model's own size and length; AdamW.",
        "Computed: executed over necessary FLOPs of a step. RAM: GiB of weights and activations that wait there.",
        "Made by `python tests/benchmarks/modes.py`; nothing here was measured on a GPU.", "",
        f"| | {' | '.join(PHASES)} | most, GB | computed | RAM |", "|---" * (len(PHASES) + 4) + "|",
    ]  # fmt: skip
    for overrides in ROWS:
        lines.append(row(overrides))
        print(lines[-1], flush=True)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
