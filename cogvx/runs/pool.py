"""Runs the jobs of a sweep side by side on this machine.   [torch only in the jobs]

Each job is a process of its own. Without a GPU, a server process imports what takes long to import,
and every job is forked from it. With a GPU every job starts by itself. If a job runs out of memory,
crashes or is killed, the others go on. If this process ends, however it ends, the jobs stop with a
checkpoint, and the same command goes on from there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from cogvx.errors import UserError
from cogvx.options.cards import visible_gpus
from cogvx.records import record
from cogvx.records.sweep import LOG, Job, State, Sweep, is_locked
from cogvx.records.table import Table
from cogvx.runs import processes
from cogvx.runs.jobs import (
    LOOK_EVERY,
    TROUBLED,
    is_to_run,
    noting_signals,
    record_end,
    run_job,
)
from cogvx.training.stop import signals_heard

START_TRIES = 3  # of a job, while the server that starts it is killed
GIB_PER_JOB = 2  # of memory, on a machine without a GPU
STOPPED = 130  # exit code, as after Ctrl-C


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
        """UserError lists what is wrong with the settings."""
        names = ("jobs", "gpus_per_job", "on_fail", "retry_failed")
        jobs, gpus, on_fail, retry = (values.get(name) for name in names)
        problems = []
        if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
            problems.append(f"hydra.launcher.jobs={jobs}: must be 1 or more, or null")
        if not isinstance(gpus, int) or gpus < 1:
            problems.append(f"hydra.launcher.gpus_per_job={gpus}: must be 1 or more")
        if on_fail not in OnFail.__members__:
            allowed = ", ".join(OnFail.__members__)
            problems.append(f"hydra.launcher.on_fail={on_fail}: expected one of {allowed}")
        if not isinstance(retry, bool):
            problems.append(f"hydra.launcher.retry_failed={retry}: must be true or false")
        unknown = set(values) - {"_target_", *names}
        problems += [f"unknown setting hydra.launcher.{name}" for name in sorted(unknown)]
        if problems:
            raise UserError("\n".join(problems))
        return cls(jobs, gpus, OnFail[on_fail], retry)

    def slots(self) -> list[Slot]:
        """As many as jobs run at the same time."""
        gpus = visible_gpus()
        if not gpus:
            return self.cpu_slots()
        size = self.gpus_per_job
        if size > len(gpus):
            there = f"there {'is' if len(gpus) == 1 else 'are'} {len(gpus)}"
            raise UserError(
                f"hydra.launcher.gpus_per_job={size}, and {there}: give at most that many"
            )
        groups = [gpus[first : first + size] for first in range(0, len(gpus) - size + 1, size)]
        # More jobs than groups of GPUs share the groups.
        wanted = len(groups) if self.jobs is None else self.jobs
        return [Slot(number, groups[number % len(groups)], None) for number in range(wanted)]

    def cpu_slots(self) -> list[Slot]:
        own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        cores = len(own) or os.cpu_count() or 1
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        wanted = self.jobs or max(1, min(cores, memory // (GIB_PER_JOB * 2**30)))
        return [Slot(number, [], max(1, cores // wanted)) for number in range(wanted)]


@dataclass(frozen=True)
class Slot:
    """Where one job at a time runs."""

    number: int
    gpus: list[str]
    threads: int | None  # of torch, on a CPU


@dataclass
class Running:
    job: Job
    slot: Slot
    process: multiprocessing.process.BaseProcess


class Queue(Protocol):
    """Which job is next."""

    def take(self) -> Job | None:
        """The next job to start; None if there is none now."""

    def to_pause(self) -> list[Job]:
        """The running jobs that should stop."""

    def ended(self, job: Job) -> None:
        """Called for each job that was taken, once it has a summary."""

    def to_come(self) -> int:
        """How many jobs will be added that the sweep does not have yet."""


class Given:
    """The jobs of a grid, in order, without those that are over."""

    def __init__(self, sweep: Sweep, jobs: list[Job], pool: Pool):
        retry = pool.retry_failed
        self.waiting = [job for job in jobs if is_to_run(sweep, job, retry_failed=retry)]

    def take(self) -> Job | None:
        return self.waiting.pop(0) if self.waiting else None

    def to_pause(self) -> list[Job]:
        return []

    def ended(self, job: Job) -> None:
        pass

    def to_come(self) -> int:
        return 0


def run_pool(sweep: Sweep, queue: Queue, pool: Pool, command: list[str]) -> int:
    """The exit code: 0 if all jobs are done or paused, 1 if not, 130 if the sweep was stopped."""
    slots, given_up = pool.slots(), False
    with (
        noting_signals(*signals_heard()) as signals,
        Table(sweep) as table,
        JobProcesses(sweep, command) as started,
    ):
        while True:
            if not signals and not given_up:
                started.fill(slots, queue)
            if not started.running:
                break
            time.sleep(LOOK_EVERY)
            for job in started.ended():
                queue.ended(job)
                progress = sweep.progress(job)
                table.ended(job, progress)
                given_up = given_up or (pool.on_fail is OnFail.stop and progress.state in TROUBLED)
            table.show([each.job for each in started.running], queue.to_come())
            started.stop(queue.to_pause())
            if signals:
                started.stop(
                    [each.job for each in started.running], at_once=signals.count(signals[0]) > 1
                )
    if signals:
        return STOPPED
    states = [sweep.progress(job).state for job in sweep.jobs()]
    return int(any(state not in (State.done, State.paused) for state in states))


def wait_for_earlier(sweep: Sweep) -> None:
    """Waits for jobs that an earlier start still runs: they stop soon, but hold a GPU till then."""
    told = False
    while held := [job.name for job in sweep.jobs() if is_locked(sweep.folder / job.name)]:
        if not told:
            names = ", ".join(f"{name} ({record.user_of(sweep.folder / name)})" for name in held)
            print(f"sweep   waits for jobs of an earlier start to stop: {names}", flush=True)
        told = True
        time.sleep(LOOK_EVERY)


class JobProcesses:
    """The processes of the jobs."""

    def __init__(self, sweep: Sweep, command: list[str]):
        self.sweep, self.command, self.running, self.told_to_stop = sweep, command, [], set()
        # CUDA cannot be used in a fork of a process that has asked for the GPU. What the server
        # imports does not ask (tests/runs/test_pool.py); that was never tried beside a real GPU.
        self.forked = not visible_gpus()
        self.context = multiprocessing.get_context("forkserver" if self.forked else "spawn")
        os.environ["PYTHONPATH"] = processes.python_path()  # for the server and the jobs

    def __enter__(self) -> JobProcesses:
        # The jobs hold one end of this pipe. When this process ends, the other end closes.
        self.jobs_end, self.own_end = self.context.Pipe(duplex=False)
        if self.forked:
            self.context.set_forkserver_preload(["cogvx.runs.preloaded"])
            with processes.ignoring_terminal():
                forkserver.ensure_running()
        return self

    def __exit__(self, *error: object) -> None:
        self.own_end.close()
        self.jobs_end.close()

    def fill(self, slots: list[Slot], queue: Queue) -> None:
        """Starts a job on every free slot, while there are jobs."""
        taken = {each.slot.number for each in self.running}
        for slot in slots:
            if slot.number in taken:
                continue
            job = queue.take()
            if job is None:
                return
            self.start(job, slot)

    def start(self, job: Job, slot: Slot) -> None:
        folder = self.sweep.folder / job.name
        (folder / record.SUMMARY).unlink(missing_ok=True)  # of an earlier, unfinished start
        given = (str(folder), self.command, slot.gpus, slot.threads, self.jobs_end)
        self.running.append(Running(job, slot, self.started(given)))

    def started(self, given: tuple) -> multiprocessing.process.BaseProcess:
        """UserError if the server that jobs are forked from is killed again and again."""
        for _ in range(START_TRIES):
            process = self.context.Process(target=run_pool_job, args=given)
            try:
                with processes.ignoring_terminal():
                    process.start()
            # It ended before it said which process it had started.
            except (EOFError, ConnectionError):
                print(
                    f"warning the server that starts jobs was killed, {processes.KILLED_BY}",
                    file=sys.stderr,
                )
            else:
                return process
        raise UserError(
            f"the server that starts jobs was killed {START_TRIES} times. Jobs that run go on to "
            f"their checkpoints. Fewer at a time need less memory: hydra.launcher.jobs=1"
        )

    def ended(self) -> list[Job]:
        """The jobs that ended since the last call; each has a summary.

        A job whose folder is locked still runs, even if the server that would report its end
        was killed.
        """
        over = [each for each in self.running if not each.process.is_alive()]
        found = [each for each in over if not is_locked(self.sweep.folder / each.job.name)]
        for each in found:
            self.running.remove(each)
            record_end(self.sweep.folder / each.job.name, each.process.exitcode)
        return [each.job for each in found]

    def stop(self, jobs: list[Job], *, at_once: bool = False) -> None:
        """Asks each of these jobs once to stop with a checkpoint, or kills them."""
        for each in [each for each in self.running if each.job in jobs]:
            with suppress(ProcessLookupError):
                if at_once:
                    os.killpg(each.process.pid, signal.SIGKILL)
                elif each.process.pid not in self.told_to_stop:
                    self.told_to_stop.add(each.process.pid)
                    os.kill(each.process.pid, signal.SIGTERM)


# -- in a job's process --------------------------------------------------------------------------


def run_pool_job(
    folder: str, command: list[str], gpus: list[str], threads: int | None, jobs_end: Connection
) -> None:
    os.setsid()
    log = os.open(Path(folder) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    threading.Thread(target=stop_with_sweep, args=(jobs_end,), daemon=True).start()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)
    sys.exit(run_job(Path(folder), command))


def stop_with_sweep(jobs_end: Connection) -> None:
    """Stops this job, with a checkpoint, when the sweep's process has ended."""
    try:
        jobs_end.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
