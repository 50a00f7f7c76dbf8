"""Does the quality test fail when the code is wrong? Each mistake is tried in a copy of the code.

python tests/benchmarks/mutations.py        20 minutes on 2 cores; writes tests/golden/mutations.md
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
TEST = "tests/end_to_end/test_quality.py::test_the_demo_teaches_its_colour_and_the_rest_is_kept"
TABLE = PROJECT / "tests" / "golden" / "mutations.md"


@dataclass(frozen=True)
class Mistake:
    what: str
    file: str = ""
    right: str = ""
    wrong: str = ""


MISTAKES = (
    Mistake("none"),
    Mistake(
        "sign of the velocity",
        "cogvx/model/cogvideox.py",
        right="signal * noise - noise_level * latents",
        wrong="noise_level * latents - signal * noise",
    ),
    Mistake(
        "VAE scale left out",
        "cogvx/model/cogvideox.py",
        right="(latents * self.geometry.scaling_factor)",
        wrong="latents",
    ),
    Mistake(
        "alpha not stored with the adapter",
        "cogvx/model/lora.py",
        right="transformer_lora_adapter_metadata=settings",
        wrong="transformer_lora_adapter_metadata=None",
    ),
    Mistake(
        "captions moved on by one clip",
        "cogvx/data/sources.py",
        right="rows = list(self.rows())",
        wrong="rows = [*self.rows()]; rows = [row._replace(prompt=other.prompt) for row, other "
        "in zip(rows, rows[1:] + rows[:1], strict=True)]",
    ),
)


def main() -> int:
    rows = [row(mistake) for mistake in MISTAKES]
    lines = [
        f"The quality test (`{TEST}`) on code with one mistake in it, "
        "by `python tests/benchmarks/mutations.py`:",
        "",
        "| mistake | the test | because |",
        "|---|---|---|",
        *(f"| {' | '.join(cells)} |" for cells in rows),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    TABLE.write_text(text, encoding="utf-8")
    return int([cells[1] for cells in rows] != ["passes"] + ["fails"] * (len(MISTAKES) - 1))


def row(mistake: Mistake) -> tuple[str, str, str]:
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        shutil.copytree(
            PROJECT, tree, ignore=shutil.ignore_patterns(".*", "outputs", "__pycache__")
        )
        if mistake.file:
            file = tree / mistake.file
            text = file.read_text(encoding="utf-8")
            assert text.count(mistake.right) == 1, (
                f"{mistake.file} has changed: {mistake.right} is not there once"
            )
            file.write_text(text.replace(mistake.right, mistake.wrong), encoding="utf-8")
        options = ["-n0", "-q", "-x", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, TEST]
        # Without COGVX_DEMO_RUN, whose run is of the right code.
        env = os.environ | {"PYTHONPATH": "", "COGVX_DEMO_RUN": ""}
        ran = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=env)
    reasons = re.findall(r"^E +(\S.*)$", ran.stdout, re.MULTILINE)
    if ran.returncode not in (0, 1):
        raise SystemExit(ran.stdout + ran.stderr)
    print(f"{mistake.what}: {ran.returncode} {reasons[:1]}", flush=True)
    return (
        mistake.what,
        "fails" if ran.returncode else "passes",
        reasons[0].replace("|", "/") if reasons else "",
    )


if __name__ == "__main__":
    sys.exit(main())
