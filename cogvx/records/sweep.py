"""A sweep's folder: which jobs it has, how far each is, and which is best.   [no torch]

outputs/sweeps/NAME/sweep.json, leaderboard.csv, report.html and a run's folder for each job
"""

from __future__ import annotations

import csv
import fcntl
import json
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import yaml

from cogvx import config as configuration
from cogvx.config import Config
from cogvx.errors import UserError
from cogvx.files import read_json, read_json_lines, write_text
from cogvx.records import record

SWEEP, LEADERBOARD, LOG = "sweep.json", "leaderboard.csv", "log.txt"


class State(Enum):
    pending = "pending"
    running = "running"
    done = "done"
    pruned = "pruned"
    interrupted = "interrupted"
    failed = "failed"
    out_of_memory = "out of memory"
    killed = "killed"

    def is_over(self) -> bool:
        """Whether the same command leaves it as it is: failed ones are started again by retry_failed=true, pruned ones by the search."""
        return self in (State.done, State.pruned, State.failed, State.out_of_memory)


@dataclass(frozen=True)
class Job:
    name: str  # of its folder
    values: dict[str, object]  # of the swept keys, by their short names


@dataclass(frozen=True)
class Progress:
    state: State
    reason: str | None
    step: int
    steps: int | None
    loss: float | None
    judged: list[dict]  # the lines of metrics.jsonl with a held-out loss
    seconds: float | None  # of a step
    summary: dict

    @property
    def heldout_loss(self) -> float | None:
        return self.judged[-1]["heldout_loss"] if self.judged else None

    def seconds_left(self) -> float | None:
        return (
            None
            if self.seconds is None or self.steps is None
            else (self.steps - self.step) * self.seconds
        )


