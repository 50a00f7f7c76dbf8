"""Which processes work in a run's folder: those that hold the lock on its .lock file.   [no torch]

A process hands the lock on to those that it starts. So the lock may outlive the process that took
it: the ranks of a killed command hold it until they have stopped with a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

# Orphans finish their step and write a checkpoint. Later they are killed.
ORPHANS_STOP_WITHIN = 180.0  # seconds
GONE_WITHIN = 10.0  # seconds from a kill to the end
PROCESSES = Path("/proc")


def is_alive(pid: int) -> bool:
    """Whether this machine has such a process. One that has ended and is not waited for is none."""
    with contextlib.suppress(OSError, IndexError):
        stat = (PROCESSES / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True


def holders(lock: Path) -> list[int]:
    """The processes of this machine and this user that hold the lock on a file.

    [] where the system does not tell: Linux does, in /proc/PID/fdinfo (man proc_pid_fdinfo).
    """
    found, name = [], os.path.realpath(lock)
    for process in PROCESSES.glob("[0-9]*"):
        # It may end while it is looked at, or belong to another user.
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                if os.readlink(descriptor) == name and has_lock(process, descriptor.name):
                    found.append(int(process.name))
                    break
    return sorted(found)


def has_lock(process: Path, descriptor: str) -> bool:
    facts = (process / "fdinfo" / descriptor).read_text(encoding="utf-8")
    return any(line.startswith("lock:") and " WRITE " in line for line in facts.splitlines())


def orphans(lock: Path, first: int | None) -> list[int]:
    """The holders of a lock that the process `first` took, if that has ended; else []."""
    found = holders(lock)
    return [] if first is None or first in found else found


def wait_for_orphans(lock: Path, first: int) -> None:
    """Returns when they have ended. After ORPHANS_STOP_WITHIN they are killed."""
    left = orphans(lock, first)
    if not left:
        return
    print(
        f"wait    process {first}, which ran here, has ended. Those that it started stop with a "
        f"checkpoint: {numbered(left)}",
        flush=True,
    )
    for seconds, number in ((ORPHANS_STOP_WITHIN, None), (GONE_WITHIN, signal.SIGKILL)):
        if number is not None:
            print(
                f"warning killed {numbered(left)}: no end within "
                f"{ORPHANS_STOP_WITHIN:.0f} s. The checkpoints written so far are kept",
                flush=True,
            )
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while (left := orphans(lock, first)) and time.monotonic() < deadline:
            pause()
        if not left:
            return


def pause() -> None:
    time.sleep(0.2)


def numbered(pids: list[int]) -> str:
    return f"process{'es' if len(pids) > 1 else ''} {', '.join(map(str, pids))}"
