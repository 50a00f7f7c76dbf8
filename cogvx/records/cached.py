"""task=cache: what lies in the cache, which runs use it, what is damaged, what can go.   [no torch]

A run's environment.json names a list of the files that it uses (Cache.keep_list()).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from cogvx.config import choices_of
from cogvx.data.cache import LISTS, DamagedFile, read_whole
from cogvx.data.filled import DIGESTS, damage_in
from cogvx.data.left_behind import tidy_cache
from cogvx.errors import UserError
from cogvx.files import gone, read_json, shown
from cogvx.options.tasks import CacheTask, CacheWork
from cogvx.progress import bar, counted
from cogvx.records import record
from cogvx.records.folders import (
    YOUNG,
    age_text,
    confirmed,
    every_run,
    recorded_settings,
    require_folder,
)
from cogvx.records.leaderboard import WIDE
from cogvx.records.pages import size_text
from cogvx.records.sweep import is_locked

ENCODED = ("latents", "images", "prompts")  # runs say which of these they use
# Kept for every run, and made again if they are not there: quantised weights, memory plans, videos
# that a dataset held as bytes, what previews need, and what task=inspect has seen.
FOR_ALL = ("quantised", "traces", "videos", "colours", "looks")
OF_EARLIER_VERSIONS = ("fingerprints", "facts")
TEMPORARY = (".lock", ".partial")  # of processes that run, or were killed
MOST_LINES = 12  # of runs, and of files
CHECKED_AT_ONCE = 4
SECONDS_OF_A_DAY = 24 * 3600


@dataclass(frozen=True)
class Kept:
    """A file of the cache."""

    name: str  # its path in the cache's folder
    size: int
    written: float  # seconds since 1970

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]


@dataclass
class Uses:
    """Which files runs use."""

    by_run: dict[Path, set[str]] = field(default_factory=dict)
    models: dict[Path, str] = field(default_factory=dict)
    lists: set[str] = field(default_factory=set)
    silent: list[Path] = field(default_factory=list)  # these do not say what they use

    def all(self) -> set[str]:
        return set().union(*self.by_run.values(), self.lists)


def work_on_cache(folder: Path, task: CacheTask) -> None:
    if not folder.is_dir():
        raise UserError(f"data.cache_dir={folder} does not exist: nothing is cached there yet")
    require_folder(task.folder)
    kept, uses = files_in(folder), uses_of(task.folder, folder)
    if task.do is CacheWork.verify:
        verify(folder, kept)
    elif task.do is CacheWork.gc:
        collect(folder, kept, uses, task)
    else:
        show_stats(folder, kept, uses, task.folder)


def files_in(folder: Path) -> list[Kept]:
    found = []
    for path in folder.rglob("*"):
        if path.suffix in TEMPORARY or not path.is_file():
            continue
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        found.append(Kept(path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime))
    return found


def uses_of(runs: Path, cache: Path) -> Uses:
    """What the runs below a folder use of this cache."""
    uses = Uses()
    for run in every_run(runs):
        settings = recorded_settings(run)
        if settings.get("data", {}).get("cache_dir") != str(cache):
            continue
        if choices_of(settings).get("task", "train") not in ("train", "encode", "evaluate"):
            continue
        name = f"{LISTS}/{read_json(run / record.ENVIRONMENT).get('cache_list')}.txt"
        uses.models[run] = settings["model"]["path"]
        try:
            uses.by_run[run] = set((cache / name).read_text(encoding="utf-8").split("\n"))
            uses.lists.add(name)
        except FileNotFoundError:
            uses.silent.append(run)
    return uses


# -- stats ---------------------------------------------------------------------------------------


def show_stats(folder: Path, kept: list[Kept], uses: Uses, runs: Path) -> None:
    print(f"cache   {shown(folder)}: {counted(len(kept), 'file')}, {total_text(kept)}")
    by_kind, by_name = defaultdict(list), {each.name: each for each in kept}
    for each in kept:
        by_kind[each.kind].append(each)
    show_table("kind", {**by_kind})
    by_model = defaultdict(set)
    for run, names in uses.by_run.items():
        by_model[uses.models[run]] |= names
    for heading, used in (("model", by_model), ("run", uses.by_run)):
        shown_as = {shown(Path(of)): pick(by_name, names) for of, names in used.items()}
        if shown_as:
            show_table(heading, shown_as)
    unused = [each for each in kept if each.kind in ENCODED and each.name not in uses.all()]
    if unused:
        print(
            f"{counted(len(unused), 'file is', 'files are')} of no run in {shown(runs)}, "
            f"{total_text(unused)}. To remove: python launch.py task=cache task.do=gc. "
            f"Runs elsewhere: task.folder=FOLDER"
        )
    say_silent(uses)


def pick(by_name: dict[str, Kept], names: Iterable[str]) -> list[Kept]:
    return [by_name[name] for name in names if name in by_name]


def show_table(heading: str, rows: dict[str, list[Kept]]) -> None:
    grid = Grid(box=None, pad_edge=False, header_style="dim")
    grid.add_column(heading, overflow="fold", min_width=12)
    for name in ("files", "size", "newest"):
        grid.add_column(name, justify="right")
    ordered = sorted(rows.items(), key=lambda row: -sum(each.size for each in row[1]))
    for name, files in ordered[:MOST_LINES]:
        ages = [max(0.0, time.time() - each.written) for each in files]
        newest = age_text(min(ages)) if ages else ""
        grid.add_row(name, str(len(files)), total_text(files), newest)
    Console(width=WIDE).print(grid)
    if len(ordered) > MOST_LINES:
        print(f"... and {len(ordered) - MOST_LINES} more")


def total_text(files: Iterable[Kept]) -> str:
    return size_text(sum(each.size for each in files))


def say_silent(uses: Uses) -> None:
    if uses.silent:
        print(
            f"not known what {counted(len(uses.silent), 'run uses', 'runs use')}: stopped early, "
            f"or of an earlier version ({shown(uses.silent[0])})"
        )


# -- verify --------------------------------------------------------------------------------------


def verify(folder: Path, kept: list[Kept]) -> None:
    """Compares files, and folders that were made whole, with their digests.

    What is damaged is named and removed.
    """
    paths = [folder / each.name for each in kept if each.name.endswith(".safetensors")]
    paths = [path for path in paths if not path.is_relative_to(folder / "models")]
    with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
        checked = bar(pool.map(damage, paths), total=len(paths), desc="verify  files", leave=False)
        found = dict(zip(paths, checked, strict=True))
    for place in {path.parent for path in folder.rglob(DIGESTS)}:
        found[place] = damage_in(place, read_all=True)
    without = sum(reason == "" for reason in found.values())
    damaged = {path: reason for path, reason in found.items() if reason}
    for path, reason in damaged.items():
        print(f"damaged {shown(path)}: {reason}; {removed_in_words(path)}")
    undigested = f", {without} have no digest (of earlier versions)"
    print(
        f"verify  {counted(len(found), 'file')}: {len(found) - without - len(damaged)} are whole, "
        f"{len(damaged)} damaged{undigested if without else ''}"
    )


def damage(path: Path) -> str | None:
    """What is wrong with a file of the cache: None if nothing is, "" if it has no digest."""
    try:
        _, digest = read_whole(path)
    except FileNotFoundError:
        return None
    except DamagedFile as reason:
        return str(reason)
    return None if digest else ""


def removed_in_words(path: Path) -> str:
    if not gone(path):
        return "it cannot be removed"
    return "removed. The next run that needs it makes it again"


# -- gc ------------------------------------------------------------------------------------------


def collect(folder: Path, kept: list[Kept], uses: Uses, task: CacheTask) -> None:
    """Shows what can go, and removes it once that is confirmed.

    What killed processes have left unfinished is removed without asking.
    """
    if left := tidy_cache(folder):
        print(f"removed {counted(left, 'file')} that killed processes had left")
    for run in uses.silent:
        if is_locked(run):
            raise UserError(
                f"{shown(run)} is running, and has not said yet which files of the cache it uses: "
                f"wait until it trains"
            )
    say_silent(uses)
    going = collectable(kept, uses, task)
    if not going:
        print(f"nothing to remove in {shown(folder)}: {total_text(kept)} are kept")
        return
    by_kind = defaultdict(list)
    for each in going:
        by_kind[each.kind].append(each)
    show_table("kind", {**by_kind})
    print(f"{counted(len(going), 'file')}, {total_text(going)} of {total_text(kept)}")
    if not task.yes and not confirmed(limits_in_words(task)):
        return
    gone = [each for each in going if remove_from(folder, each)]
    print(f"removed {counted(len(gone), 'file')}, {total_text(gone)}")


def limits_in_words(task: CacheTask) -> str:
    """The command's settings, as far as they decide what is removed."""
    given = {"older_than": task.older_than, "keep_gb": task.keep_gb}
    limits = [f"task.{name}={value:g}" for name, value in given.items() if value is not None]
    return " ".join(["task=cache task.do=gc", *limits, *(["task.used=true"] if task.used else [])])


def collectable(kept: list[Kept], uses: Uses, task: CacheTask) -> list[Kept]:
    """What can go, the oldest first."""
    now, used = time.time(), set() if task.used else uses.all()
    limited = task.older_than is not None or task.keep_gb is not None
    kinds = (*ENCODED, *OF_EARLIER_VERSIONS, LISTS, *(FOR_ALL if limited else ()))
    least = max(YOUNG, (task.older_than or 0) * SECONDS_OF_A_DAY)
    going = [
        each
        for each in kept
        if each.kind in kinds and each.name not in used and now - each.written > least
    ]
    going.sort(key=lambda each: each.written)
    if task.keep_gb is None:
        return going
    over, chosen = sum(each.size for each in kept) - task.keep_gb * 1e9, []
    for each in going:
        if over <= 0:
            break
        over -= each.size
        chosen.append(each)
    return chosen


def remove_from(folder: Path, each: Kept) -> bool:
    """False if it is gone already, or cannot be removed."""
    try:
        (folder / each.name).unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        print(f"warning {shown(folder / each.name)} cannot be removed: {error.strerror}")
        return False
    return True
