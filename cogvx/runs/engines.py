"""Runs the jobs of a sweep through one of Hydra's launchers, on as many machines as that has.   [knows Hydra; no torch]

A launcher is told the folder of each job and nothing else: what runs is the config.yaml that is frozen there. On its machine a job is a
process of its own below the engine's: one that crashes or is killed leaves the engine alive to say so, engines that use a process again
find it as it was, and a job whose engine asks it to stop, or is gone, stops with a checkpoint.
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

FILES = "engine"  # in the sweep's folder: what the engine keeps of its own
LOOKS_EVERY = 5  # seconds between looks at the jobs' folders, which may lie on another machine
PLUGINS = {
    "submitit_local": "sweeps/requirements-slurm.txt",
    "submitit_slurm": "sweeps/requirements-slurm.txt",
    "ray": "sweeps/requirements-ray.txt",
}
# Where a launcher waits for one job after the other; what is raised there for a job that was killed would end its wait for the others.
WAITS = {
    "hydra_plugins.hydra_submitit_launcher": ("submitit.core.core", "Job", "results"),
    "hydra_plugins.hydra_ray_launcher": ("ray", None, "get"),
}


def require_plugin(missing: str | None) -> None:
    """UserError when the option that Hydra misses comes with a plugin."""
    name = (missing or "").removeprefix("hydra/launcher/")
    if name in PLUGINS:
        raise UserError(
            f"hydra/launcher={name} needs a plugin of Hydra that is not installed: pip install -r {PLUGINS[name]}"
        )


def are_asked(base: DictConfig) -> bool:
    return base.hydra.launcher.get("_target_") != f"{pool.Pool.__module__}.{pool.Pool.__name__}"


def launcher(sweep: Sweep, base: DictConfig) -> Launcher:
    """The launcher that the composed settings ask for, to start jobs that are frozen."""
    with read_write(base), open_dict(base):
        base.hydra.sweep.dir, base.hydra.sweep.subdir = str(sweep.folder / FILES), "."
        base.hydra.job.name = sweep.folder.name  # in Slurm's queue
    context = HydraContext(config_loader=Frozen(), callbacks=Callbacks())
    try:
        return Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=start, config=base
        )
    except (HydraException, RuntimeError, AssertionError) as error:
        raise UserError(
            f"hydra/launcher: {base.hydra.launcher.get('_target_')} cannot be used: {error}"
        ) from error


class Frozen:
    """In the place of Hydra's loader of configurations, which would compose a job again from the YAML of that day."""

    def load_sweep_config(self, base: DictConfig, overrides: list[str]) -> DictConfig:
        composed = copy.deepcopy(base)
        composed.output_dir = overrides[0].partition("=")[2]
        return composed


def run(sweep: Sweep, jobs: list[Job], launcher: Launcher) -> int:
    """Runs those that are not over; the exit code: 0 when all are done, 1 when some are not."""
    waiting = [job for job in jobs if pool.is_to_run(sweep, job, retry_failed=False)]
    with Table(sweep) as table, watched(sweep, jobs, table):
        for job, complaint in zip(waiting, launch(sweep, waiting, launcher), strict=True):
            tell(sweep, job, complaint)
    return int(any(sweep.progress(job).state is not State.done for job in jobs))


def launch(sweep: Sweep, jobs: list[Job], launcher: Launcher) -> list[str | None]:
    """Of each job, when all are over, what the engine has to complain of."""
    if not jobs:
        return []
    os.environ["PYTHONPATH"] = processes.python_path()  # the jobs'
    try:
        with waiting_for_all(launcher):
            outcomes = launcher.launch(
                [[f"output_dir={sweep.folder / job.name}"] for job in jobs], initial_job_idx=0
            )
        return [complaint(outcome) for outcome in outcomes]
    except KeyboardInterrupt:
        print(
            f"\nnot waiting any longer; jobs in a queue or on other machines go on (Slurm: scancel --name={sweep.folder.name})",
            file=sys.stderr,
        )
        raise
    except Exception as error:  # of whatever kind the plugin has
        return [in_words(error)] * len(jobs)


@contextmanager
def waiting_for_all(launcher: Launcher) -> Iterator[None]:
    """What a launcher's wait for a job raises becomes its result."""
    place = next(
        (WAITS[package] for package in WAITS if type(launcher).__module__.startswith(package)), None
    )
    if place is None:
        yield
        return
    module, owner, name = place
    owner = (
        importlib.import_module(module)
        if owner is None
        else getattr(importlib.import_module(module), owner)
    )
    ask = getattr(owner, name)

    def answer(*arguments: object) -> object:
        try:
            return ask(*arguments)
        except Exception as error:
            return [error]

    setattr(owner, name, answer)
    try:
        yield
    finally:
        setattr(owner, name, ask)


