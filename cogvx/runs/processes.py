"""Runs a recorded configuration, in this process or in several.   [no torch until the task is]"""

from __future__ import annotations

# First: what is registered first runs last at exit.
from cogvx import leaving  # isort: split

import contextlib
import errno
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cogvx import config as configuration
from cogvx.errors import UserError, first_line
from cogvx.files import remove_left_over, shown
from cogvx.progress import heartbeat, quiet_libraries
from cogvx.records import heartbeats, record, report
from cogvx.start import start_task
from cogvx.training.deterministic import without_kernel
from cogvx.training.out_of_memory import lack_of, said_of_lack
from cogvx.training.stop import REQUESTS, SAME_WITHIN, STOP_CODES, signals_heard

GRACE = 15  # seconds
LOOK_AT_BEATS = 30  # seconds between looks at the heartbeats of the ranks
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# A broken disk, or a network disk whose server is gone.
DISK_FAILS = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV)
# How torch's allocator for GPUs is set up. torch >= 2.11 reads the first of them.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"
# A Tegra board has this file. There torch accepts the setting and then fails to allocate.
TEGRA = Path("/etc/nv_tegra_release")
NOT_EXPANDABLE = (
    "this GPU or its driver has no virtual memory management, which torch's allocator uses here. "
    "Set PYTORCH_ALLOC_CONF=expandable_segments:False in front of the command."
)
FAILED = 2  # exit code of errors that the user can mend; their message is printed
KILLED = 128 + signal.SIGKILL
KILLED_BY = "by someone or because the machine's memory ran out"


def run_recorded(folder: Path, lock: int | None = None) -> int:
    """Runs what folder/config.yaml says; returns the exit code.

    `lock`: the file descriptor that locks the folder. Several processes hold it together.
    """
    count = configuration.read(folder / record.CONFIG).parallel.num_processes
    heartbeats.forget_beats(folder)
    if count == 1:
        return run_here(folder)
    (folder / record.SUMMARY).unlink(missing_ok=True)  # of an earlier, unfinished start
    ranks = start_ranks(folder, count, lock)
    with passing_on(ranks) as received:
        codes = wait_for_ranks(ranks, folder)
    if any(codes):
        report_failed_ranks(folder, codes)
    if received and STOP_CODES.intersection(codes):
        return 128 + received[0]
    return next((code for code in (FAILED, *sorted(set(codes))) if code in codes and code != 0), 0)


