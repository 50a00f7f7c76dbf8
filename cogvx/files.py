"""Reading and writing files. A file is written completely or not at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

# How a file begins that Git LFS, or a download without it, has put in the place of the real one.
LFS_POINTER = b"version https://git-lfs"


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Gives a temporary path beside `path`. At the end it is renamed to `path`.

    So nobody ever reads half a file, even after a crash. The temporary name holds the process id:
    two processes can write the same file at the same time. After an error nothing is left behind.
    durable: it is there even after a power cut. That takes some milliseconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if durable:
            flush_to_disk(partial)
        partial.replace(path)
        if durable:
            flush_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Returns when the file's content is on the disk; of a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot do this for folders.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    with replacing(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, values: object, *, durable: bool = False) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n", durable=durable)


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
    except (FileNotFoundError, ValueError):
        return {}


def read_json_lines(path: Path) -> list[dict]:
    """The values of every line of a .jsonl file that can be read; [] if there is no file.

    A killed run may leave half a line at the end, a power cut a broken one anywhere.
    """
    lines = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError):
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
