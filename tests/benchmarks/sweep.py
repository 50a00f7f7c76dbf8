"""Nine jobs as one sweep, and as nine launches one after the other.

A sweep saves starts, and runs its jobs beside each other.

python tests/benchmarks/sweep.py                            16 minutes on 2 quiet cores
python tests/benchmarks/sweep.py --rounds 1 --steps 4       a try

A round runs both; rounds take turns in which comes first. The jobs are the same, and so is their
cache, which is filled before the first round.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
SWEPT = {"lora.rank": [4, 8, 16], "optimizer.learning_rate": ["1e-4", "3e-4", "1e-3"]}


def launched(*arguments: str) -> None:
    command = [sys.executable, str(PROJECT / "launch.py"), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0:
        said = f"{ran.stdout[-2000:]}{ran.stderr[-2000:]}"
        raise SystemExit(f"{' '.join(command)} ended with {ran.returncode}:\n{said}")


def as_one_sweep(settings: list[str], folder: Path) -> None:
    swept = [f"{key}={','.join(map(str, values))}" for key, values in SWEPT.items()]
    launched("-m", *settings, *swept, f"output_dir={folder}")


def as_launches(settings: list[str], folder: Path) -> None:
    for number, values in enumerate(itertools.product(*SWEPT.values())):
        given = [f"{key}={value}" for key, value in zip(SWEPT, values, strict=True)]
        launched(*settings, *given, f"output_dir={folder}/{number}")


def seconds(run, settings: list[str], folder: Path) -> float:
    started = time.perf_counter()
    run(settings, folder)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    with tempfile.TemporaryDirectory() as folder:
        compare(parser.parse_args(), Path(folder))


def compare(asked: argparse.Namespace, place: Path) -> None:
    settings = [
        f"data.cache_dir={place / 'cache'}",
        f"train.max_train_steps={asked.steps}",
        "scheduler.lr_warmup_steps=2",
        "train.logging_steps=1",
        "validation.num_validation_videos=0",
        "validation.scored_prompts=0",
    ]
    launched("task=encode", *settings, f"output_dir={place / 'encode'}")
    taken = {as_one_sweep: [], as_launches: []}
    for number in range(asked.rounds):
        for run in (as_one_sweep, as_launches) if number % 2 == 0 else (as_launches, as_one_sweep):
            taken[run].append(seconds(run, settings, place / f"{run.__name__}_{number}"))
    ratios = [
        one / other for one, other in zip(taken[as_launches], taken[as_one_sweep], strict=True)
    ]
    print(f"nine jobs of {asked.steps} steps, {asked.rounds} rounds\n")
    print("| | median | lowest to highest |\n|---|---|---|")
    rows = [
        ("nine launches", taken[as_launches], " s"),
        ("one sweep", taken[as_one_sweep], " s"),
        ("launches / sweep", ratios, ""),
    ]
    for name, found, unit in rows:
        median = f"{statistics.median(found):.2f}{unit}"
        print(f"| {name} | {median} | {min(found):.2f} to {max(found):.2f} |")


if __name__ == "__main__":
    main()
