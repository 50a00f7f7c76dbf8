"""metrics.jsonl, the record of a run."""

from __future__ import annotations

import json
from pathlib import Path

from cogvx.runs.record import read_lines, write_whole
from cogvx.training.tracking import Tracking


class Metrics:
    """Appends to metrics.jsonl and to the tracker. On a resume, lines after the resumed step are taken out first."""

    def __init__(self, folder: Path, tracking: Tracking, config: dict, *, resumed_at: int):
        self.path = folder / "metrics.jsonl"
        self.tracking = tracking
        self.kept = [line for line in read_lines(self.path) if line["step"] <= resumed_at] if resumed_at else []
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.kept))
        tracking.start(folder, config)

    def has(self, name: str, step: int) -> bool:
        """Whether a resumed run had logged this already."""
        return any(line["step"] == step and name in line for line in self.kept)

    def log(self, step: int, **values: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.tracking.log({name: value for name, value in values.items() if isinstance(value, int | float)}, step)