@dataclass(frozen=True)
class Sweep:
    folder: Path
    name: str | None  # of sweeps/NAME.yaml
    swept: list[str]

    def freeze(self, jobs: list[tuple[Job, Config]], command: list[str]) -> None:
        """Gives every job its folder with its config.yaml, which is all that it runs from. UserError when one of them holds
        another configuration; nothing has been started then."""
        for job, config in jobs:
            config.output_dir = self.folder / job.name
            record.open_folder(config)
        self.folder.mkdir(parents=True, exist_ok=True)
        known = read_json(self.folder / SWEEP)
        told = {
            "name": self.name, "swept": self.swept, "command": command, "started": known.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z")),
            "jobs": known.get("jobs", {}) | {job.name: job.values for job, _ in jobs},
        }  # fmt: skip
        write_text(self.folder / SWEEP, json.dumps(told, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        told = read_json(folder / SWEEP)
        if "jobs" not in told:
            raise UserError(
                f"{folder} is not the folder of a sweep: it has no {SWEEP} that can be read"
            )
        return cls(folder, told["name"], told["swept"])

    def jobs(self) -> list[Job]:
        return [
            Job(name, values) for name, values in read_json(self.folder / SWEEP)["jobs"].items()
        ]

    def command(self) -> list[str]:
        return read_json(self.folder / SWEEP)["command"]

    def progress(self, job: Job) -> Progress:
        return progress_of(self.folder / job.name)

    def runs(self) -> dict[str, Path]:
        return {job.name: self.folder / job.name for job in self.jobs()}

    def leaderboard(self) -> list[dict[str, object]]:
        return rows_of(self.runs(), {job.name: job.values for job in self.jobs()}, self.swept)

    def write_leaderboard(self) -> list[dict[str, object]]:
        rows = self.leaderboard()
        with (self.folder / f"{LEADERBOARD}.partial").open(
            "w", encoding="utf-8", newline=""
        ) as file:
            table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            table.writeheader()
            table.writerows(rows)
        (self.folder / f"{LEADERBOARD}.partial").replace(self.folder / LEADERBOARD)
        return rows


def rows_of(
    runs: dict[str, Path], known: dict[str, dict[str, object]], swept: list[str]
) -> list[dict[str, object]]:
    """A leaderboard: a row for every run, the lowest held-out loss first, runs without one last. `known`: of each run, the values
    that `swept` names. `tie`: the best is not better than this by more than the noise that both were measured with."""
    found, rows = varying(runs, known, swept), []
    for name, folder in runs.items():
        progress = progress_of(folder)
        rows.append(
            {
                **found[name],
                "state": progress.state.value,
                **{measure: progress.summary.get(measure) for measure in MEASURED},
                "step": progress.step,
                "reason": progress.reason,
                "folder": name,
            }
        )
    rows.sort(key=lambda row: (row["objective"] is None, row["objective"] or 0.0))
    best = rows[0]["objective"] if rows else None
    return [
        {
            "place": None if row["objective"] is None else place,
            "tie": ties(row, rows[0], best),
            **row,
        }
        for place, row in enumerate(rows, 1)
    ]


def sweep_of(folder: Path) -> str | None:
    """The name of the sweep that a run is a job of; None for a run by itself."""
    return folder.parent.name if (folder.parent / SWEEP).is_file() else None


def told_apart(folders: list[Path]) -> list[str]:
    """Their names, with those of the folders above where two have the same."""
    names = [folder.name for folder in folders]
    return [
        folder.name if names.count(folder.name) == 1 else f"{folder.parent.name}/{folder.name}"
        for folder in folders
    ]


def varying(
    runs: dict[str, Path], known: dict[str, dict[str, object]], swept: list[str]
) -> dict[str, dict[str, object]]:
    """Of every run, the settings that are not the same in all: the swept ones first, then what follows from them."""
    flat = {name: recorded(folder) for name, folder in runs.items()}
    plain = {key.lstrip("+~") for key in swept}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    others = [
        key for key in keys
        if plain.isdisjoint((key, key.partition(".")[0]))  # what an option of a swept group brings goes without saying
        and len({str(values.get(key)) for values in flat.values()}) > 1
    ]  # fmt: skip
    return {
        name: {**known.get(name, {}), **{key: flat[name].get(key) for key in others}}
        for name in runs
    }


MEASURED = (
    "objective", "best_heldout_loss", "best_step", "heldout_loss_before", "heldout_noise_floor", "score_taught", "score_other",
    "seconds", "peak_memory_gib",
)  # fmt: skip


def ties(row: dict, first: dict, best: float | None) -> bool | None:
    floor = row["heldout_noise_floor"]
    if row["objective"] is None or floor is None or row is first:
        return None
    return row["objective"] - best <= max(floor, first["heldout_noise_floor"] or 0.0)


def recorded(folder: Path) -> dict[str, object]:
    """Every setting of a run, flat, with the options chosen."""
    values = yaml.safe_load((folder / record.CONFIG).read_text(encoding="utf-8"))
    return configuration.choices_of(values) | {
        key: value for key, value in configuration.flat(values).items() if key != "defaults"
    }


def progress_of(folder: Path) -> Progress:
    """From what a run has left in its folder so far."""
    summary, facts = read_json(folder / record.SUMMARY), read_json(folder / record.ENVIRONMENT)
    lines = read_json_lines(folder / "metrics.jsonl")
    state = state_of(folder, summary, started=bool(facts))
    trained = [line for line in lines if "loss" in line]
    judged = [line for line in lines if line.get("heldout_loss") is not None]
    return Progress(
        state, summary.get("reason"), step=summary.get("step") or (trained[-1]["step"] if trained else 0), steps=facts.get("steps"),
        loss=trained[-1]["loss"] if trained else None, judged=judged,
        seconds=trained[-1].get("seconds") if trained else None, summary=summary,
    )  # fmt: skip


def state_of(folder: Path, summary: dict, *, started: bool) -> State:
    if is_locked(folder):
        return State.running
    if summary:
        return next((state for state in State if state.name == summary["status"]), State.failed)
    return State.killed if started else State.pending


def is_locked(folder: Path) -> bool:
    """Whether a process runs in it now."""
    try:
        with (folder / record.LOCK).open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