@contextlib.contextmanager
def passing_on(ranks: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Every signal that asks to stop goes on to the ranks, as SIGTERM. Gives those that came."""
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT and len(received) > 1:
            # Ranks take a second SIGTERM for the first one, if it follows at once.
            time.sleep(SAME_WITHIN)
        for rank in ranks:
            rank.terminate()

    before = {number: signal.signal(number, pass_on) for number in signals_heard()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report_failed_ranks(folder: Path, codes: list[int]) -> None:
    """Prints the end of the failed ranks' logs, and writes the summary that a killed rank 0 could
    not write. A killed rank is the reason, not what rank 0 then failed of."""
    if record.is_gone(folder):
        return
    for rank in ranks_to_show(codes):
        log = log_of(folder, rank)
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        head = f"rank {rank} ended with exit code {codes[rank]}; the end of {log}:"
        print("\n".join([head, *last]), file=sys.stderr)
    if KILLED in codes:
        reason = f"rank {codes.index(KILLED)} was killed, {KILLED_BY}"
        print(f"error: {reason}; the checkpoints written so far are kept", file=sys.stderr)
        record.finish(folder, {"status": "killed", "reason": reason})
    elif not (folder / record.SUMMARY).is_file():
        status = "interrupted" if STOP_CODES.intersection(codes) else "failed"
        record.finish(folder, {"status": status, "reason": f"exit codes of the processes: {codes}"})


def ranks_to_show(codes: list[int]) -> list[int]:
    """The failed ranks whose error rank 0 has not printed on the terminal."""
    quiet = (0, FAILED, *STOP_CODES)
    return [
        rank
        for rank, code in enumerate(codes)
        if rank > 0 and (code not in quiet or code == FAILED != codes[0])
    ]


def start_ranks(folder: Path, count: int, lock: int | None = None) -> list[subprocess.Popen]:
    """Starts `count` processes that find each other the way torch.distributed's env:// does.

    Only rank 0 writes to the terminal.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ}
    shared["PYTHONPATH"] = python_path()
    if count > 1:
        shared |= {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    ranks, held = [], () if lock is None else (lock,)
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        command = [sys.executable, "-m", "cogvx.runs.processes", str(folder)]
        log = None if rank == 0 else log_of(folder, rank).open("w", encoding="utf-8")
        settings = {"env": {**shared, **place}, "stdout": log, "stderr": log, "pass_fds": held}
        with ignoring_terminal():
            ranks.append(subprocess.Popen(command, stdin=subprocess.PIPE, **settings))
    return ranks


@contextlib.contextmanager
def ignoring_terminal() -> Iterator[None]:
    """Processes that start here ignore Ctrl-C and a closed terminal: those are for this one."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def python_path() -> str:
    """PYTHONPATH for another Python that is to find cogvx."""
    return os.pathsep.join(filter(None, [str(configuration.PROJECT), os.environ.get("PYTHONPATH")]))


def log_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.log"


def wait_for_ranks(ranks: list[subprocess.Popen], folder: Path) -> list[int]:
    """The exit codes of all ranks.

    When one has failed, the others may wait for it for ever: they get GRACE seconds to end. A
    rank stopped here after that counts as failed (1), so that KILLED means: killed by another.
    A rank that seems to hang is named.
    """
    failed_at, stopped_here = None, []
    silence = Silence(folder)
    # Every rank is asked: any() would stop at the first that runs, and miss one that has failed.
    while None in [rank.poll() for rank in ranks]:
        time.sleep(0.1)
        silence.look()
        if failed_at is None and any(rank.returncode for rank in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE and not stopped_here:
            stopped_here = [rank for rank in ranks if rank.poll() is None]
            for rank in stopped_here:
                rank.kill()
    codes = [128 - rank.returncode if rank.returncode < 0 else rank.returncode for rank in ranks]
    return [1 if rank in stopped_here else code for rank, code in zip(ranks, codes, strict=True)]


class Silence:
    """Names each process of a run that seems to hang, once."""

    def __init__(self, folder: Path):
        self.folder, self.told, self.due = folder, set(), time.monotonic() + LOOK_AT_BEATS

    def look(self) -> None:
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + LOOK_AT_BEATS
        for beat in heartbeats.silent(self.folder):
            if beat.pid not in self.told:
                self.told.add(beat.pid)
                print(
                    f"warning {beat.words(time.time())}. Look at it:  "
                    f"python launch.py task=doctor task.run={shown(self.folder)}",
                    file=sys.stderr,
                    flush=True,
                )


def run_here(folder: Path) -> int:
    """Runs the task in this process; returns its exit code.

    summary.json is written last, whatever happens.
    """
    config = configuration.read(folder / record.CONFIG)
    quiet_libraries()
    prefer_expandable_segments()
    rank = int(os.environ.get("RANK", "0"))
    is_main = rank == 0
    try:
        with heartbeats.beating(folder, rank), REQUESTS.listening(folder if is_main else None):
            if is_main:
                remove_left_over(folder)
                record.note(folder, allocator=allocator_settings())
            summary = start_task(config, folder)
        code = 128 + summary["signal"] if summary["status"] == "interrupted" else 0
    except BaseException as error:
        message, code = explained(error, config, folder)
        if code == 1 and record.is_gone(folder):
            message, code = record.said_of_gone(folder), FAILED
        stopped, memory = code in STOP_CODES, lack_of(error) is not None
        status = "interrupted" if stopped else "out_of_memory" if memory else "failed"
        summary = {"status": status, "reason": message}
        if code == 1:
            raise
        if stopped:
            message = f"{message}. {how_to_go_on(folder)}"
        said = f"\n{'stopped' if stopped else 'error'}: {leaving.printable(message)}"
        print(said, file=sys.stderr, flush=True)
    finally:
        # Before the summary: nobody tidies a job of a sweep that is done.
        if summary["status"] == "done":
            heartbeats.forget_beat(folder, rank)
        if is_main:
            conclude_run(folder, summary)
        elif summary["status"] == "out_of_memory":
            # The first process waits for this one until it is killed.
            record.finish(folder, summary)
    return code


def how_to_go_on(folder: Path) -> str:
    if any((folder / "checkpoints").glob("step_*")):
        return f"Go on with:  python launch.py train.resume={shown(folder)}"
    return "To go on, type the same command again"


def prefer_expandable_segments() -> None:
    """Lets torch's memory segments grow, unless the user has set up its allocator otherwise.

    Then what it reserves is little more than what tensors take: memory that is free joins other
    free memory, whatever it was used for. Comes before torch allocates anything. Not where it
    does not work: on Windows, also below WSL, and on Tegra boards.
    """
    linux = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if linux and not TEGRA.exists() and not allocator_settings():
        os.environ[ALLOCATOR_SETTINGS[0]] = EXPANDABLE


def allocator_settings() -> dict[str, str]:
    return {name: os.environ[name] for name in ALLOCATOR_SETTINGS if name in os.environ}


def explained(
    error: BaseException, config: configuration.Config | None = None, folder: Path | None = None
) -> tuple[str, int]:
    """What to tell the user, and the exit code: 1 for our own errors, which keep a traceback.

    config, folder: of the run, if there is one.
    """
    if isinstance(error, UserError):
        return str(error), FAILED
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        kept = "what is in the cache and the checkpoints written so far are kept"
        return f"by {by}; {kept}", 128 + number
    if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
        return (
            f"{error}: free some space, or set output_dir and data.cache_dir "
            f"to where this user can write",
            FAILED,
        )
    if isinstance(error, OSError) and error.errno in DISK_FAILS:
        return (
            f"a disk cannot be read or written: {error}. Checkpoints and what is in the cache are "
            f"kept. Look at the disk, or set output_dir and data.cache_dir to another",
            FAILED,
        )
    for advice in (said_of_lack(error, config, folder), without_kernel(error)):
        if advice is not None:
            return advice, FAILED
    if "CUDA driver error: operation not supported" in str(error):
        return f"{NOT_EXPANDABLE} torch says: {first_line(error)}", FAILED
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return (
            f"torch cannot compile here: {first_line(error)}. "
            f"Usually a C++ compiler (g++) is missing. Without one: train.compile=false, "
            f"and another optimizer than adamw8bit_torchao",
            FAILED,
        )
    return f"{type(error).__name__}: {error}", 1


def conclude_run(folder: Path, summary: dict) -> None:
    """Writes the summary and, for a run that is done, its page.

    A folder that was removed is not made again.
    """
    if record.is_gone(folder):
        return
    try:
        record.finish(folder, summary)
        if summary["status"] == "done":
            with heartbeat("report  still writing the page"):
                page = report.write_page(folder)
            print(f"report  {shown(page)}", flush=True)
    except OSError as error:
        print(
            f"\nwarning summary.json or report.html could not be written: {error}",
            file=sys.stderr,
            flush=True,
        )


def stop_with_parent() -> None:
    """Stops this process, with a checkpoint, when the one that started it has ended.

    The parent holds the other end of standard input and never writes to it.
    """
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    leaving.outlast_readers()
    threading.Thread(target=stop_with_parent, daemon=True).start()
    leaving.leave(run_here(Path(sys.argv[1])))
