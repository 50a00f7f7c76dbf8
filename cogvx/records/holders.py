"""Which processes work in a run's folder: those that hold the lock on its .lock file.   [no torch]

A process hands the lock on to those that it starts. So the lock may outlive the process that took
it: the ranks of a killed command hold it until they have stopped with a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

# Orphans finish their step and write a checkpoint. Later they are killed.
ORPHANS_STOP_WITHIN = 180.0  # seconds
GONE_WITHIN = 10.0  # seconds from a kill to the end
PROCESSES = Path("/proc")
TAKEN = re.compile(r"^lock:.* WRITE (\d+) ", re.MULTILINE)


def holders(lock: Path) -> dict[int, int]:
    """The processes of this machine and this user that hold the lock on a file.

    Each with the number of the process that took the lock; 0 if that has ended. {} where the
    system does not tell: Linux does, in /proc/PID/fdinfo (man proc_pid_fdinfo).
    """
    found, name = {}, os.path.realpath(lock)
    for process in PROCESSES.glob("[0-9]*"):
        # It may end while it is looked at, or belong to another user.
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                if os.readlink(descriptor) != name:
                    continue
                facts = (process / "fdinfo" / descriptor.name).read_text(encoding="utf-8")
                if taken := TAKEN.search(facts):
                    found[int(process.name)] = int(taken[1])
    return found


def orphans(lock: Path) -> list[int]:
    """The holders of a lock, if the process that took it has ended; else []."""
    found = holders(lock)
    return sorted(pid for pid, first in found.items() if first not in found)


def wait_for_orphans(lock: Path) -> None:
    """Returns when they have ended. After ORPHANS_STOP_WITHIN they are killed."""
    left = orphans(lock)
    if not left:
        return
    print(
        f"wait    the process that ran here has ended. Those that it started stop with a "
        f"checkpoint: {numbered(left)}",
        flush=True,
    )
    left = left_after(ORPHANS_STOP_WITHIN, lock)
    if not left:
        return
    print(
        f"warning killed {numbered(left)}: no end within {ORPHANS_STOP_WITHIN:.0f} s. "
        f"The checkpoints written so far are kept",
        flush=True,
    )
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    left_after(GONE_WITHIN, lock)


def left_after(seconds: float, lock: Path) -> list[int]:
    """The orphans that have not ended by then."""
    deadline = time.monotonic() + seconds
    while (left := orphans(lock)) and time.monotonic() < deadline:
        pause()
    return left


def pause() -> None:
    time.sleep(0.2)


def numbered(pids: list[int]) -> str:
    return f"process{'es' if len(pids) > 1 else ''} {', '.join(map(str, pids))}"
