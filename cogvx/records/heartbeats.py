"""When each process of a run was last seen, and where: RUN/heartbeats/rank_0.json.   [no torch]

A thread in every process writes it, so that no step waits for a disk. It tells two things apart:
the process is there (`seen`), and its work goes on (`moved`). A process that waits for the others
says so (`waits`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cogvx.files import read_json, runs_here, this_machine, write_json
from cogvx.progress import PULSE

HEARTBEATS = "heartbeats"  # the folder, in the run's
# Seconds between two writings at most, and at least: a new phase is written soon.
BEAT_EVERY, SOONEST = 5.0, 1.0
# Seconds without any sign of work. Loading a large model or compiling takes minutes.
SILENT_AFTER = 10 * 60.0


@dataclass(frozen=True)
class Beat:
    """Times are in seconds since 1970."""

    rank: int
    pid: int
    host: str
    machine: str  # the host, or a container on it: where the process number counts
    phase: str | None  # of training/peaks.py, or what is being prepared
    step: int | None
    steps: int | None
    waits: bool  # for the other processes
    moved: float  # a step, a clip, a denoising step or a phase was done last
    seen: float  # the file was written

    @property
    def where(self) -> str:
        """`rank 1: train, step 40 of 960`"""
        step = "" if self.step is None else f", step {self.step} of {self.steps}"
        waits = ", waits for the others" if self.waits else ""
        return f"rank {self.rank}: {self.phase or 'starting'}{step}{waits}"

    def is_here(self) -> bool:
        """Whether the process runs on this machine."""
        return self.machine == this_machine() and runs_here(self.pid)

    def is_gone(self) -> bool:
        """Whether the process has ended. Of another machine's that is not known: False."""
        return self.machine == this_machine() and not runs_here(self.pid)

    def silence(self, now: float) -> float:
        """Seconds without work. Waiting is none, as long as the process is there."""
        return max(0.0, now - (self.seen if self.waits else self.moved))

    def words(self, now: float) -> str:
        """Where the process is, and whether it lives."""
        if self.is_gone():
            return f"{self.where}; process {self.pid} has ended"
        moved, seen = now - self.moved, now - self.seen
        place = f"process {self.pid} on {self.host}"
        if seen > SILENT_AFTER:
            return f"{self.where}; not seen for {minutes(seen)}: hung or killed ({place})"
        if self.silence(now) > SILENT_AFTER:
            return (
                f"{self.where}; no work for {minutes(moved)}: hung, or a very long task ({place})"
            )
        return f"{self.where}; seen {seen:.0f} s ago ({place})"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"


# -- written by the run --------------------------------------------------------------------------


@contextlib.contextmanager
def beating(folder: Path, rank: int) -> Iterator[None]:
    """While the block runs, a thread writes where this process is. The last file stays."""
    ended = threading.Event()
    with contextlib.suppress(OSError):
        (folder / HEARTBEATS).mkdir(exist_ok=True)
    PULSE.begin()
    thread = threading.Thread(target=beat_until, args=(folder, rank, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        PULSE.changed.set()
        thread.join()


def beat_until(folder: Path, rank: int, ended: threading.Event) -> None:
    while True:
        last = ended.is_set()
        PULSE.changed.clear()
        # A full disk or a folder that is away is the run's own business.
        with contextlib.suppress(OSError):
            write_json(file_of(folder, rank), asdict(beat_now(rank)), make_folder=False)
        if last:
            return
        # Phases may follow each other within milliseconds.
        ended.wait(SOONEST)
        PULSE.changed.wait(BEAT_EVERY - SOONEST)


def beat_now(rank: int) -> Beat:
    PULSE.look_at_bars()
    return Beat(
        rank=rank,
        pid=os.getpid(),
        host=platform.node(),
        machine=this_machine(),
        phase=PULSE.doing(),
        step=PULSE.step,
        steps=PULSE.steps,
        waits=PULSE.waits,
        moved=PULSE.moved_at,
        seen=time.time(),
    )


def file_of(folder: Path, rank: int) -> Path:
    return folder / HEARTBEATS / f"rank_{rank}.json"


def forget_beat(folder: Path, rank: int) -> None:
    """Of a run that is done, nothing stays. The last rank removes the folder."""
    with contextlib.suppress(OSError):
        file_of(folder, rank).unlink(missing_ok=True)
        (folder / HEARTBEATS).rmdir()


def forget_beats(folder: Path) -> None:
    """Of an earlier start, which may have had more processes."""
    shutil.rmtree(folder / HEARTBEATS, ignore_errors=True)


# -- read by others ------------------------------------------------------------------------------


def beats_of(folder: Path) -> list[Beat]:
    """The last beat of every rank. [] if the run is done, or of an earlier version."""
    found = []
    for path in (folder / HEARTBEATS).glob("rank_*.json"):
        with contextlib.suppress(TypeError):  # half a file, or another version's
            found.append(Beat(**read_json(path)))
    return sorted(found, key=lambda beat: beat.rank)


def silent(folder: Path) -> list[Beat]:
    """The processes of a running run that hang, it seems."""
    now, beats = time.time(), beats_of(folder)
    found = [beat for beat in beats if beat.is_gone() or beat.silence(now) > SILENT_AFTER]
    if not found and beats and all(beat.waits for beat in beats):
        # Each waits for the others.
        found = [beat for beat in beats if now - beat.moved > SILENT_AFTER]
    return found
