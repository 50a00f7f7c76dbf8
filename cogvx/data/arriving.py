"""Clips that come one after the other, from archives or the hub: they are kept in the cache.

What has come is remembered line by line. A start that was stopped goes on where it was, and the
next one fetches nothing again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from cogvx.data.cache import claimed, content_key
from cogvx.errors import UserError
from cogvx.files import read_json_lines, unfinished, unreadable_lines, write_text

CHUNK = 1 << 20  # bytes
END = {"end": True}


@dataclass
class Arrived:
    """The rows of a source that have come, in their order."""

    path: Path
    rows: list[dict] = field(default_factory=list)
    done: bool = False

    def add(self, row: dict) -> None:
        self.write(row)
        self.rows.append(row)

    def finish(self) -> None:
        self.write(END)
        self.done = True

    def restart(self) -> None:
        self.rows.clear()
        self.done = False
        write_text(self.path, "")

    def write(self, row: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            # What JSON has no form for is no text either, and is refused as that.
            file.write(json.dumps(row, default=lambda value: {"value": repr(value)}) + "\n")


def remembered(cache_dir: Path, kind: str, source: Path | str, *settings: object) -> Path:
    """Where the rows of a source are kept. A file's size and time of change are part of it."""
    parts = [str(source)]
    if isinstance(source, Path):
        stat = source.stat()
        parts = [str(source.resolve()), stat.st_size, stat.st_mtime_ns]
    return cache_dir / "arrived" / f"{content_key(kind, *parts, *settings)}.jsonl"


@contextlib.contextmanager
def remembering(path: Path, folder: Path) -> Iterator[Arrived]:
    """What is known of a source. Another run that reads the same one is waited for.

    folder: where the files are that the rows name as `files`. If one is gone, nothing is known.
    """
    with claimed(path, wait=True):
        rows = read_json_lines(path)
        # A power cut may break a line anywhere: a clip would be missing without a word.
        rows = [] if unreadable_lines(path, rows) else rows
        done = rows[-1:] == [END]
        rows = [row for row in rows if row != END]
        if not all((folder / name).is_file() for row in rows for name in row.get("files", ())):
            rows, done = [], False
        kept = Arrived(path, rows, done)
        if not done:
            # A killed run may have left half a line at the end.
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        yield kept


def kept_file(folder: Path, content: IO[bytes], ending: str, size: int | None = None) -> str:
    """Writes a file under the hash of its content, and returns its name.

    So no name of an archive leads anywhere. UserError if the disk is full. EOFError if there are
    fewer than `size` bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = unfinished(folder / "arriving")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            while chunk := content.read(CHUNK):
                digest.update(chunk)
                write_all(file, chunk, folder)
            require_bytes(file.tell(), size)
        name = f"{digest.hexdigest()[:32]}{ending}"
        partial.replace(folder / name)
    finally:
        partial.unlink(missing_ok=True)
    return name


def require_bytes(found: int, expected: int | None) -> None:
    if expected is not None and found < expected:
        raise EOFError("unexpected end of data")


def write_all(file: IO[bytes], chunk: bytes, folder: Path) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache, {folder}: {error.strerror}. Free some space there, or set "
            f"data.cache_dir to another disk"
        ) from error
