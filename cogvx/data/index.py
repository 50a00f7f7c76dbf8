"""What is known of files, so that a set of 100,000 clips is not opened or read again.

It is only a memory: without it everything is found out again. An entry holds for a file of the
size and time of change that it was made for.

Each set of clips has an index file. Each of its lines is [what, path, size, time of change, value]
in JSON; of two lines about the same the later one counts. Lines are only added, each in one write.
So processes share the file, and one that is killed leaves half a line at most.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path

from cogvx.files import write_text
from cogvx.libraries import collections_paused

# It is written anew when this many of its lines are out of date, and they are most of it.
OUTDATED_LINES = 1000
# Earlier versions kept this of the cache's files without comparing them with their digests.
NOT_TRUSTED = "about"
Remembered = tuple[int, int, object]  # size in bytes, time of change in ns, value


class Index:
    """`of`: the set that it is about, for people who open the file."""

    def __init__(self, path: Path, of: str):
        self.path, self.of = path, of
        self.lock = threading.Lock()
        self.entries: dict[str, dict[str, Remembered]] | None = None
        self.file: int | None = None
        # Why it cannot be written: then it is only this process's memory.
        self.refusal: str | None = None

    def forget(self) -> None:
        """Frees its memory. When something is asked for, it reads the file again.

        Other processes may have added to it by then. Where nothing can be written, it stays.
        """
        if self.refusal is not None:
            return
        with self.lock:
            self.entries = None
            if self.file is not None:
                os.close(self.file)
                self.file = None

    def recall(self, what: str, path: str, stat: os.stat_result | None) -> object | None:
        """None if nothing is known, or if the file has changed since then.

        stat: None if the file has vanished. It is what it was.
        """
        size, changed, value = self.all(what).get(path, (None, None, None))
        if stat is None:
            return value
        return value if (size, changed) == (stat.st_size, stat.st_mtime_ns) else None

    def keep(self, what: str, path: str, stat: os.stat_result, value: object) -> None:
        entry = (stat.st_size, stat.st_mtime_ns, value)
        with self.lock:
            self.all(what)[path] = entry
            if self.refusal is None:
                try:
                    self.append([what, path, *entry])
                except OSError as error:
                    self.refusal = error.strerror

    def all(self, what: str) -> dict[str, Remembered]:
        if self.entries is None:
            self.entries = self.read()
        return self.entries.setdefault(what, {})

    def append(self, line: list) -> None:
        if self.file is None:
            is_new = not self.path.is_file()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if is_new:
                self.write_line({"index of": self.of})
        self.write_line(line)

    def write_line(self, line: object) -> None:
        # First the end of a line: what is before it may be half a line.
        os.write(self.file, b"\n" + json.dumps(line).encode())

    def read(self) -> dict[str, dict[str, Remembered]]:
        try:
            lines = list(filter(None, self.path.read_bytes().split(b"\n")))
        except OSError:
            return {}
        entries, count = {}, 0
        with collections_paused():
            for line in parsed(lines):
                if isinstance(line, list) and len(line) == 5 and isinstance(line[1], str):
                    count += 1
                    what, path, *entry = line
                    if what != NOT_TRUSTED:
                        entries.setdefault(what, {})[path] = tuple(entry)
        kept = sum(map(len, entries.values()))
        if count - kept > max(OUTDATED_LINES, kept):
            self.write(entries)
        return entries

    def write(self, entries: dict[str, dict[str, Remembered]]) -> None:
        lines = [
            json.dumps([what, path, *entry])
            for what, those in entries.items()
            for path, entry in those.items()
        ]
        with contextlib.suppress(OSError):
            write_text(self.path, "\n".join([json.dumps({"index of": self.of}), *lines]))


def parsed(lines: list[bytes]) -> list:
    """The values of lines in JSON, without those that are none."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(b"[" + b",".join(lines) + b"]")
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return found
