"""Runs the jobs of a sweep through one of Hydra's launchers, also on other machines.

[knows Hydra; no torch]

A launcher is given the folder of each job and nothing else: what runs is the config.yaml frozen
there. "Engine" means the launcher's own process on a job's machine. A job is a process below its
engine. So an engine survives a job that crashes, an engine that is used again is unchanged, and
a job stops with a checkpoint when its engine asks it to or has ended.
"""

from __future__ import annotations

import copy
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict, read_write

from cogvx.errors import UserError
from cogvx.files import read_json, shown
from cogvx.records import record
from cogvx.records.sweep import LOG, SWEEP, Job, State, Sweep, is_locked, progress_of
from cogvx.records.table import Table
from cogvx.runs import pool, processes
from cogvx.runs.jobs import LOOK_EVERY, is_to_run, noting_signals, record_end, run_job

ENGINE_FILES = "engine"  # the folder, in the sweep's, for the engine's own files
WATCH_EVERY = 5  # seconds between looks at the jobs' folders, which may lie on another machine
PLUGINS = {
    "submitit_local": "sweeps/requirements-slurm.txt",
    "submitit_slurm": "sweeps/requirements-slurm.txt",
    "ray": "sweeps/requirements-ray.txt",
}
# The function in which a launcher waits for one job after the other. An error that is raised
# there for a killed job would end the wait for the other jobs.
WAITS = {
    "hydra_plugins.hydra_submitit_launcher": ("submitit.core.core", "Job", "results"),
    "hydra_plugins.hydra_ray_launcher": ("ray", None, "get"),
}


def require_plugin(missing: str | None) -> None:
    """UserError if the option that Hydra misses comes with a plugin."""
    name = (missing or "").removeprefix("hydra/launcher/")
    if name in PLUGINS:
        raise UserError(
            f"hydra/launcher={name} needs a plugin of Hydra that is not installed: "
            f"pip install -r {PLUGINS[name]}"
        )


def are_asked(base: DictConfig) -> bool:
    """Whether the composed settings ask for one of Hydra's launchers instead of our pool."""
    return base.hydra.launcher.get("_target_") != f"{pool.Pool.__module__}.{pool.Pool.__name__}"


def launcher(sweep: Sweep, base: DictConfig) -> Launcher:
    """The launcher that the composed settings ask for, to start frozen jobs."""
    with read_write(base), open_dict(base):
        base.hydra.sweep.dir, base.hydra.sweep.subdir = str(sweep.folder / ENGINE_FILES), "."
        base.hydra.job.name = sweep.folder.name  # in Slurm's queue
    context = HydraContext(config_loader=Frozen(), callbacks=Callbacks())
    try:
        return Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=start_job, config=base
        )
    except (HydraException, RuntimeError, AssertionError) as error:
        target = base.hydra.launcher.get("_target_")
        raise UserError(f"hydra/launcher: {target} cannot be used: {error}") from error


class Frozen:
    """Stands in for Hydra's loader, which would compose each job again from today's YAML."""

    def load_sweep_config(self, base: DictConfig, overrides: list[str]) -> DictConfig:
        composed = copy.deepcopy(base)
        composed.output_dir = overrides[0].partition("=")[2]
        return composed


def run_with_launcher(sweep: Sweep, jobs: list[Job], launcher: Launcher) -> int:
    """Runs the jobs that are not over; the exit code is 0 if all jobs are done, else 1."""
    waiting = [job for job in jobs if is_to_run(sweep, job, retry_failed=False)]
    with Table(sweep) as table, watching(sweep, jobs, table):
        for job, complaint in zip(waiting, launch(sweep, waiting, launcher), strict=True):
            report_complaint(sweep, job, complaint)
    return int(any(sweep.progress(job).state is not State.done for job in jobs))


def launch(sweep: Sweep, jobs: list[Job], launcher: Launcher) -> list[str | None]:
    """Waits until all jobs are over; for each, the engine's complaint or None."""
    if not jobs:
        return []
    os.environ["PYTHONPATH"] = processes.python_path()  # for the jobs
    overrides = [[f"output_dir={sweep.folder / job.name}"] for job in jobs]
    try:
        with waiting_for_all(launcher):
            outcomes = launcher.launch(overrides, initial_job_idx=0)
        return [complaint_of(outcome) for outcome in outcomes]
    except KeyboardInterrupt:
        print(
            f"\nnot waiting any longer; jobs in a queue or on other machines go on "
            f"(Slurm: scancel --name={sweep.folder.name})",
            file=sys.stderr,
        )
        raise
    except Exception as error:  # the plugins raise errors of many kinds
        return [error_of_engine(error)] * len(jobs)


