"""A running sweep on the terminal: a live table, or lines in a log file.   [no torch]

A log file gets a line for every job that ends, and a line of the state once a minute.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import replace

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from cogvx.errors import first_line
from cogvx.files import shown
from cogvx.progress import counted
from cogvx.records.pages import duration, setting_text
from cogvx.records.sweep import Job, Progress, State, Sweep, seconds_left

LOG_EVERY = 60  # seconds
STATE_COLOURS = {
    State.done: "green",
    State.paused: "dim",
    State.running: "cyan",
    State.failed: "red",
    State.out_of_memory: "red",
    State.killed: "red",
    State.interrupted: "yellow",
}


class Table:
    """A context around a running sweep."""

    def __init__(self, sweep: Sweep):
        jobs = sweep.jobs()
        self.sweep, self.progress = sweep, {job.name: sweep.progress(job) for job in jobs}
        self.values = {job.name: job.values for job in jobs}
        self.to_come = 0
        self.console, self.logged, self.live = Console(), time.monotonic(), None

    def __enter__(self) -> Table:
        print(f"sweep   {shown(self.sweep.folder)}: {self.in_words()}", flush=True)
        if sys.stdout.isatty():
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, running: list[Job], to_come: int = 0) -> None:
        """`to_come`: jobs that a search has not proposed yet."""
        self.to_come = to_come
        for job in running:
            # A job that is just starting has not locked its folder yet.
            found = replace(self.sweep.progress(job), state=State.running)
            self.progress[job.name], self.values[job.name] = found, job.values
        if self.live is not None:
            lines = Text(self.in_words(), style="dim")
            self.live.update(Group(self.grid(), lines), refresh=True)
        elif time.monotonic() - self.logged >= LOG_EVERY:
            self.logged = time.monotonic()
            at = [f"{job.name} {steps_of(self.progress[job.name])}" for job in running]
            print(f"sweep   {'; '.join([self.in_words(), *at])}", flush=True)

    def ended(self, job: Job, progress: Progress) -> None:
        self.progress[job.name] = progress
        line = f"{progress.state.value:7s} {job.name}"
        if progress.heldout_loss is not None:
            line += f"  held-out loss {progress.heldout_loss:.4f}"
        if progress.state is not State.done and progress.reason:
            line += f"  {first_line(progress.reason)}"
        if self.live is None:
            print(line, flush=True)
            return
        style = {"style": STATE_COLOURS.get(progress.state), "markup": False, "highlight": False}
        self.live.console.print(line, soft_wrap=True, **style)

    def in_words(self) -> str:
        """`4 jobs, 1 pending, 1 running, 2 done; about 3 min 20 s left`."""
        states = Counter(progress.state.value for progress in self.progress.values())
        parts = [counted(len(self.progress), "job")]
        parts += [f"{states[s.value]} {s.value}" for s in State if states[s.value]]
        left = seconds_left(list(self.progress.values()), self.to_come)
        return ", ".join(parts) + ("" if left is None else f"; about {duration(left)} left")

    def grid(self) -> Grid:
        """The running jobs, and as many of the others as there is room for."""
        names = sorted(
            self.progress, key=lambda name: self.progress[name].state is not State.running
        )
        names = {*names[: max(4, self.console.height - 6)]}
        settings = list(dict.fromkeys(key for name in names for key in self.values[name]))
        grid = Grid(box=None, pad_edge=False, header_style="dim")
        for key in settings:
            # A value may break into two lines, but no digit is cut off.
            grid.add_column(key, justify="right", overflow="fold")
        for heading in ("state", "step", "loss", "held-out", "left"):
            justify = "left" if heading == "state" else "right"
            grid.add_column(heading, justify=justify, no_wrap=True)
        for name in [name for name in self.progress if name in names]:
            found, values = self.progress[name], self.values[name]
            left = found.seconds_left() if found.state is State.running else None
            grid.add_row(
                *(Text(setting_text(values.get(key))) for key in settings),
                Text(found.state.value, style=STATE_COLOURS.get(found.state, "dim")),
                steps_of(found),
                "" if found.loss is None else f"{found.loss:.4f}",
                "" if found.heldout_loss is None else f"{found.heldout_loss:.4f}",
                "" if left is None else duration(left),
            )
        return grid


def steps_of(progress: Progress) -> str:
    return "" if progress.steps is None else f"{progress.step}/{progress.steps}"
