"""Runs the jobs of a sweep beside each other, each in a process of its own, from its frozen record.   [torch only in the jobs]

What takes long to import is imported once, in a server process that has not touched a device; every job is forked from it. A job that
runs out of memory, crashes or is killed spoils nothing but itself. When this process goes, however it goes, the jobs stop too, with a
checkpoint; the same command goes on from there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from cogvx.errors import UserError
from cogvx.records import record
from cogvx.records.sweep import LOG, Job, State, Sweep, is_locked
from cogvx.records.table import Table
from cogvx.runs import processes

EVERY = 0.5  # seconds between looks at the jobs
GIB_OF_A_JOB = 2  # of memory, on a machine without a GPU
STOPPED = 130  # exit code, as after Ctrl-C
UNFORTUNATE = (State.failed, State.out_of_memory, State.killed)


class OnFail(Enum):
    go_on = "go_on"
    stop = "stop"


@dataclass(frozen=True)
class Pool:
    """hydra/launcher=pool, conf/hydra/launcher/pool.yaml."""

    jobs: int | None
    gpus_per_job: int
    on_fail: OnFail
    retry_failed: bool

    @classmethod
    def read(cls, values: dict) -> Pool:
        """UserError for what is wrong with the settings."""
        jobs, gpus, on_fail, retry = (
            values.get(name) for name in ("jobs", "gpus_per_job", "on_fail", "retry_failed")
        )
        problems = []
        if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
            problems.append(f"hydra.launcher.jobs={jobs}: must be 1 or more, or null")
        if not isinstance(gpus, int) or gpus < 1:
            problems.append(f"hydra.launcher.gpus_per_job={gpus}: must be 1 or more")
        if on_fail not in OnFail.__members__:
            problems.append(
                f"hydra.launcher.on_fail={on_fail}: expected one of {', '.join(OnFail.__members__)}"
            )
        if not isinstance(retry, bool):
            problems.append(f"hydra.launcher.retry_failed={retry}: must be true or false")
        unknown = set(values) - {"_target_", "jobs", "gpus_per_job", "on_fail", "retry_failed"}
        problems += [f"unknown setting hydra.launcher.{name}" for name in sorted(unknown)]
        if problems:
            raise UserError("\n".join(problems))
        return cls(jobs, gpus, OnFail[on_fail], retry)

    def places(self) -> list[Place]:
        """Where jobs can run at the same time."""
        devices = gpus()
        if devices and self.gpus_per_job > len(devices):
            raise UserError(
                f"hydra.launcher.gpus_per_job={self.gpus_per_job}, and there {'is' if len(devices) == 1 else 'are'} {len(devices)}: give at most that many"
            )
        if devices:
            count, size = len(devices) // self.gpus_per_job, self.gpus_per_job
            groups = [devices[i * size : (i + 1) * size] for i in range(count)]
            wanted = count if self.jobs is None else self.jobs  # more jobs than groups share them
            return [Place(number, groups[number % count], None) for number in range(wanted)]
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (GIB_OF_A_JOB * 2**30)
        wanted = self.jobs or max(1, min(cores, room))
        return [Place(number, [], max(1, cores // wanted)) for number in range(wanted)]


@dataclass(frozen=True)
class Place:
    number: int
    gpus: list[str]
    threads: int | None  # of torch, on a CPU


@dataclass
class Running:
    job: Job
    place: Place
    process: multiprocessing.process.BaseProcess


def gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, without importing torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    try:
        said = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [
        str(number) for number in range(sum(line.startswith("GPU ") for line in said.splitlines()))
    ]


class Queue(Protocol):
    """Which job is next."""

    def take(self) -> Job | None:
        """The next to start; None when there is none now."""

    def to_pause(self) -> list[Job]:
        """Those of the running ones that should stop."""

    def ended(self, job: Job) -> None:
        """Called for each that was taken, once it has a summary."""


class Given:
    """The jobs of a grid, in order, but those that are over."""

    def __init__(self, sweep: Sweep, jobs: list[Job], pool: Pool):
        self.waiting = [
            job for job in jobs if is_to_run(sweep, job, retry_failed=pool.retry_failed)
        ]

    def take(self) -> Job | None:
        return self.waiting.pop(0) if self.waiting else None

    def to_pause(self) -> list[Job]:
        return []

    def ended(self, job: Job) -> None:
        pass


def run(sweep: Sweep, queue: Queue, pool: Pool, command: list[str]) -> int:
    """The exit code: 0 when all jobs are done, 1 when some are not, 130 when it was stopped."""
    places, given_up = pool.places(), False
    with (
        stopping(signal.SIGINT, signal.SIGTERM) as asked,
        Table(sweep) as table,
        Forks(sweep, command) as forks,
    ):
        while True:
            for place in [] if asked or given_up else forks.free(places):
                job = queue.take()
                if job is None:
                    break
                forks.start(job, place)
            if not forks.running:
                break
            time.sleep(EVERY)
            for job in forks.ended():
                queue.ended(job)
                progress = sweep.progress(job)
                table.ended(job, progress)
                given_up = given_up or (
                    pool.on_fail is OnFail.stop and progress.state in UNFORTUNATE
                )
            table.show([each.job for each in forks.running])
            forks.stop(queue.to_pause())
            if asked:
                forks.stop([each.job for each in forks.running], at_once=len(asked) > 1)
    if asked:
        return STOPPED
    return int(
        any(sweep.progress(job).state not in (State.done, State.pruned) for job in sweep.jobs())
    )


def wait_for_earlier(sweep: Sweep) -> None:
    """Until no process of an earlier start runs in a job's folder: those stop by themselves, and hold their GPU until then."""
    said = False
    while held := [job.name for job in sweep.jobs() if is_locked(sweep.folder / job.name)]:
        if not said:
            names = ", ".join(f"{name} ({record.user_of(sweep.folder / name)})" for name in held)
            print(
                f"sweep   waits for what already runs in folders of its jobs: {names}", flush=True
            )
        said = True
        time.sleep(EVERY)


