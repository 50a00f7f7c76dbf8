"""What a run has left in its folder so far, for its page.   [no torch]"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import yaml

from cogvx import config as configuration
from cogvx.files import read_json, read_json_lines
from cogvx.records import record
from cogvx.records.present import Doing
from cogvx.records.sweep import is_locked


@dataclass(frozen=True)
class Run:
    """What a run has left in its folder so far. What it has not made is empty."""

    folder: Path
    summary: dict
    facts: dict
    metrics: list[dict]
    settings: dict  # the whole config.yaml
    evaluation: dict
    listed: list[dict[str, str]]  # the rows of dataset_report.csv
    planned: dict  # plan.json
    doing: Doing | None  # None: it does not go on

    @classmethod
    def read(cls, folder: Path, *, over: bool = False) -> Run:
        metrics = read_json_lines(folder / "metrics.jsonl")
        logged = max((line["step"] for line in metrics), default=0)
        return cls(
            folder,
            read_json(folder / record.SUMMARY),
            read_json(folder / record.ENVIRONMENT),
            metrics,
            yaml.safe_load((folder / record.CONFIG).read_text(encoding="utf-8")),
            read_json(folder / "evaluation.json"),
            rows_of_report(folder / "dataset_report.csv"),
            read_json(folder / "plan.json"),
            Doing.read(folder, logged) if not over and goes_on(folder) else None,
        )

    @property
    def clips(self) -> dict[str, int]:
        """How many clips, by their use."""
        uses = [row["use"] for row in self.listed]
        return {use: uses.count(use) for use in dict.fromkeys(uses)}

    @property
    def judged(self) -> list[dict]:
        return [line for line in self.metrics if line.get("heldout_loss") is not None]

    @property
    def skipped_validation(self) -> dict[str, list[int]]:
        """The parts of validation that memory did not suffice for, with their steps."""
        return skipped_in(self.metrics)

    @property
    def lost_its_judge(self) -> bool:
        """Whether the held-out loss of the result is not known, because memory ended."""
        last = self.judged[-1]["step"] if self.judged else 0
        return any(step > last for step in self.skipped_validation.get("held-out loss", []))

    @property
    def trained(self) -> list[dict]:
        return [line for line in self.metrics if "loss" in line]

    @property
    def choices(self) -> dict[str, str]:
        return configuration.choices_of(self.settings)


def skipped_in(metrics: list[dict]) -> dict[str, list[int]]:
    """What lines of metrics.jsonl say of memory that ended in validation: steps, by the part."""
    found: dict[str, set[int]] = {}
    for line in metrics:
        if "out_of_memory" in line:
            found.setdefault(line["out_of_memory"], set()).add(line["step"])
    return {what: sorted(steps) for what, steps in found.items()}


def goes_on(folder: Path) -> bool:
    """A run that is done still holds its lock while it writes its page."""
    return is_locked(folder) and record.finished(folder) is None


def rows_of_report(report: Path) -> list[dict[str, str]]:
    if not report.is_file():
        return []
    with report.open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]
