"""task=doctor: what of a run is whole, what is damaged, and how to go on. Changes nothing.

[no torch]
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cogvx import config as configuration
from cogvx.config import Config
from cogvx.data.cache import LISTS
from cogvx.errors import UserError, first_line
from cogvx.files import read_json, read_json_lines, shown, unreadable_lines
from cogvx.options import tasks
from cogvx.progress import counted, heartbeat
from cogvx.records import record
from cogvx.records.folders import every_run, leftovers
from cogvx.records.heartbeats import beats_of, silent
from cogvx.records.holders import holders, numbered
from cogvx.records.pages import PAGE, is_final
from cogvx.records.sweep import LOG, SWEEP, Progress, State, Sweep, is_locked, progress_of
from cogvx.records.usage import INFERENCE_SETTINGS
from cogvx.training import checkpoint as checkpoints

SOME_DAMAGED = 1  # exit code
MOST_LEFTOVERS = 5  # that are named
MOST_HEADER = 100_000_000  # bytes of a safetensors file's header, as its format says
RECORDS = (record.ENVIRONMENT, record.SUMMARY, INFERENCE_SETTINGS, "evaluation.json", "plan.json")
ERRORS = ("error:", "Error:", "stopped:", "Killed")  # how the lines of a log begin or go on


def examine(task: tasks.DoctorTask) -> int:
    """Prints what is found; returns the exit code: 1 if something is damaged."""
    places = task.runs or [task.run]
    runs = [run for place in places for run in runs_in(place)]
    reports = [Report.of(run) for run in runs]
    for report in reports:
        for line in report.lines(short=len(reports) > 1):
            print(line)
    damaged = [report for report in reports if report.damage]
    if len(reports) > 1:
        over = sum(report.goes_on is None for report in reports)
        print(
            f"{counted(len(reports), 'run')}: {len(damaged)} damaged, {over} with nothing to do, "
            f"{len(reports) - over} to go on with"
        )
        for command in dict.fromkeys(each.goes_on for each in reports if each.goes_on):
            print(f"go on   {command}")
    return SOME_DAMAGED if damaged else 0


def runs_in(place: Path) -> list[Path]:
    """A run's folder, the jobs of a sweep, or all runs below a folder. UserError if none is."""
    if (place / SWEEP).is_file() and "jobs" in read_json(place / SWEEP):
        found = [run for run in Sweep.read(place).runs().values() if run.is_dir()]
    elif looks_like_a_run(place):
        found = [place]
    else:
        found = [*every_run(place)] if place.is_dir() else []
    if not found:
        what = "holds no run" if place.is_dir() else "does not exist"
        raise UserError(
            f"task.run={place} {what}: give the folder of a run (it has a {record.CONFIG}), of a "
            f"sweep, or one that holds runs, such as outputs"
        )
    return found


def looks_like_a_run(place: Path) -> bool:
    """Also one whose config.yaml is lost."""
    names = (record.CONFIG, record.SUMMARY, record.ENVIRONMENT, "checkpoints", "metrics.jsonl")
    return any((place / name).exists() for name in names)


