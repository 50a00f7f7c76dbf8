"""task=list and task=clean: what lies under outputs/, and what of it nothing needs.   [no torch]"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from cogvx import config as configuration
from cogvx.errors import UserError
from cogvx.files import is_left_over, is_unfinished, read_json, shown
from cogvx.progress import counted
from cogvx.records import heartbeats, record
from cogvx.records.leaderboard import WIDE
from cogvx.records.pages import size_text
from cogvx.records.sweep import (
    SWEEP,
    Progress,
    State,
    Sweep,
    groups_of,
    is_locked,
    progress_of,
)
from cogvx.records.table import STATE_COLOURS

YOUNG = 10 * 60  # seconds: what is newer may be a start in progress and is left alone
MOST_PATHS = 5  # shown for each reason
NEVER_STARTED_FILES = {record.CONFIG, record.LOCK}
STATES_WITHOUT_USE = (State.killed, State.failed, State.interrupted, State.out_of_memory)


def every_run(root: Path) -> Iterator[Path]:
    """The folders of all runs below a folder, jobs of sweeps included, oldest name first."""
    yield from sorted(path.parent for path in root.rglob(record.CONFIG) if is_run(path))


def is_run(config: Path) -> bool:
    """config.yaml of a run, not one of a tracker or a model inside it."""
    with config.open(encoding="utf-8", errors="replace") as file:
        return any(line.startswith("defaults:") for line in file)


def require_folder(root: Path) -> None:
    if not root.is_dir():
        raise UserError(f"task.folder={root} does not exist: give the folder that holds the runs")


def size_of(path: Path) -> int:
    """Bytes on disk, of a file or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if not file.is_dir() or file.is_symlink())


