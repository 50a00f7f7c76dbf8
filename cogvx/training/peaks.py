"""The peak of memory in each phase of a run, under the plan's names, so that both can be compared.

On a GPU: what torch's allocator reserved and allocated at most. Elsewhere: the whole process.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache

from cogvx.model import transfer
from cogvx.options.cards import GIB
from cogvx.progress import PULSE
from cogvx.training.out_of_memory import note_lack

# Linux: a 5 written there makes the process's peak its present size (man proc_pid_clear_refs).
RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
# GiB, by what was measured: "reserved_gib" and "allocated_gib" on a GPU, else "process_gib".
Peaks = dict[str, float]


class MemoryPeaks:
    """The peaks of one process. A phase may come often: the highest counts."""

    def __init__(self):
        self.by_phase: dict[str, Peaks] = {}
        self.present: list[str] = []  # the phase, after those that it interrupts
        self.place = ""  # what of the phase runs now, for messages
        self.since_line: dict[str, Peaks] = {}

    @contextlib.contextmanager
    def phase(self, name: str, place: str = "") -> Iterator[None]:
        """What is in memory at most within this context belongs to this phase.

        So does not what an inner phase has at most. place: what of the phase this is.
        """
        self.note()
        self.present.append(name)
        PULSE.in_phases(self.present)
        before, self.place = self.place, place
        try:
            yield
        except Exception as error:
            note_lack(error, name, self.place)
            raise
        finally:
            self.note()
            self.present.pop()
            PULSE.in_phases(self.present)
            self.place = before

    def present_state(self) -> tuple[list[str], dict[str, Peaks]]:
        """The phase after those that it interrupts, and the peaks noted so far.

        Another thread may ask.
        """
        return list(self.present), dict(self.by_phase)

    def note(self) -> None:
        """Notes the peak since the last call as one of the present phase. Peaks begin anew."""
        found = measured_peaks()
        reset_peaks()
        if self.present:
            for peaks in (self.by_phase, self.since_line):
                name = self.present[-1]
                peaks[name] = highest(peaks.get(name, {}), found)

    def of_line(self, name: str) -> float | None:
        """GiB of the phase since the last call; None if it was not there."""
        self.note()
        return most(self.since_line.pop(name, {}))

    def summary(self) -> dict[str, object]:
        """What summary.json gets."""
        found = max((most(peaks) for peaks in self.by_phase.values()), default=None)
        return {"peak_memory_gib": found, "memory_by_phase": self.by_phase}

    def lines(self) -> Iterator[str]:
        """A table for the terminal."""
        columns = list(dict.fromkeys(name for peaks in self.by_phase.values() for name in peaks))
        titles = "".join(f"{name.removesuffix('_gib'):>11}" for name in columns)
        yield f"memory  {'GiB at most':16}{titles}"
        for phase, peaks in self.by_phase.items():
            yield f"        {phase:16}" + "".join(f"{peaks[name]:11.2f}" for name in columns)


def highest(one: Peaks, other: Peaks) -> Peaks:
    return {name: max(one.get(name, 0.0), value) for name, value in other.items()}


def most(peaks: Peaks) -> float | None:
    """What has to fit: of a GPU what is reserved."""
    return peaks.get("reserved_gib", peaks.get("process_gib"))


def measured_peaks() -> Peaks:
    if torch.cuda.is_available():
        return {
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
            "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        }
    return {"process_gib": round(process_peak() / GIB, 3)}


def reset_peaks() -> None:
    """Where the system cannot do it, a process's peak is that since its start."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        RESET.write_text("5", encoding="ascii")


def process_peak() -> int:
    """Bytes."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # macOS counts bytes here, Linux KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_memory_back(*, collect: bool = False) -> None:
    """What nothing refers to any more goes back to the device and, if it was pinned, to the system.

    The next phase then has the memory that the plan gives it. `collect`: also what only refers to
    itself, as a model does whose weights are streamed; this takes a tenth of a second or more.
    """
    clear_device_cache(garbage_collection=collect)
    transfer.empty_host_cache()
