"""Writes the page of a run or a sweep again and again while it goes on.   [no torch]

python -m cogvx.records.live FOLDER

It is a process of its own, so it takes no time from a step and no error in it ends a run. When the
run has ended, however it ended, it writes the page one last time.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cogvx.config import PROJECT
from cogvx.files import read_json
from cogvx.leaving import outlast_signals
from cogvx.records import comparison, present, record, report
from cogvx.records.pages import PAGE, is_final
from cogvx.records.sweep import SWEEP, Sweep, is_locked

POLL_EVERY = 1.0  # seconds
WRITE_EVERY = 20.0  # seconds between two writings at least, when nothing special has happened
SOON = 3.0  # seconds between two writings at least, when there is something new to see
# All writings together take at most this share of the time so far, on one core, after the first
# few, for which there are FIRST_SECONDS.
SHARE, FIRST_SECONDS = 0.01, 3.0
# Seconds that a command waits at its end for the last page.
LAST_PAGE_WITHIN = 30
ENDED = b"."  # said by the process that started this one, when the run is over
# What is new to see when one of these appears.
NEWS = ("validation/step_*", "previews/step_*", "checkpoints/step_*", "*/summary.json")


@contextlib.contextmanager
def following(folder: Path) -> Iterator[None]:
    """While the block runs, another process writes the page of the run or the sweep."""
    command = [sys.executable, "-m", "cogvx.records.live", str(folder)]
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # A session of its own: Ctrl-C is for the run, whose end the page then tells.
    settings = {"stdin": subprocess.PIPE, "start_new_session": True, **silent}
    try:
        process = subprocess.Popen(command, env=environment, **settings)
    except OSError:  # no more processes allowed
        yield
        return
    try:
        yield
    finally:
        # Without this byte it would wait for the folder's lock, which this process still holds.
        with contextlib.suppress(OSError):
            process.stdin.write(ENDED)
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_PAGE_WITHIN)


@dataclass
class Follower:
    """When to write the page, so that it is new and costs little."""

    folder: Path
    started: float = field(default_factory=time.monotonic)
    written: float = -WRITE_EVERY  # when
    spent: float = 0.0  # seconds of this process, on writing
    longest: float = 0.0  # of these, on one writing
    seen: list[str] = field(default_factory=list)
    followed: set[Path] = field(default_factory=set)  # runs whose live page was written

    def follow(self) -> None:
        """Returns when the run has ended and its page says so."""
        said = None
        while said is None:
            self.write_if_due()
            said = heard(POLL_EVERY)
        # The other process was killed. Processes that it started may still stop with a checkpoint.
        while said != ENDED and is_locked(self.folder):
            self.write_if_due()
            time.sleep(POLL_EVERY)
        self.write_last()

    def write_if_due(self) -> None:
        if self.is_due(time.monotonic()):
            # A file may be half there, or gone again: the next writing comes soon.
            with contextlib.suppress(Exception):
                self.write()

    def is_due(self, now: float) -> bool:
        if self.spent + self.longest > FIRST_SECONDS + SHARE * (now - self.started):
            return False
        return now - self.written >= (SOON if self.news() else WRITE_EVERY)

    def news(self) -> bool:
        return self.state() != self.seen

    def state(self) -> list[str]:
        """What is there to see."""
        phases = read_json(self.folder / present.PROGRESS).get("phases", [])
        found = [str(path) for pattern in NEWS for path in sorted(self.folder.glob(pattern))]
        return [*phases, *found]

    def write(self) -> None:
        self.seen, began = self.state(), time.process_time()
        try:
            for run in self.runs():
                self.followed.add(run)
                # One page that cannot be written keeps no other from being written.
                with contextlib.suppress(Exception):
                    report.write_page(run)
            self.write_ended()
            if self.is_sweep():
                comparison.write_sweep(Sweep.read(self.folder))
        finally:
            took = time.process_time() - began
            self.spent, self.longest = self.spent + took, max(self.longest, took)
            self.written = time.monotonic()

    def is_sweep(self) -> bool:
        return (self.folder / SWEEP).is_file()

    def runs(self) -> list[Path]:
        """The runs that go on here: this one, or jobs of this sweep."""
        found = Sweep.read(self.folder).runs().values() if self.is_sweep() else [self.folder]
        # A sweep has no jobs, and no list of them, before all are checked.
        return [run for run in found if (run / record.CONFIG).is_file() and is_locked(run)]

    def write_ended(self) -> None:
        """Pages of runs that have ended without writing them: they were killed, or have failed."""
        for run in self.followed:
            if not is_locked(run) and not is_final(run / PAGE):
                report.write_page(run)

    def write_last(self) -> None:
        self.write_ended()
        if is_final(self.folder / PAGE):
            return
        if self.is_sweep():
            comparison.write_sweep(Sweep.read(self.folder), over=True)
        else:
            report.write_page(self.folder, over=True)


def heard(seconds: float) -> bytes | None:
    """Waits so long for what comes from the process that started this one; b"" if it was killed."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return os.read(sys.stdin.fileno(), 1) if readable else None


if __name__ == "__main__":
    os.nice(10)
    outlast_signals()
    Follower(Path(sys.argv[1])).follow()
