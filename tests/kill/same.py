"""Compares what two runs of the same settings have left."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open

from cogvx.files import read_json
from cogvx.training.checkpoint import is_complete

# Files of which only the presence is compared. They tell of times, processes or machines, or they
# are mp4, whose encoder rounds differently from run to run. Every mp4 has a gif or png beside it.
PRESENT = re.compile(
    r"(^|/)(\.lock|environment\.json|uncommitted\.patch|plan\.json|log\.txt|rank_\d+\.log"
    r"|(report|dataset|comparison)\.html|index/.*|\.digests\.json|.*\.mp4)$"
)
# Files that are there or not, as the process that writes the page comes to it.
BY_CHANCE = re.compile(r"(^|/)(report_stamp\.js|progress\.json|uncommitted\.patch|report\.html)$")
# What differs between two undisturbed runs.
TIMES = (
    *("seconds", "data_seconds", "tokens_per_second", "peak_memory_gib", "memory_by_phase"),
    *("started", "command"),
)
STEP = re.compile(r"checkpoints/step_\d+")
# Names that only something unfinished or broken has.
STRAY = re.compile(r"\.partial(/|$)|\.lock$|\.damaged(/|$)|\.tmp$|/(stop|save)$")


def files_of(place: Path) -> dict[str, Path]:
    return {path.relative_to(place).as_posix(): path for path in place.rglob("*")}


def strays(place: Path, wanted: Path, *, search: bool = False) -> list[str]:
    """What lies here and not in `wanted`, an undisturbed run's folder, or has a stray's name.

    Checkpoints at other steps are none: a run that is asked to stop writes one. Half ones are.
    search: as for differences(). A paused job keeps its last heartbeat.
    """
    there = {name: path for name, path in files_of(place).items() if path.is_file()}
    expected = {STEP.sub("checkpoints/step", name) for name in files_of(wanted)}
    own_locks = {name for name in files_of(wanted) if name.endswith(".lock")}
    found = {name for name in {*there, *empty_folders(place)} if not BY_CHANCE.search(name)}
    half = [
        folder.relative_to(place).as_posix()
        for folder in place.rglob("checkpoints/step_*")
        if folder.is_dir() and not is_complete(folder)
    ]
    more = [
        name
        for name in found
        if (STRAY.search(name) and name not in own_locks)
        or STEP.sub("checkpoints/step", name) not in expected
    ]
    beats = [f"{job}heartbeats/" for job in paused_jobs(place)] if search else []
    return sorted(name for name in {*half, *more} if not name.startswith(tuple(beats)))


def empty_folders(place: Path) -> set[str]:
    return {n for n, path in files_of(place).items() if path.is_dir() and not any(path.iterdir())}


def differences(place: Path, wanted: Path, *, search: bool = False) -> list[str]:
    """Names of what is missing or differs from an undisturbed run's folder.

    search: `wanted` is a grid of the same values. Which jobs a search pauses is decided by how fast
    they run. So each has to be done or paused, and those that are done have to be equal.
    """
    found, there, expected = [], newest(files_of(place)), newest(files_of(wanted))
    left_out = [] if not search else ["run/sweep.json", "run/leaderboard.csv", *paused_jobs(place)]
    for name, path in sorted(expected.items()):
        if path.is_dir() or BY_CHANCE.search(name) or name.startswith(tuple(left_out)):
            continue
        if name not in there:
            found.append(f"{name} is missing")
        elif not PRESENT.search(name) and content(there[name], place) != content(path, wanted):
            found.append(f"{name} differs")
    return found


def paused_jobs(place: Path) -> list[str]:
    states = {path.parent: read_json(path)["status"] for path in place.glob("run/*/summary.json")}
    paused = [folder for folder, status in states.items() if status == "paused"]
    return [f"{folder.relative_to(place).as_posix()}/" for folder in paused]


def newest(files: dict[str, Path]) -> dict[str, Path]:
    """Without the checkpoints before the last one of each run. Which are kept is not compared."""
    steps = sorted({match[0] for name in files if (match := re.search(r".*" + STEP.pattern, name))})
    last = {step.rpartition("/")[0]: step for step in steps}
    return {
        name: path
        for name, path in files.items()
        if not (match := re.search(r".*" + STEP.pattern, name))
        or match[0] == last[match[0].rpartition("/")[0]]
    }


def content(path: Path, place: Path) -> object:
    """What has to be equal, without times and without the names of the trials' folders."""
    if path.suffix == ".jsonl":
        rows = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        return Counter(json.dumps(row, sort_keys=True) for row in rows)
    if path.name == "leaderboard.csv":
        with path.open(encoding="utf-8") as file:
            return [without_times(row) for row in csv.DictReader(file)]
    if path.name in ("summary.json", "manifest.json", "sweep.json"):
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".safetensors":
        return tensors_of(path)
    if path.suffix in (".json", ".yaml", ".csv", ".txt"):
        return path.read_text(encoding="utf-8").replace(str(place), "PLACE")
    return path.read_bytes()


def tensors_of(path: Path) -> tuple[dict, dict]:
    """What is said about them, and a digest of each. safetensors writes both in any order."""
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        about.pop("digest", None)
        # The preview is an mp4, for the page of the clips.
        names = [name for name in file.keys() if name != "preview"]  # noqa: SIM118
        return about, {name: digest(file.get_tensor(name)) for name in names}


def digest(tensor: torch.Tensor) -> tuple:
    content = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return list(tensor.shape), str(tensor.dtype), hashlib.sha256(content).hexdigest()


def without_times(values: dict) -> dict:
    """Also without the digests of files, which are compared themselves."""
    kept = {name: value for name, value in values.items() if name not in TIMES}
    return kept | {name: sorted(kept[name]) for name in ("files", "result_files") if name in kept}
