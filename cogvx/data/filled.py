"""Folders that are made once and shared: model=nano, the demo's clips, sums of LoRAs.

DIGESTS in such a folder says what was written: of each file its size, its time of change and its
SHA-256. A file of another size or time is read and compared. A damaged folder is made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from cogvx.data.cache import claimed, sha256_of
from cogvx.errors import UserError
from cogvx.files import flush_tree, shown, unfinished, write_json

# Hidden: Cache.fingerprint() leaves it out.
DIGESTS = ".digests.json"


def filled(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder. If it does not exist, or is damaged, fill(path) writes its content first.

    The content is written under a temporary name, so a folder with the right name is complete. If
    several processes start together, one fills the folder and the others wait.
    """
    for wait in (False, True):
        if still_whole(folder):
            return folder
        with claimed(folder, wait=wait) as claim:
            if claim and not still_whole(folder):
                fill_under_another_name(folder, lambda partial: fill_and_note(partial, fill))
        if not wait and not claim:
            print(f"waiting for another run to make {folder}", flush=True)
    return folder


def still_whole(folder: Path) -> bool:
    return folder.is_dir() and damage_in(folder) is None


def fill_under_another_name(folder: Path, fill: Callable[[Path], None]) -> None:
    from safetensors import SafetensorError

    partial, aside = unfinished(folder), unfinished(folder.with_name(f"{folder.name}.damaged"))
    try:
        # A killed process of the same number may have left it.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        flush_tree(partial)
        if folder.is_dir() and (damage := damage_in(folder)):
            print(f"warning {shown(folder)} is damaged, and made again: {damage}", flush=True)
            folder.rename(aside)
        partial.rename(folder)
    # safetensors reports a full disk as an error of its own.
    except (OSError, SafetensorError) as error:
        # If the folder exists now, another process was faster, on a disk without locks.
        if not still_whole(folder):
            raise UserError(
                f"cannot write {folder}: {error}. If the disk is full, free some space there, "
                f"or choose another disk: data.cache_dir for the cache, task.to for an export"
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def fill_and_note(folder: Path, fill: Callable[[Path], None]) -> None:
    fill(folder)
    note_digests(folder)


def note_digests(folder: Path) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    digests = {
        path.relative_to(folder).as_posix(): [*size_and_time(path), sha256_of(path)]
        for path in files
    }
    write_json(folder / DIGESTS, digests)


def size_and_time(path: Path) -> list[int]:
    """Size in bytes and time of change in ns."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def damage_in(folder: Path, *, read_all: bool = False) -> str | None:
    """What is wrong with a folder of filled(). None for those of earlier versions, without DIGESTS.

    read_all: also what has the size and time of change that are known.
    """
    digests = folder / DIGESTS
    try:
        known = json.loads(digests.read_text(encoding="utf-8"))
        states = {name: size_and_time(folder / name) for name in known}
        changed = [name for name in known if read_all or states[name] != known[name][:2]]
    except FileNotFoundError as error:
        return None if error.filename == str(digests) else f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
        return f"{DIGESTS} cannot be read ({error})"
    for name in changed:
        size, _, digest = known[name]
        if states[name][0] != size or sha256_of(folder / name) != digest:
            return f"the bytes of {name} are not those that were written"
    found = {name: [*states[name], known[name][2]] for name in known}
    if found != known:
        # Its copy on another disk, for example. A cache that cannot be written has no memory.
        with contextlib.suppress(OSError):
            write_json(digests, found)
    return None