def age_text(seconds: float) -> str:
    """To one unit: `5 min`, `3 h`, `12 days`."""
    for limit, unit, size in ((90 * 60, "min", 60), (36 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


# -- task=list -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line of the list: a run, or a sweep with all its jobs."""

    name: str
    state: Text
    model: str
    trained: str
    loss: str
    size: int
    changed: float  # seconds since 1970


def list_folders(root: Path) -> None:
    """Prints every run and every sweep below `root`, the newest last."""
    require_folder(root)
    entries = sorted(entries_of(root), key=lambda entry: entry.changed)
    if not entries:
        print(f"no run under {shown(root)}")
        return
    grid = Grid(box=None, pad_edge=False, header_style="dim")
    grid.add_column("run", overflow="fold", min_width=12)
    for heading in ("state", "model", "trained", "held-out", "size", "age"):
        justify = "right" if heading in ("held-out", "size", "age") else "left"
        grid.add_column(heading, justify=justify, overflow="fold")
    now = time.time()
    for entry in entries:
        age = age_text(max(0.0, now - entry.changed))
        own = (entry.model, entry.trained, entry.loss, size_text(entry.size), age)
        grid.add_row(Text(entry.name), entry.state, *own)
    Console(width=None if sys.stdout.isatty() else WIDE).print(grid)
    total = size_text(sum(entry.size for entry in entries))
    print(
        f"{counted(len(entries), 'run or sweep', 'runs and sweeps')} under {shown(root)}: {total}"
    )


def entries_of(root: Path) -> Iterator[Entry]:
    sweeps = sorted(path.parent for path in root.rglob(SWEEP) if "jobs" in read_json(path))
    for folder in sweeps:
        yield sweep_entry(root, folder)
    for folder in every_run(root):
        if folder.parent not in sweeps:
            yield run_entry(root, folder)


def run_entry(root: Path, folder: Path) -> Entry:
    progress, settings = progress_of(folder), recorded_settings(folder)
    state = progress.state
    at = f" {progress.step}/{progress.steps}" if state is not State.done and progress.steps else ""
    at += silence_text(folder) if state is State.running else ""
    task = configuration.choices_of(settings).get("task", "train")
    return Entry(
        str(folder.relative_to(root)),
        Text(f"{state.value}{at}", style=STATE_COLOURS.get(state, "dim")),
        configuration.choices_of(settings).get("model", ""),
        trained_text(settings, progress.summary) if task == "train" else f"task={task}",
        loss_text([progress]),
        size_of(folder),
        newest_change([folder]),
    )


def silence_text(folder: Path) -> str:
    """Of a run that seems to hang; else empty."""
    now, beats = time.time(), heartbeats.silent(folder)
    longest = max((now - beat.moved for beat in beats), default=None)
    return "" if longest is None else f", no work for {heartbeats.minutes(longest)}"


def sweep_entry(root: Path, folder: Path) -> Entry:
    jobs = Sweep.read(folder).runs()
    runs = [path for path in jobs.values() if path.is_dir()]
    progress = [progress_of(path) for path in runs]
    states = Counter(each.state for each in progress)
    first = recorded_settings(runs[0]) if runs else {"defaults": []}
    text = ", ".join(f"{states[state]} {state.value}" for state in State if states[state])
    return Entry(
        str(folder.relative_to(root)),
        Text(f"{counted(len(runs), 'job')}: {text}"),
        configuration.choices_of(first).get("model", ""),
        "sweep",
        "not comparable" if groups_of(jobs).in_words else loss_text(progress),
        size_of(folder),
        newest_change([folder, *runs]),
    )


def recorded_settings(folder: Path) -> dict:
    """As they stand in config.yaml, of any version; no options if it is no record."""
    none, path = {"defaults": []}, folder / record.CONFIG
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        configuration.require_plain_values(path, found)
    # ValueError: not UTF-8.
    except (OSError, ValueError, RecursionError, yaml.YAMLError, UserError):
        return none
    return none | found if isinstance(found, dict) else none


def trained_text(settings: dict, summary: dict) -> str:
    lora = settings.get("lora")
    imported = ", imported" if "imported_form" in summary else ""
    return f"{'all weights' if lora is None else 'LoRA, rank ' + str(lora['rank'])}{imported}"


def loss_text(runs: list[Progress]) -> str:
    """The lowest held-out loss of the runs that are done."""
    losses = [run.summary["objective"] for run in runs if run.summary.get("objective") is not None]
    return f"{min(losses):.4f}" if losses else ""


def newest_change(folders: list[Path]) -> float:
    """When one of the records in these folders was last written."""
    names = (record.CONFIG, record.SUMMARY, record.ENVIRONMENT, "metrics.jsonl", SWEEP)
    files = [folder / name for folder in folders for name in names]
    return max([file.stat().st_mtime for file in files if file.is_file()], default=0.0)


# -- task=clean ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Useless:
    """A file or folder that nothing needs."""

    path: Path
    reason: str
    size: int


def clean_folders(root: Path, *, yes: bool) -> list[Path]:
    """Shows what nothing needs and, once that is confirmed, removes it; returns what was removed.

    On a terminal it asks. Elsewhere it only removes with `yes`. Runs that are running, done or
    have a checkpoint stay, and so do the jobs of a sweep.
    """
    require_folder(root)
    found = useless(root)
    if not found:
        print(f"nothing to remove under {shown(root)}")
        return []
    show_useless(found)
    total = size_text(sum(each.size for each in found))
    print(f"{counted(len(found), 'file or folder', 'files and folders')}, {total}")
    if not yes and not confirmed("task=clean"):
        return []
    removed = [each.path for each in found if remove(each.path)]
    print(f"removed {counted(len(removed), 'file or folder', 'files and folders')}")
    return removed


def show_useless(found: list[Useless]) -> None:
    """One paragraph per reason, with the first few paths."""
    for reason in dict.fromkeys(each.reason for each in found):
        those = [each for each in found if each.reason == reason]
        print(f"{reason}: {len(those)}, {size_text(sum(each.size for each in those))}")
        for each in those[:MOST_PATHS]:
            print(f"  {shown(each.path)}")
        if len(those) > MOST_PATHS:
            print(f"  ... and {len(those) - MOST_PATHS} more")


def confirmed(asked: str) -> bool:
    """asked: the settings that would remove these files, if nobody had to be asked."""
    if not sys.stdin.isatty():
        print(f"nothing was removed. To remove these:  python launch.py {asked} task.yes=true")
        return False
    if input("Remove these? [y/N] ").strip().lower() in ("y", "yes"):
        return True
    print("nothing was removed")
    return False


def useless(root: Path) -> list[Useless]:
    """What nothing needs below `root`, without anything that is in use or may just be starting."""
    runs = list(every_run(root))
    whole = {folder: reason for folder in runs if (reason := why_useless(folder))}
    found = [Useless(folder, reason, size_of(folder)) for folder, reason in whole.items()]
    in_use = [path.parent for path in root.rglob(record.LOCK) if is_locked(path.parent)]
    for path, reason in sorted(leftovers(root, runs)):
        gone = any(path.is_relative_to(each.path) for each in found)
        busy = any(path.is_relative_to(folder) for folder in in_use)
        if not gone and not busy and not is_young(path):
            found.append(Useless(path, reason, size_of(path)))
    return found


def why_useless(folder: Path) -> str | None:
    """Why a run's whole folder can go; None if it stays."""
    if is_locked(folder) or is_young(folder / record.CONFIG) or is_job(folder):
        return None
    if {path.name for path in folder.iterdir()} <= NEVER_STARTED_FILES:
        return "never started"
    progress = progress_of(folder)
    if has_checkpoint(folder) or progress.step > 0 or progress.state not in STATES_WITHOUT_USE:
        return None
    return f"{progress.state.value}, with nothing to go on from"


def leftovers(root: Path, runs: list[Path]) -> Iterator[tuple[Path, str]]:
    """Parts of folders that can go, and why."""
    for path in root.rglob("*.partial"):
        if is_left_over(path) or not is_unfinished(path):
            yield path, "half written, by a process that was killed"
    for path in root.rglob(record.LOCK):
        if not is_locked(path.parent):
            yield path, "lock that nobody holds"
    for path in root.rglob("*"):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            yield path, "empty folder"
    for folder in runs:
        if record.finished(folder) is not None:
            for path in folder.glob("validation/base/*.npz"):
                yield path, "frames that only a running run needs"


def is_job(folder: Path) -> bool:
    return (folder.parent / SWEEP).is_file()


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step_*"))


def is_young(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime < YOUNG


def remove(path: Path) -> bool:
    """False if it is gone already, or if somebody has started to use it."""
    if not path.exists() or is_locked(path if path.is_dir() else path.parent):
        return False
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return True
