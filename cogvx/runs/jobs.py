"""One job of a sweep, whoever starts it: is it to run, its run, its end.   [no torch]"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogvx.errors import UserError
from cogvx.records import record
from cogvx.records.sweep import Job, State, Sweep, is_locked
from cogvx.runs import processes

LOOK_EVERY = 0.5  # seconds between looks at running jobs
# multiprocessing's exit code of a process whose forkserver has ended.
SERVER_ENDED = 255
TROUBLED = (State.failed, State.out_of_memory, State.killed)


def is_to_run(sweep: Sweep, job: Job, *, retry_failed: bool) -> bool:
    state = sweep.progress(job).state
    if state is State.running:
        return False
    return not state.is_over() or (retry_failed and state in TROUBLED)


@contextmanager
def noting_signals(*numbers: int) -> Iterator[list[int]]:
    """A list of the signals that have come so far. Each asks to stop; none interrupts."""
    received: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: received.append(number)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_job(folder: Path, command: list[str]) -> int:
    """Runs the job of a folder in this process; returns the exit code."""
    try:
        with record.locked(folder) as lock:
            record.environment(folder, command)
            return processes.run_recorded(folder, lock)
    except (UserError, OSError) as error:
        reason, code = processes.explained(error)
        if code == 1:
            raise
        print(f"error: {reason}", file=sys.stderr)
        if not is_locked(folder):  # else another process is at work there
            processes.conclude_run(folder, {"status": State.failed.name, "reason": reason})
        return code


def record_end(folder: Path, exit_code: int) -> None:
    """Writes the summary that a killed process could not write."""
    if (folder / record.SUMMARY).is_file():
        return
    if exit_code == -signal.SIGKILL:
        status, reason = State.killed, f"killed, {processes.KILLED_BY}"
    elif exit_code == SERVER_ENDED:
        status, reason = State.killed, "killed, or ended unseen: its server was killed too"
    elif exit_code in (-signal.SIGTERM, -signal.SIGINT):
        status, reason = State.interrupted, "stopped during preparation; nothing is lost"
    elif exit_code < 0:
        status, reason = State.failed, f"crashed ({signal.Signals(-exit_code).name})"
    else:
        status, reason = State.failed, f"stopped by an error in cogvx (exit code {exit_code})"
    processes.conclude_run(folder, {"status": status.name, "reason": reason})
