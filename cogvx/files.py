"""Reading and writing files. A file is written completely or not at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import glob
import hashlib
import io
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

# How a file begins that Git LFS, or a download without it, has put in the place of the real one.
LFS_POINTER = b"version https://git-lfs"


# Names that unfinished() gives; those of earlier versions do not say which machine.
UNFINISHED = re.compile(r".*?\.(\d+)(?:\.([0-9a-f]{8}))?\.partial", re.DOTALL)
# Seconds. What nobody has written to for so long is not being written, wherever its process runs.
LONG_SILENT = 24 * 3600


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False, make_folder: bool = True) -> Iterator[Path]:
    """Gives a temporary path beside `path`. At the end it is renamed to `path`.

    So nobody ever reads half a file, even after a crash. Two processes can write the same file at
    the same time, each under its own temporary name. After an error nothing is left behind.
    durable: it is there even after a power cut. That takes some milliseconds. make_folder: where
    its folder was removed, it is made again; otherwise that is an OSError.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished(path)
    try:
        yield partial
        if durable:
            flush_to_disk(partial)
        partial.replace(path)
        if durable:
            flush_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """The name beside `path` under which this process writes it: NAME.PID.MACHINE.partial."""
    return path.with_name(f"{path.name}.{os.getpid()}.{this_machine()}.partial")


@functools.cache
def this_machine() -> str:
    """Where a process number names a process: this machine, or this container on it."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{platform.node()} {numbers}".encode()).hexdigest()[:8]


def is_unfinished(path: Path) -> bool:
    """Whether unfinished() has given its name."""
    return UNFINISHED.fullmatch(path.name) is not None


def is_left_over(path: Path) -> bool:
    """Whether this is what a process has left that was killed while it wrote.

    Nobody here knows whether a process of another machine still runs. There, age decides.
    """
    found = UNFINISHED.fullmatch(path.name)
    if found is None:
        return False
    if found[2] == this_machine():
        return not runs_here(int(found[1]))
    try:
        return time.time() - newest_in(path) > LONG_SILENT
    # It is gone: somebody was writing it.
    except FileNotFoundError:
        return False


def remove_left_over(folder: Path) -> int:
    """Removes what killed processes have left unfinished below a folder. Returns how many."""
    return sum(gone(path) for path in ending_with(folder, ".partial") if is_left_over(path))


def remove_left_over_of(path: Path) -> None:
    """Removes what killed processes have left of this file or folder alone."""
    for other in path.parent.glob(f"{glob.escape(path.name)}.*"):
        if is_left_over(other):
            gone(other)


def ending_with(folder: Path, *endings: str) -> list[Path]:
    """The files and folders below a folder whose names end so, without what is in such folders."""
    found = []
    for place, folders, names in os.walk(folder):
        those = [name for name in (*folders, *names) if name.endswith(endings)]
        folders[:] = [name for name in folders if name not in those]
        found += [Path(place, name) for name in those]
    return found


def gone(path: Path) -> bool:
    """Removes a file or folder. False if it cannot be removed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return not path.exists()


def runs_here(number: int) -> bool:
    """Whether this machine has a process of this number that has not ended.

    In a container, those that have ended may stay in the list for ever, because nobody waits for
    them ("Z", man proc_pid_stat).
    """
    with contextlib.suppress(OSError, IndexError):
        facts = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
        return facts.rpartition(")")[2].split()[0] not in ("Z", "X")
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True


def newest_in(path: Path) -> float:
    """When a file, or something in a folder, was last written. Seconds since 1970."""
    return max(each.lstat().st_mtime for each in [path, *path.rglob("*")])


def flush_to_disk(path: Path) -> None:
    """Returns when the file's content is on the disk; of a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot do this for folders, others not at all.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Returns when all files below a folder, and their names, are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush_to_disk(path)


def write_text(path: Path, text: str, **settings: bool) -> None:
    """settings: of replacing(). So in write_json()."""
    with replacing(path, **settings) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, values: object, **settings: bool) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n", **settings)


def write_csv(path: Path, rows: Iterable[dict], columns: list[str]) -> None:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, written.getvalue().encode())


def read_json(path: Path) -> dict:
    """The file's values; {} if there is no file, or if it holds no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # Thousands of brackets are a RecursionError.
    except (FileNotFoundError, ValueError, RecursionError):
        return {}


def read_json_lines(path: Path) -> list[dict]:
    """The values of every line of a .jsonl file that can be read; [] if there is no file.

    A killed run may leave half a line at the end, a power cut a broken one anywhere.
    """
    lines = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def unreadable_lines(path: Path, read: list[dict]) -> int:
    """How many lines of a .jsonl file are missing in what was read of it.

    The last line may always be half a line: it does not count.
    """
    return max(0, path.read_bytes().count(b"\n") - len(read)) if path.is_file() else 0


def shown(path: Path) -> str:
    """The path as a user would type it: relative, if it lies below the working folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def is_hub_id(place: str) -> bool:
    """A hub id has the form name/repo. What exists here, or has another form, is a path."""
    return (
        not Path(place).exists()
        and not place.startswith((".", "/", "~"))
        and not place.endswith(".safetensors")
        and place.count("/") == 1
    )
