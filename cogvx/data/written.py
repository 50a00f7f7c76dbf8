"""Which captions a model wrote: a file of lines beside the clips.

A caption is a model's as long as it is what the record says. Once somebody has changed it, it is
theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from cogvx.data.listed import unquoted

RECORD = "written_captions.jsonl"


def complete_lines(path: Path) -> Iterator[dict]:
    """A killed task may have left half a line."""
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


class WrittenCaptions:
    """The record in a folder. A line is written at once, so a killed task loses none."""

    def __init__(self, folder: Path):
        self.path = folder / RECORD
        self.lines = [*complete_lines(self.path)]

    def add(self, **line: object) -> None:
        """Clip and caption, or what is known of a clip so far, with the date."""
        line["date"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.lines.append(line)
        with self.path.open("ab") as file:
            start = b"\n" if file.tell() and not self.ends_with_a_line() else b""
            file.write(start + json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def ends_with_a_line(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def is_a_models(self, clip: str, caption: str) -> bool:
        """Whether a model wrote this caption of a clip, and nobody changed it since."""
        own = (line.get("caption") for line in self.lines if line.get("clip") == clip)
        return unquoted(" ".join(caption.split())) in own

    def unfinished(self, clip: str, asked: str) -> str | None:
        """A description that was not written out yet. asked: who described it, and how."""
        own = [line for line in self.lines if line.get("clip") == clip]
        if not own or own[-1].get("asked") != asked:
            return None
        return own[-1].get("description")

    def not_in_the_table(self) -> dict[str, str]:
        """The captions since the table was last written, by clip."""
        written = [n for n, line in enumerate(self.lines) if "table_written" in line]
        since = self.lines[written[-1] + 1 if written else 0 :]
        return {line["clip"]: line["caption"] for line in since if "caption" in line}
