"""A sweep's folder: which jobs it has, how far each is, and which is best.   [no torch]

outputs/sweeps/NAME/ holds sweep.json, leaderboard.csv, report.html and one run's folder per job.
"""

from __future__ import annotations

import fcntl
import statistics
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import yaml

from cogvx import config as configuration
from cogvx.config import Config
from cogvx.errors import UserError
from cogvx.files import read_json, read_json_lines, write_csv, write_json
from cogvx.records import record
from cogvx.records.alike import Groups, Judged

SWEEP, LEADERBOARD, LOG = "sweep.json", "leaderboard.csv", "log.txt"
# What a row of the leaderboard takes from a job's summary.
SUMMARIZED = (
    "objective",
    "best_heldout_loss",
    "best_step",
    "heldout_loss_before",
    "heldout_noise_floor",
    "score_taught",
    "score_other",
    "seconds",
    "peak_memory_gib",
)


class State(Enum):
    """A run's state. The names stand in summary.json, the values are what users read."""

    pending = "pending"
    running = "running"
    done = "done"
    paused = "paused"
    interrupted = "interrupted"
    failed = "failed"
    out_of_memory = "out of memory"
    killed = "killed"
    pruned = paused  # the name in records of earlier versions

    def is_over(self) -> bool:
        """Whether the same command leaves the job alone.

        retry_failed=true starts failed jobs again, and a search may go on with a paused one.
        """
        return self in (State.done, State.paused, State.failed, State.out_of_memory)


@dataclass(frozen=True)
class Job:
    name: str  # of its folder
    values: dict[str, object]  # of the swept settings, by their short names


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    state: State
    reason: str | None
    step: int
    steps: int | None
    loss: float | None
    judged: list[dict]  # the lines of metrics.jsonl with a held-out loss
    step_seconds: float | None
    summary: dict

    @property
    def heldout_loss(self) -> float | None:
        return self.judged[-1]["heldout_loss"] if self.judged else None

    def seconds_left(self) -> float | None:
        """For the steps that are left; None while that cannot be told."""
        if self.step_seconds is None or self.steps is None:
            return None
        return (self.steps - self.step) * self.step_seconds


@dataclass(frozen=True)
class Sweep:
    folder: Path
    name: str | None  # of sweeps/NAME.yaml
    swept: list[str]

    def freeze(self, jobs: list[tuple[Job, Config]], command: list[str]) -> None:
        """Gives every job its folder and its config.yaml, which is all that the job runs from.

        UserError if a folder holds another configuration; then no job has been started.
        """
        for job, config in jobs:
            config.output_dir = self.folder / job.name
            record.open_folder(config)
        known = read_json(self.folder / SWEEP)
        write_json(
            self.folder / SWEEP,
            {
                "name": self.name,
                "swept": self.swept,
                "command": command,
                "started": known.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z")),
                "jobs": known.get("jobs", {}) | {job.name: job.values for job, _ in jobs},
            },
        )

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        known = read_json(folder / SWEEP)
        if "jobs" not in known:
            raise UserError(
                f"{folder} is not the folder of a sweep: it has no {SWEEP} that can be read"
            )
        return cls(folder, known["name"], known["swept"])

    def jobs(self) -> list[Job]:
        known = read_json(self.folder / SWEEP)["jobs"]
        return [Job(name, values) for name, values in known.items()]

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
        columns = list(dict.fromkeys(name for row in rows for name in row))
        write_csv(self.folder / LEADERBOARD, rows, columns)
        return rows


# -- which is best -------------------------------------------------------------------------------


def rows_of(
    runs: dict[str, Path], known: dict[str, dict[str, object]], swept: list[str]
) -> list[dict[str, object]]:
    """The leaderboard: one row per run, the lowest held-out loss first, runs without one last.

    `known`: for each run the values of the settings in `swept`. Runs of another `group` cannot be
    compared; places and ties count within a group. A row's `tie` says whether the run is as good as
    the best within the noise of the measurement; None where that is unknown.
    """
    settings, rows = differing_settings(runs, known, swept), []
    groups = groups_of(runs).numbers
    for name, folder in runs.items():
        progress = progress_of(folder)
        rows.append(
            {
                **settings[name],
                "state": progress.state.value,
                **{measure: progress.summary.get(measure) for measure in SUMMARIZED},
                "step": progress.step,
                "reason": progress.reason,
                "folder": name,
            }
        )
    return [
        {"group": group, **row}
        for group in sorted({*groups.values()})
        for row in with_places([row for row in rows if groups[row["folder"]] == group])
    ]