@dataclass
class Report:
    """What was found in a run's folder. Nothing is changed."""

    folder: Path
    config: Config | None
    progress: Progress
    damage: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)  # a first word, and a line
    newest: Path | None = None  # the newest whole checkpoint
    lost_result: bool = False

    @classmethod
    def of(cls, folder: Path) -> Report:
        try:
            report = cls(folder, None, progress_of(folder))
        # Files that are damaged may hold anything, here and below.
        except Exception as error:
            nothing = Progress(State.killed, None, 0, None, None, [], None, {})
            report = cls(folder, None, nothing, [f"the records cannot be read: {error!r}"])
        for look in (
            report.look_at_records,
            report.look_at_metrics,
            report.look_at_checkpoints,
            report.look_at_result,
            report.look_at_base_videos,
            report.look_at_page,
            report.look_at_cache,
            report.look_at_processes,
            report.look_at_end,
            report.look_at_leftovers,
        ):
            try:
                look()
            except Exception as error:
                what = look.__name__.removeprefix("look_at_").replace("_", " ")
                report.damage.append(f"{what}: {first_line(error)}")
        return report

    # -- what it says ------------------------------------------------------------------------

    def lines(self, *, short: bool) -> Iterator[str]:
        progress = self.progress
        at = f", at step {progress.step} of {progress.steps}" if progress.steps else ""
        yield f"run     {shown(self.folder)}: {progress.state.value}{at}"
        if self.whole and not short:
            yield f"whole   {', '.join(self.whole)}"
        for what in self.damage:
            yield f"damaged {what}"
        if short:
            return
        for word, line in self.notes:
            yield f"{word:8}{line}"
        yield self.last_line()

    def last_line(self) -> str:
        if self.goes_on is not None:
            return f"go on   {self.goes_on}"
        if self.is_running:
            return f"running nothing to do. To stop it with a checkpoint:  touch {self.at('stop')}"
        if self.damage:
            return "done    nothing to do: the result is whole, what is damaged is not needed"
        return "done    nothing to do: all is whole"

    def at(self, name: str) -> str:
        return shlex.quote(shown(self.folder / name))

    @property
    def is_running(self) -> bool:
        return self.progress.state is State.running

    @property
    def goes_on(self) -> str | None:
        """The command that goes on; None if there is nothing to do."""
        here, again = shlex.quote(shown(self.folder)), self.again()
        if self.is_running:
            hung = [str(beat.pid) for beat in silent(self.folder) if beat.is_here()]
            return f"kill -9 {' '.join(hung)} && {again}" if hung else None
        if self.progress.state is State.done:
            if self.lost_result:
                return f"rm {self.at(record.SUMMARY)} && {again}"
            page_is_old = any(word == "page" for word, _ in self.notes)
            return f"python launch.py task=report task.run={here}" if page_is_old else None
        return again

    def again(self) -> str:
        """The command that starts the run again in its folder, from its newest checkpoint."""
        here = shlex.quote(shown(self.folder))
        if (self.folder.parent / SWEEP).is_file():
            return command_in_words(read_json(self.folder.parent / SWEEP).get("command"))
        if self.config is None:
            return command_in_words(read_json(self.folder / record.ENVIRONMENT).get("command"))
        if self.newest is not None:
            return f"python launch.py train.resume={here}"
        return f"python launch.py --config-dir {here} --config-name config output_dir={here}"

    # -- what it looks at --------------------------------------------------------------------

    def look_at_records(self) -> None:
        try:
            self.config = configuration.read(self.folder / record.CONFIG)
            self.whole.append(record.CONFIG)
        except UserError as error:
            self.damage.append(f"{record.CONFIG}: {first_line(error)}")
        for name in RECORDS:
            path = self.folder / name
            if not path.is_file():
                continue
            if fault := fault_of_json(path):
                self.damage.append(f"{name}: {fault}")
            else:
                self.whole.append(name)

    def look_at_metrics(self) -> None:
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return
        lines = read_json_lines(path)
        if broken := unreadable_lines(path, lines):
            self.damage.append(f"metrics.jsonl: {counted(broken, 'line')} cannot be read")
        elif gap := self.gap_in(lines):
            self.damage.append(f"metrics.jsonl: {gap}")
        else:
            self.whole.append(f"metrics.jsonl ({counted(len(lines), 'line')})")

    def gap_in(self, lines: list[dict]) -> str | None:
        """The first step whose loss is not there, although a later one is."""
        logged = {line["step"] for line in lines if "loss" in line}
        if self.config is None or not logged:
            return None
        every = self.config.train.logging_steps
        lacking = sorted({*range(every, max(logged), every)} - logged)
        # Of a run that began at the checkpoint of another one, the first lines are there.
        lacking = [step for step in lacking if step > min(logged)]
        return f"the line of step {lacking[0]} is missing" if lacking else None

    def look_at_checkpoints(self) -> None:
        for place in checkpoints.step_folders(self.folder):
            with heartbeat(f"doctor  still reading {place.name}"):
                fault = checkpoints.damage_of(place)
            if fault is not None:
                self.damage.append(f"checkpoints/{place.name}: {fault}")
            else:
                self.newest = place
                self.whole.append(f"checkpoints/{place.name}")

    def look_at_result(self) -> None:
        recorded = self.progress.summary.get("result_files", {})
        for name, facts in recorded.items():
            if fault := checkpoints.fault_of_file(self.folder / name, facts):
                self.damage.append(f"{name}: {fault}")
                self.lost_result = True
        files = [*self.folder.glob("*.safetensors"), *self.folder.glob("transformer/*.safetensors")]
        others = [path for path in files if str(path.relative_to(self.folder)) not in recorded]
        for path in others:
            if fault := fault_of_safetensors(path):
                self.damage.append(f"{path.relative_to(self.folder)}: {fault}")
                self.lost_result = True
        trained = self.config is not None and isinstance(self.config.task, tasks.TrainTask)
        if trained and self.progress.state is State.done and not files:
            self.damage.append("the result is not there")
            self.lost_result = True
        if files and not self.lost_result:
            self.whole.append("the result")

    def look_at_base_videos(self) -> None:
        if self.progress.state is State.done:
            return
        for path in sorted(self.folder.glob("validation/base/*.npz")):
            if not zipfile.is_zipfile(path):
                self.notes.append(
                    ("again", f"{path.name} is damaged: the run makes this video again")
                )

    def look_at_page(self) -> None:
        over = self.progress.state not in (State.running, State.pending)
        if over and not is_final(self.folder / PAGE):
            what = "is from before the end" if (self.folder / PAGE).is_file() else "is not there"
            self.notes.append(("page", f"{PAGE} {what}"))

    def look_at_cache(self) -> None:
        name = read_json(self.folder / record.ENVIRONMENT).get("cache_list")
        if self.config is None or name is None:
            return
        cache = self.config.data.cache_dir
        listed = cache / LISTS / f"{name}.txt"
        if not listed.is_file():
            return
        names = [line for line in listed.read_text(encoding="utf-8").split("\n") if line]
        lacking = [name for name in names if not (cache / name).is_file()]
        for name in names:
            if name not in lacking and (fault := fault_of_safetensors(cache / name)):
                self.damage.append(f"{cache / name}: {fault}. It is made again")
        more = f"; {len(lacking)} are made again" if lacking else ""
        there = f"{len(names) - len(lacking)} of {counted(len(names), 'file')} are there{more}"
        self.notes.append(
            ("cache", f"{there}. Their content: python launch.py task=cache task.do=verify")
        )

    def look_at_processes(self) -> None:
        lock, now = self.folder / record.LOCK, time.time()
        if is_locked(self.folder):
            here = sorted(holders(lock))
            lives = (
                f"; {numbered(here)} of this machine" if here else ", not seen from this machine"
            )
            self.notes.append(("process", f"{record.user_of(self.folder)} works here{lives}"))
        else:
            self.notes.append(("process", "none works here"))
        for beat in beats_of(self.folder):
            self.notes.append(("last", beat.words(now)))

    def look_at_end(self) -> None:
        state, summary = self.progress.state, self.progress.summary
        if state in (State.running, State.done, State.pending):
            return
        reason = self.progress.reason or "as it was asked to"
        if not summary:
            reason = "without a summary: its process was killed, or its machine stopped"
        self.notes.append(("ended", f"{state.value}, {first_line(reason)}"))
        for log in sorted([*self.folder.glob("rank_*.log"), *self.folder.glob(LOG)]):
            if found := last_error(log):
                self.notes.append(("log", f"{log.name}: {found}"))

    def look_at_leftovers(self) -> None:
        aside = self.folder.glob(f"checkpoints/*{checkpoints.DAMAGED}")
        found = [(path, "a damaged checkpoint that was set aside") for path in aside]
        if not self.is_running:
            found += leftovers(self.folder, [self.folder])
        # Every run leaves its .lock file.
        found = [(path, why) for path, why in found if path.name != record.LOCK]
        for path, why in found[:MOST_LEFTOVERS]:
            self.notes.append(("left", f"{path.relative_to(self.folder)}: {why}"))
        if len(found) > MOST_LEFTOVERS:
            self.notes.append(("left", f"{len(found) - MOST_LEFTOVERS} more"))


def command_in_words(command: list[str] | None) -> str:
    """As it was typed: launch.py's own arguments."""
    if not command:
        return "type the command of this run again; it is not recorded"
    return shlex.join(["python", *command])


def fault_of_json(path: Path) -> str | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"it cannot be read ({first_line(error)})"
    return None if isinstance(found, dict | list) else "it holds no values"


def fault_of_safetensors(path: Path) -> str | None:
    """What is wrong with the form of a file of weights: its header must fit its size.

    The format: 8 bytes with the length of the header, the header as JSON with the offsets of every
    tensor, the tensors (github.com/huggingface/safetensors, README).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MOST_HEADER):
            return f"it has {size} bytes and no header that fits"
        header = file.read(length)
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        tensors = [facts for name, facts in json.loads(header).items() if name != "__metadata__"]
        ends = max((facts["data_offsets"][1] for facts in tensors), default=0)
        return (
            None if 8 + length + ends == size else f"it has {size} bytes, not {8 + length + ends}"
        )
    return "its header cannot be read"


def last_error(log: Path) -> str | None:
    """The last line of a log that tells of an error."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line.strip() for line in lines if any(word in line for word in ERRORS)]
    return found[-1] if found else None
