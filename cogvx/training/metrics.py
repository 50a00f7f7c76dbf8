"""metrics.jsonl, the record of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from cogvx.errors import first_line
from cogvx.files import flush_to_disk, read_json_lines, unreadable_lines, write_text
from cogvx.options.tracking import Tracking
from cogvx.progress import counted
from cogvx.records.sweep import name_of_sweep


class Metrics:
    """Appends to metrics.jsonl and to the tracker.

    If the run is resumed, the lines after the resumed step are removed first. logged_until: the
    step of the last line that has to be there then.
    """

    def __init__(
        self,
        folder: Path,
        tracking: Tracking,
        config: dict[str, object],
        *,
        resumed_at: int,
        logged_until: int = 0,
    ):
        self.path = folder / "metrics.jsonl"
        self.tracking, self.failed = tracking, False
        self.kept = self.lines_until(resumed_at) if resumed_at else []
        last = max((line["step"] for line in self.kept), default=0)
        if last < logged_until:
            tqdm.write(
                f"warning {self.path.name} ends at step {last}, and the checkpoint is of step "
                f"{resumed_at}: the lines in between are lost, perhaps after a power cut"
            )
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.kept))
        self.mirror(tracking.start, folder, config, resumed_at, name_of_sweep(folder))

    def lines_until(self, step: int) -> list[dict]:
        """A warning tells if some cannot be read. The last one may always be half a line."""
        lines = [line for line in read_json_lines(self.path) if isinstance(line.get("step"), int)]
        if broken := unreadable_lines(self.path, lines):
            tqdm.write(
                f"warning {counted(broken, 'line')} of {self.path.name} cannot be read, perhaps "
                f"after a power cut; the other lines are kept"
            )
        return [line for line in lines if line["step"] <= step]

    def flush(self) -> None:
        """What is logged so far is on the disk when this returns."""
        if self.path.is_file():
            flush_to_disk(self.path)

    def has(self, name: str, step: int) -> bool:
        """Whether the run logged this before it was resumed."""
        return any(line["step"] == step and name in line for line in self.kept)

    def log(self, step: int, **values: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if numbers:
            self.mirror(self.tracking.log, numbers, step)

    def videos(self, paths: list[Path], step: int) -> None:
        if paths:
            self.mirror(self.tracking.videos, paths, step)

    def finish(self, status: str) -> None:
        self.mirror(self.tracking.finish, status)

    def mirror(self, call: Callable, *arguments: object) -> None:
        """A tracker that fails does not stop the run. One warning names the first failure."""
        try:
            call(*arguments)
        except Exception as error:
            if not self.failed:
                name = type(self.tracking).__name__.lower()
                tqdm.write(
                    f"warning tracking={name} failed: {first_line(error)}; "
                    f"the run goes on, and {self.path.name} has all values"
                )
            self.failed = True
