"""A sweep at a glance: on a terminal a table that lives, in a log file a line for every job that ends and one a minute.   [no torch]"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import replace

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as Rows
from rich.text import Text

from cogvx.files import shown
from cogvx.records.sweep import Job, Progress, State, Sweep

SAID_EVERY = 60  # seconds, in a log file
COLOURS = {
    State.done: "green", State.pruned: "dim", State.running: "cyan", State.failed: "red", State.out_of_memory: "red", State.killed: "red", State.interrupted: "yellow",
}  # fmt: skip


class Table:
    def __init__(self, sweep: Sweep):
        self.sweep, self.progress = sweep, {job.name: sweep.progress(job) for job in sweep.jobs()}
        self.console, self.said, self.live = Console(), time.monotonic(), None

    def __enter__(self) -> Table:
        print(f"sweep   {shown(self.sweep.folder)}: {self.counted()}", flush=True)
        if sys.stdout.isatty():
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, running: list[Job]) -> None:
        for job in running:
            found = self.sweep.progress(
                job
            )  # a job that is just starting has not locked its folder yet
            self.progress[job.name] = replace(found, state=State.running)
        if self.live is not None:
            self.live.update(Group(self.rows(), Text(self.counted(), style="dim")), refresh=True)
        elif time.monotonic() - self.said >= SAID_EVERY:
            self.said = time.monotonic()
            at = [f"{job.name} {steps_of(self.progress[job.name])}" for job in running]
            print(f"sweep   {'; '.join([self.counted(), *at])}", flush=True)

    def ended(self, job: Job, progress: Progress) -> None:
        self.progress[job.name] = progress
        line = f"{progress.state.value:7s} {job.name}"
        line += (
            ""
            if progress.heldout_loss is None
            else f"  held-out loss {figure(progress.heldout_loss)}"
        )
        if progress.state is not State.done and progress.reason:
            line += f"  {progress.reason.splitlines()[0]}"
        if self.live is not None:
            self.live.console.print(
                line,
                style=COLOURS.get(progress.state),
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        else:
            print(line, flush=True)

    def counted(self) -> str:
        states = Counter(progress.state.value for progress in self.progress.values())
        return ", ".join(
            [
                f"{len(self.progress)} jobs",
                *(f"{states[s.value]} {s.value}" for s in State if states[s.value]),
            ]
        )

    def rows(self) -> Rows:
        """The jobs that run and as many of the others as there is room for."""
        shown = sorted(
            self.progress, key=lambda name: self.progress[name].state is not State.running
        )
        shown = shown[: max(4, self.console.height - 6)]
        rows = Rows(
            "job",
            "state",
            "step",
            "loss",
            "held-out",
            "left",
            box=None,
            pad_edge=False,
            header_style="dim",
        )
        for name, found in self.progress.items():
            if name in shown:
                left = found.seconds_left() if found.state is State.running else None
                rows.add_row(
                    name, Text(found.state.value, style=COLOURS.get(found.state, "dim")), steps_of(found), figure(found.loss),
                    figure(found.heldout_loss), "" if left is None else in_words(left),
                )  # fmt: skip
        return rows


def steps_of(progress: Progress) -> str:
    return "" if progress.steps is None else f"{progress.step}/{progress.steps}"


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def in_words(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {seconds:02d} s"
        if minutes
        else f"{seconds} s"
    )