def is_to_run(sweep: Sweep, job: Job, *, retry_failed: bool) -> bool:
    state = sweep.progress(job).state
    return state is not State.running and (
        not state.is_over() or (retry_failed and state in UNFORTUNATE)
    )


@contextmanager
def stopping(*numbers: int) -> Iterator[list[int]]:
    """Those of the signals that have come so far; each asks to stop."""
    asked: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: asked.append(number)) for n in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Forks:
    """The jobs' processes."""

    def __init__(self, sweep: Sweep, command: list[str]):
        self.sweep, self.command, self.running, self.asked = sweep, command, [], set()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["cogvx.runs.preloaded"])
        os.environ["PYTHONPATH"] = processes.python_path()  # the server's

    def __enter__(self) -> Forks:
        self.lives, self.held = self.context.Pipe(duplex=False)  # its end is this process's end
        handler = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # inherited: Ctrl-C is for this process alone
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, handler)
        return self

    def __exit__(self, *error: object) -> None:
        self.held.close()
        self.lives.close()

    def free(self, places: list[Place]) -> list[Place]:
        taken = {each.place.number for each in self.running}
        return [place for place in places if place.number not in taken]

    def start(self, job: Job, place: Place) -> None:
        folder = self.sweep.folder / job.name
        (folder / record.SUMMARY).unlink(missing_ok=True)  # of an earlier, unfinished start
        process = self.context.Process(
            target=work, args=(str(folder), self.command, place.gpus, place.threads, self.lives)
        )
        process.start()
        self.running.append(Running(job, place, process))

    def ended(self) -> list[Job]:
        """Those that ended since the last call; each has a summary. While its folder is locked a job runs, even if the server
        that would tell of its end was killed."""
        over = [each for each in self.running if not each.process.is_alive()]
        found = [each for each in over if not is_locked(self.sweep.folder / each.job.name)]
        for each in found:
            self.running.remove(each)
            tell(self.sweep.folder / each.job.name, each.process.exitcode)
        return [each.job for each in found]

    def stop(self, jobs: list[Job], *, at_once: bool = False) -> None:
        """Asks each of these jobs once to stop with a checkpoint; or kills them."""
        for each in [each for each in self.running if each.job in jobs]:
            with suppress(ProcessLookupError):
                if at_once:
                    os.killpg(each.process.pid, signal.SIGKILL)
                elif each.process.pid not in self.asked:
                    self.asked.add(each.process.pid)
                    os.kill(each.process.pid, signal.SIGTERM)


def tell(folder: Path, exit_code: int) -> None:
    """Sees that there is a summary, which a killed process could not write."""
    if (folder / record.SUMMARY).is_file():
        return
    if exit_code == -signal.SIGKILL:
        status, reason = State.killed, f"killed, {processes.KILLED_BY}"
    elif exit_code in (-signal.SIGTERM, -signal.SIGINT):
        status, reason = State.interrupted, "stopped where there was no step to finish first"
    elif exit_code < 0:
        status, reason = State.failed, f"crashed ({signal.Signals(-exit_code).name})"
    else:
        status, reason = State.failed, f"stopped by an error in cogvx (exit code {exit_code})"
    processes.close(folder, {"status": status.name, "reason": reason})


# -- in a job's process ------------------------------------------------------------------------------------------------


def work(
    folder: str, command: list[str], gpus: list[str], threads: int | None, lives: Connection
) -> None:
    os.setsid()
    log = os.open(Path(folder) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    threading.Thread(target=follow, args=(lives,), daemon=True).start()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)
    sys.exit(attempt(Path(folder), command))


def attempt(folder: Path, command: list[str]) -> int:
    """A job, in this process and those it may start; the exit code."""
    try:
        with record.locked(folder) as lock:
            record.environment(folder, command)
            return processes.run(folder, lock)
    except (UserError, OSError) as error:
        reason, code = processes.in_words(error)
        if code == 1:
            raise
        print(f"error: {reason}", file=sys.stderr)
        if not is_locked(folder):  # else another process is at work there
            processes.close(folder, {"status": State.failed.name, "reason": reason})
        return code


def follow(lives: Connection) -> None:
    """Stops this job, with a checkpoint, when the sweep is no more."""
    try:
        lives.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