def complaint(outcome: object) -> str | None:
    outcome = outcome[0] if isinstance(outcome, list) else outcome
    if isinstance(outcome, JobReturn):
        return in_words(outcome._return_value) if outcome.status is JobStatus.FAILED else None
    return in_words(outcome)


def in_words(error: object) -> str:
    """An error's first lines (submitit says in the second what Slurm calls the job's end), or the last of a traceback's."""
    lines = [line for line in str(error).splitlines() if line.strip("- ")]
    return f"{type(error).__name__}: {' '.join(lines[-1:] if 'Traceback' in str(error) else lines[:2])}"


def tell(sweep: Sweep, job: Job, complaint: str | None) -> None:
    """Sees that there is a summary of a job that was killed together with its engine, and says why one was not started."""
    progress = sweep.progress(job)
    if progress.state is State.killed and not progress.summary:
        reason = f"{complaint or 'killed, with its engine'}; see {LOG}"
        record.finish(sweep.folder / job.name, {"status": State.killed.name, "reason": reason})
    elif progress.state is State.pending:
        files = shown(sweep.folder / FILES)
        print(
            f"error: {job.name} was not started: {complaint}; what the engine says of it is in {files}",
            file=sys.stderr,
        )
    elif complaint is not None:
        print(f"warning {job.name}: {complaint}", file=sys.stderr)


# -- what is seen of the jobs from here --------------------------------------------------------------------------------


@contextmanager
def watched(sweep: Sweep, jobs: list[Job], table: Table) -> Iterator[None]:
    """The launcher holds this thread until all is over."""
    over = threading.Event()
    watching = threading.Thread(target=watch, args=(sweep, jobs, table, over), daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def watch(sweep: Sweep, jobs: list[Job], table: Table, over: threading.Event) -> None:
    """A job that its engine starts again ends more than once."""
    told, last = {job.name: sweep.progress(job).state for job in jobs}, False
    while not last:
        last = over.wait(LOOKS_EVERY)
        for job in jobs:
            progress = sweep.progress(job)
            if progress.summary and progress.state not in (State.running, told[job.name]):
                table.ended(job, progress)
            told[job.name] = progress.state
        table.show([job for job in jobs if told[job.name] is State.running])


# -- on a job's machine ------------------------------------------------------------------------------------------------


def start(composed: DictConfig) -> None:
    """The task function: runs a job as a process of its own, and hands on to it whatever asks the engine to stop."""
    folder = Path(composed.output_dir)
    while is_locked(
        folder
    ):  # by a start that lost its engine and writes its last checkpoint, or was queued by an earlier command
        time.sleep(pool.EVERY)
    if progress_of(folder).state.is_over():
        return
    (folder / record.SUMMARY).unlink(missing_ok=True)  # of an earlier, unfinished start
    with (folder / LOG).open("ab") as log, pool.stopping(*signals()) as asked:
        job = subprocess.Popen(
            [sys.executable, "-m", "cogvx.runs.engines", str(folder)], stdin=subprocess.PIPE, stdout=log, stderr=log,
            env={**os.environ, "PYTHONPATH": processes.python_path()}, start_new_session=True,
        )  # fmt: skip
        with job.stdin:
            code = wait(job, asked)
    pool.tell(folder, code)
    if asked:
        signal.raise_signal(
            asked[0]
        )  # now to the engine, which may put the job back into its queue
        sys.exit(128 + asked[0])


def signals() -> list[int]:
    """Those that ask an engine to stop. Its own (submitit's SIGUSR2: the time is nearly up) only where it has a use for them."""
    own = [
        number for number in (signal.SIGUSR1, signal.SIGUSR2) if callable(signal.getsignal(number))
    ]
    return [signal.SIGINT, signal.SIGTERM, *own]


def wait(job: subprocess.Popen, asked: list[int]) -> int:
    terminated = False
    while job.poll() is None:
        if asked and not terminated:
            job.terminate()
            terminated = True
        time.sleep(pool.EVERY)
    return job.returncode


def follow() -> None:
    """Stops this job, with a checkpoint, when its engine is no more: nothing is ever written to its standard input."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


def work(folder: Path) -> int:
    for number in (
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):  # Slurm may send the engine's signals to all processes
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()
    return pool.attempt(folder, read_json(folder.parent / SWEEP)["command"])


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(work(Path(sys.argv[1])))