@contextmanager
def waiting_for_all(launcher: Launcher) -> Iterator[None]:
    """An error that a launcher's wait for one job raises becomes that job's result."""
    package = type(launcher).__module__
    found = next((place for name, place in WAITS.items() if package.startswith(name)), None)
    if found is None:
        yield
        return
    module, class_name, name = found
    owner = importlib.import_module(module)
    owner = owner if class_name is None else getattr(owner, class_name)
    original = getattr(owner, name)

    def with_errors_as_results(*arguments: object) -> object:
        try:
            return original(*arguments)
        except Exception as error:
            return [error]

    setattr(owner, name, with_errors_as_results)
    try:
        yield
    finally:
        setattr(owner, name, original)


def complaint_of(outcome: object) -> str | None:
    outcome = outcome[0] if isinstance(outcome, list) else outcome
    if not isinstance(outcome, JobReturn):
        return error_of_engine(outcome)
    failed = outcome.status is JobStatus.FAILED
    return error_of_engine(outcome._return_value) if failed else None


def error_of_engine(error: object) -> str:
    """The error's first two lines, or the last of a traceback's.

    submitit says in the second line how Slurm calls the job's end.
    """
    lines = [line for line in str(error).splitlines() if line.strip("- ")]
    told = lines[-1:] if "Traceback" in str(error) else lines[:2]
    return f"{type(error).__name__}: {' '.join(told)}"


def report_complaint(sweep: Sweep, job: Job, complaint: str | None) -> None:
    """Prints why a job was not started. Writes the summary of one killed with its engine."""
    progress = sweep.progress(job)
    if progress.state is State.killed and not progress.summary:
        reason = f"{complaint or 'killed, with its engine'}; see {LOG}"
        record.finish(sweep.folder / job.name, {"status": State.killed.name, "reason": reason})
    elif progress.state is State.pending:
        files = shown(sweep.folder / ENGINE_FILES)
        print(
            f"error: {job.name} was not started: {complaint}; the engine's own logs are in {files}",
            file=sys.stderr,
        )
    elif complaint is not None:
        print(f"warning {job.name}: {complaint}", file=sys.stderr)


# -- watching the jobs from here -----------------------------------------------------------------


@contextmanager
def watching(sweep: Sweep, jobs: list[Job], table: Table) -> Iterator[None]:
    """Shows the table from a thread of its own: the launcher holds this one until all is over."""
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(sweep, jobs, table, over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def watch(sweep: Sweep, jobs: list[Job], table: Table, over: threading.Event) -> None:
    """A job that its engine starts again ends more than once."""
    states, last = {job.name: sweep.progress(job).state for job in jobs}, False
    while not last:
        last = over.wait(WATCH_EVERY)
        for job in jobs:
            progress = sweep.progress(job)
            if progress.summary and progress.state not in (State.running, states[job.name]):
                table.ended(job, progress)
            states[job.name] = progress.state
        table.show([job for job in jobs if states[job.name] is State.running])


# -- on a job's machine --------------------------------------------------------------------------


def start_job(composed: DictConfig) -> None:
    """The launcher's task function: runs a job as a process, and passes on requests to stop."""
    folder = Path(composed.output_dir)
    # An earlier start may have lost its engine and still write its last checkpoint, or an
    # earlier command may have queued the same job.
    while is_locked(folder):
        time.sleep(LOOK_EVERY)
    if progress_of(folder).state.is_over():
        return
    (folder / record.SUMMARY).unlink(missing_ok=True)  # of an earlier, unfinished start
    command = [sys.executable, "-m", "cogvx.runs.engines", str(folder)]
    environment = {**os.environ, "PYTHONPATH": processes.python_path()}
    with (folder / LOG).open("ab") as log, noting_signals(*signals()) as received:
        job = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        with job.stdin:
            code = wait_or_stop(job, received)
    record_end(folder, code)
    if received:
        # Now to the engine, which may put the job back into its queue.
        signal.raise_signal(received[0])
        sys.exit(128 + received[0])


def signals() -> list[int]:
    """The signals that ask a job to stop.

    submitit's SIGUSR2 (the time is nearly up) counts only where the engine has a handler for it.
    """
    users = (signal.SIGUSR1, signal.SIGUSR2)
    handled = [number for number in users if callable(signal.getsignal(number))]
    return [signal.SIGINT, signal.SIGTERM, *handled]


def wait_or_stop(job: subprocess.Popen, received: list[int]) -> int:
    """Waits for the job; asks it to stop, once, when a signal has come. Returns its exit code."""
    terminated = False
    while job.poll() is None:
        if received and not terminated:
            job.terminate()
            terminated = True
        time.sleep(LOOK_EVERY)
    return job.returncode


def run_job_of_engine(folder: Path) -> int:
    # Slurm may send the engine's signals to all of its processes.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=processes.stop_with_parent, daemon=True).start()
    return run_job(folder, read_json(folder.parent / SWEEP)["command"])


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(run_job_of_engine(Path(sys.argv[1])))
