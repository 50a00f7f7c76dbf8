"""What buckets cost: the share of a nano step that waits for data, and finding a sample's clip.

python tests/benchmarks/buckets.py       2 minutes on 2 quiet cores; writes tests/golden/buckets.md

Each run trains the built-in tiny model on made clips of three shapes and two lengths. Its shares
are those of its own metrics.jsonl, without the first line, in which files are read for the first
time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(PROJECT)]

import numpy  # noqa: E402

from cogvx.data.mp4 import write_video  # noqa: E402
from cogvx.training.order import sample_order  # noqa: E402

TABLE = PROJECT / "tests" / "golden" / "buckets.md"
SHAPES = [(160, 96, 20), (96, 160, 20), (128, 128, 20), (160, 96, 7)]  # width, height, frames
CLIPS, STEPS, LOGGED, MANY = 24, 80, 10, 100_000
RUNS = {
    "one size, batch 1": ["data.min_num_frames=5"],
    "buckets, batch 1": ["data.buckets=auto"],
    "one size, batch 2": ["train.train_batch_size=2", "data.min_num_frames=9"],
    "buckets, batch 2": ["train.train_batch_size=2", "data.buckets=auto"],
}
QUICK = [
    *("validation.num_validation_videos=0", "validation.scored_prompts=0"),
    *(f"train.max_train_steps={STEPS}", f"train.logging_steps={LOGGED}"),
    *("scheduler.lr_warmup_steps=0", "validation.heldout_steps=1000", "data.max_bad_fraction=0.5"),
]


def write_clips(folder: Path) -> None:
    for number in range(CLIPS):
        width, height, frames = SHAPES[number % len(SHAPES)]
        noise = numpy.random.default_rng(number).integers(0, 255, (frames, height, width, 3))
        write_video(folder / f"{number}.mp4", noise.astype(numpy.uint8), fps=8)
    names = "".join(f"{number}.mp4\n" for number in range(CLIPS))
    for name in ("videos.txt", "prompts.txt"):
        (folder / name).write_text(names)


def trained(folder: Path, name: str, settings: list[str]) -> list[dict]:
    """The lines of a run's metrics.jsonl, without the first."""
    run = folder / name.replace(" ", "_")
    given = [f"data.instance_data_root={folder}", f"data.cache_dir={folder}/cache"]
    command = [sys.executable, "launch.py", *QUICK, *given, f"output_dir={run}", *settings]
    subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "data_seconds" in line][1:]


def row_of(name: str, lines: list[dict]) -> str:
    seconds, waited = (
        sum(line[key] for line in lines) / len(lines) for key in ("seconds", "data_seconds")
    )
    tokens = sum(line["tokens_per_second"] for line in lines) / len(lines)
    return (
        f"| {name} | {1000 * seconds:.1f} | {1000 * waited:.2f} | {waited / seconds:.2%} "
        f"| {tokens:,.0f} |"
    )


def time_of_a_place(buckets: int, sources: int) -> float:
    """Microseconds to find the clip of a place, among MANY clips."""
    names = [f"source {number}" for number in range(sources)]
    order = sample_order(
        0,
        [number % buckets for number in range(MANY)],
        [names[number // buckets % sources] for number in range(MANY)],
        {name: 1 + number for number, name in enumerate(names)},
        per_step=8,
    )
    order.samples(0, 8 * buckets)
    started, places = time.perf_counter(), 2000
    order.samples(8 * buckets, places)
    return (time.perf_counter() - started) / places * 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clips(folder)
        rows = [row_of(run, trained(folder, run, settings)) for run, settings in RUNS.items()]
    found = [(1, 1), (28, 1), (28, 3)]
    places = [f"| {b} | {s} | {time_of_a_place(b, s):.1f} |" for b, s in found]
    text = f"""# What buckets cost

{STEPS} steps of the built-in tiny model on {CLIPS} made clips of three shapes and two lengths, on
{os.cpu_count()} CPU cores. Made by `python tests/benchmarks/buckets.py`.

| run | ms per step | ms that wait for data | share | tokens per second |
|---|---|---|---|---|
{chr(10).join(rows)}

Finding the clip of a place in the order of samples, among {MANY:,} clips:

| buckets | sources | microseconds |
|---|---|---|
{chr(10).join(places)}
"""
    TABLE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
