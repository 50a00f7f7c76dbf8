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
from cogvx.files import shown, write_json
from cogvx.leaving import printable
from cogvx.progress import counted
from cogvx.records.leaderboard import WIDEST_VALUE
from cogvx.records.pages import duration, setting_text
from cogvx.records.present import PROGRESS
from cogvx.records.sweep import Job, Progress, State, Sweep, seconds_left

LOG_EVERY = 60  # seconds
DROPPED_FIRST = ("loss", "left", "step")  # columns that a narrow terminal does without
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
        # A live table moves the cursor, which sys.stdout keeps from the terminal.
        terminal = sys.__stdout__ if sys.stdout.isatty() else None
        self.console, self.logged, self.live = Console(file=terminal), time.monotonic(), None

    def __enter__(self) -> Table:
        print(f"sweep   {shown(self.sweep.folder)}: {self.in_words()}", flush=True)
        if sys.stdout.isatty():
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()
        (self.sweep.folder / PROGRESS).unlink(missing_ok=True)

    def show(self, running: list[Job], to_come: int = 0) -> None:
        """`to_come`: jobs that a search has not proposed yet."""
        if to_come != self.to_come:
            # For the sweep's page.
            write_json(self.sweep.folder / PROGRESS, {"to_come": to_come})
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
            line += f"  {printable(first_line(progress.reason))}"
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
        kept = {*names[: max(4, self.console.height - 6)]}
        names = [name for name in self.progress if name in kept]
        settings, measures = self.settings(names), self.measures(names)
        for column in DROPPED_FIRST:
            if width_of(settings) + width_of(measures) > self.console.width:
                del measures[column]
        grid = Grid(box=None, pad_edge=False, header_style="dim")
        for key, texts in settings.items():
            # A long value breaks into lines, but no digit of it is cut off.
            least = min(WIDEST_VALUE, max(map(len, texts)))
            grid.add_column(key, justify="right", overflow="fold", min_width=least)
        for heading in measures:
            justify = "left" if heading == "state" else "right"
            grid.add_column(heading, justify=justify, no_wrap=True)
        for row in zip(*settings.values(), *measures.values(), strict=True):
            grid.add_row(*(text if isinstance(text, Text) else Text(text) for text in row))
        return grid

    def settings(self, names: list[str]) -> dict[str, list[str]]:
        """The jobs' values, a column for each setting: a name of a folder would be cut."""
        keys = dict.fromkeys(key for name in names for key in self.values[name])
        return {key: [setting_text(self.values[name].get(key)) for name in names] for key in keys}

    def measures(self, names: list[str]) -> dict[str, list]:
        found = [self.progress[name] for name in names]
        left = [p.seconds_left() if p.state is State.running else None for p in found]
        return {
            "state": [Text(p.state.value, style=STATE_COLOURS.get(p.state, "dim")) for p in found],
            "step": [steps_of(p) for p in found],
            "loss": ["" if p.loss is None else f"{p.loss:.4f}" for p in found],
            "held-out": ["" if p.heldout_loss is None else f"{p.heldout_loss:.4f}" for p in found],
            "left": ["" if seconds is None else duration(seconds) for seconds in left],
        }


def width_of(columns: dict[str, list]) -> int:
    """Characters of a table with these columns."""
    return sum(2 + max(len(key), *map(len, texts)) for key, texts in columns.items())


def steps_of(progress: Progress) -> str:
    return "" if progress.steps is None else f"{progress.step}/{progress.steps}"