def groups_of(runs: dict[str, Path]) -> Groups:
    return Groups.of(
        {name: Judged.read(folder, progress_of(folder).judged) for name, folder in runs.items()}
    )


def with_places(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The rows of runs that can be compared, the best first."""
    rows = sorted(rows, key=lambda row: (row["objective"] is None, row["objective"] or 0.0))
    return [
        {"place": None if row["objective"] is None else place, "tie": ties(row, rows[0]), **row}
        for place, row in enumerate(rows, 1)
    ]


def ties(row: dict, best: dict) -> bool | None:
    floor = row["heldout_noise_floor"]
    if row["objective"] is None or floor is None or row is best:
        return None
    noise = max(floor, best["heldout_noise_floor"] or 0.0)
    return row["objective"] - best["objective"] <= noise


def differing_settings(
    runs: dict[str, Path], known: dict[str, dict[str, object]], swept: list[str]
) -> dict[str, dict[str, object]]:
    """For each run, the settings in which the runs differ: the swept ones first.

    What comes with an option of a swept group (optimizer=adamw,muon) is left out: the option's
    name already tells.
    """
    values = {name: recorded(folder) for name, folder in runs.items()}
    left_out = {key.lstrip("+~") for key in swept}
    others = [
        key
        for key in dict.fromkeys(key for own in values.values() for key in own)
        if left_out.isdisjoint((key, key.partition(".")[0]))
        and len({str(own.get(key)) for own in values.values()}) > 1
    ]
    return {
        name: {**known.get(name, {}), **{key: values[name].get(key) for key in others}}
        for name in runs
    }


def recorded(folder: Path) -> dict[str, object]:
    """Every setting of a run, flat, with the options chosen."""
    values = yaml.safe_load((folder / record.CONFIG).read_text(encoding="utf-8"))
    flat = configuration.flat({key: values[key] for key in values if key != "defaults"})
    return configuration.choices_of(values) | flat


# -- names ---------------------------------------------------------------------------------------


def name_of_sweep(folder: Path) -> str | None:
    """The name of the sweep that a run is a job of; None for a run by itself."""
    return folder.parent.name if (folder.parent / SWEEP).is_file() else None


def told_apart(folders: list[Path]) -> list[str]:
    """The folders' names; where two are alike, with the name of the folder above."""
    names = [folder.name for folder in folders]
    return [
        folder.name if names.count(folder.name) == 1 else f"{folder.parent.name}/{folder.name}"
        for folder in folders
    ]


# -- how far a run is ----------------------------------------------------------------------------


def progress_of(folder: Path) -> Progress:
    """From what a run has left in its folder so far."""
    summary, facts = read_json(folder / record.SUMMARY), read_json(folder / record.ENVIRONMENT)
    lines = read_json_lines(folder / "metrics.jsonl")
    trained = [line for line in lines if "loss" in line]
    last = trained[-1] if trained else {}
    return Progress(
        state_of(folder, summary, started=bool(facts)),
        summary.get("reason"),
        step=summary.get("step") or last.get("step", 0),
        steps=facts.get("steps"),
        loss=last.get("loss"),
        judged=[line for line in lines if line.get("heldout_loss") is not None],
        step_seconds=last.get("seconds"),
        summary=summary,
    )


def state_of(folder: Path, summary: dict, *, started: bool) -> State:
    return State.running if is_locked(folder) else state_after(summary, started=started)


def state_after(summary: dict, *, started: bool) -> State:
    """Of a run that does not go on."""
    if summary:
        status = summary["status"]
        return State[status] if status in State.__members__ else State.failed
    return State.killed if started else State.pending


def is_locked(folder: Path) -> bool:
    """Whether a process runs in the folder now."""
    try:
        with (folder / record.LOCK).open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def seconds_left(jobs: list[Progress], to_come: int = 0) -> float | None:
    """About how long all jobs still take, if as many run at a time as now; None if unknown.

    `to_come`: jobs that a search has not proposed yet.
    """
    running = [job for job in jobs if job.state is State.running]
    left = [seconds for job in running if (seconds := job.seconds_left()) is not None]
    whole = [job.summary["seconds"] for job in jobs if job.summary.get("seconds")]
    whole = whole or [
        job.steps * job.step_seconds for job in running if job.step_seconds and job.steps
    ]
    waiting = to_come + sum(not job.state.is_over() for job in jobs) - len(running)
    if not running or not whole:
        return None
    typical = statistics.median(whole)
    total = sum(left) + (len(running) - len(left) + waiting) * typical
    return max([total / len(running), *left])
