"""How long a run takes to its first step, and to end after its last line.

python tests/benchmarks/startup.py [FOLDER ...]       FOLDER: other checkouts of cogvx to compare

The run is the demo's on a warm cache, without videos. `python -c "import torch"` is the measure:
every figure is also given as a multiple of it, because machines and sessions differ. Each figure
is the smallest of ROUNDS. CPU seconds say more than the clock where other processes run too.
Writes tests/golden/startup.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
TABLE = PROJECT / "tests" / "golden" / "startup.md"
ROUNDS = 2
TICKS = os.sysconf("SC_CLK_TCK")
RUN = [
    *("train.max_train_steps=1", "train.logging_steps=1", "lora.rank=4"),
    *("validation.num_validation_videos=0", "validation.scored_prompts=0"),
    "train.checkpointing_steps=100",
]
COLUMNS = ["first step, s", "CPU s", "x torch", "end after the last line, s", "whole, CPU s"]


def cpu_of(process: subprocess.Popen) -> float:
    """The CPU seconds of a running process so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def timed(command: list[str], where: Path, metrics: Path | None = None) -> dict[str, float]:
    """Seconds and CPU seconds to the end; with `metrics`, also to its first line of a step."""
    started, found = time.monotonic(), {}
    settings = {"cwd": where, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(where)}
    process = subprocess.Popen(command, env=environment, **settings)
    os.set_blocking(process.stdout.fileno(), False)
    said, last_line = b"", started
    # It ends as a zombie that is not waited for: its CPU seconds can be read till then.
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if metrics and "first" not in found and metrics.is_file() and '"step": 1' in read(metrics):
            found |= {"first": time.monotonic() - started, "first_cpu": cpu_of(process)}
        if piece := process.stdout.read():
            said, last_line = said + piece, time.monotonic()
        time.sleep(0.01)
    found |= {"end": time.monotonic() - last_line, "cpu": cpu_of(process)}
    if process.wait() != 0:
        sys.exit(said.decode())
    return found


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def row(checkout: Path, cache: Path, torch_cpu: float) -> list[float]:
    results = []
    for _ in range(ROUNDS + 1):  # the first fills the cache
        folder = Path(tempfile.mkdtemp())
        places = [f"data.cache_dir={cache}", f"output_dir={folder}"]
        command = [sys.executable, "launch.py", *RUN, *places]
        results.append(timed(command, checkout, folder / "metrics.jsonl"))
    first, cpu, end, whole = (
        min(result[name] for result in results[1:]) for name in ("first", "first_cpu", "end", "cpu")
    )
    return [first, cpu, cpu / torch_cpu, end, whole]


def name_of(checkout: Path) -> str:
    command = ["git", "log", "-1", "--format=%h %cs"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True).stdout.strip()


def main(checkouts: list[Path]) -> None:
    bare = [timed([sys.executable, "-c", "import torch"], PROJECT) for _ in range(ROUNDS)]
    torch_cpu = min(result["cpu"] for result in bare)
    lines = [
        "# Start and end of a run",
        "",
        "The demo on a warm cache, one step, no videos, 2 CPU cores. The smallest of "
        f"{ROUNDS}. `import torch` alone takes {torch_cpu:.1f} CPU s.",
        "Made by `python tests/benchmarks/startup.py`, which says more.",
        "",
        f"| checkout | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    with tempfile.TemporaryDirectory() as cache:
        for number, checkout in enumerate(checkouts):
            values = row(checkout, Path(cache) / str(number), torch_cpu)
            name = name_of(checkout)
            lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |")
            print(lines[-1], flush=True)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main([*map(Path, sys.argv[1:]), PROJECT])
