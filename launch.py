"""Compose the settings, check them, record them, run them.    python launch.py --help

Hydra composes the settings. cogvx.config checks them. The run's folder gets them as config.yaml,
and the task runs from that file. Nothing here imports torch: a mistake costs a second.
"""

# First: what is registered first runs last at exit.
from cogvx import leaving  # isort: split

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import yaml

# Hydra then raises its errors, which are put in words below, instead of printing them.
os.environ["HYDRA_FULL_ERROR"] = "1"

import hydra
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from cogvx import command_line, compose
from cogvx import config as configuration
from cogvx.errors import UserError, lacking
from cogvx.files import remove_left_over, shown
from cogvx.records import comparison, heartbeats, live, record, report
from cogvx.records.pages import PAGE
from cogvx.runs import engines, grid, pool, processes, translate
from cogvx.runs.pool import STOPPED
from cogvx.start import require_ready, start_task

TYPED = list(sys.argv)  # the command, for the record


def entry(arguments: list[str]) -> int:
    """Runs a command line and returns the exit code: 2, and no traceback, for a user's mistake."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            complete(arguments)
            command = translate.translated(arguments, Path(scratch))
            try:
                return sweep(command) if command.sweeping and not command.shows else single(command)
            except configuration.HYDRAS as error:
                return say(command_line.explain(error, command.examples(), command.composer))
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return STOPPED
        except UserError as error:
            return say(error)
        except yaml.YAMLError as error:
            return say(f"a YAML file cannot be parsed: {error}")
        # Such as a full disk, or too little memory.
        except (OSError, MemoryError, RuntimeError) as error:
            message, code = processes.explained(error)
            if code != processes.FAILED:
                raise
            return say(message)


def say(error: object) -> int:
    print(f"error: {leaving.printable(str(error))}", file=sys.stderr)
    return processes.FAILED


def warn(composed: DictConfig) -> None:
    warning = configuration.shortened_warmup(composed)
    if warning is not None:
        print(f"warning {warning}", flush=True)


def complete(arguments: list[str]) -> None:
    """Prints what completes `sweep=`. Hydra completes all the rest."""
    if "query=bash" in arguments and {"-sc", "--shell-completion"} & {*arguments}:
        found = translate.completions(os.environ.get("COMP_LINE", ""))
        if found is not None:
            print(" ".join(found), end=" ")


# -- one run ------------------------------------------------------------------------------------


def single(command: translate.Command) -> int:
    """Hands the command to Hydra, which composes the settings, or only shows them."""
    codes = []

    @hydra.main(config_path=str(configuration.CONF), config_name="config", version_base="1.3")
    def main(composed: DictConfig) -> None:
        # Hydra adds a line of its own to an error that leaves this function.
        try:
            config = compose.checked_by_hydra(composed)
            warn(composed)
            codes.append(run(config, command.record))
        except UserError as error:
            codes.append(say(error))

    sys.argv = [sys.argv[0], *command.arguments]
    main()
    return max(codes, default=0)


def run(config: configuration.Config, repeated: Path | None) -> int:
    """Records the configuration in the run's folder and runs it. repeated: the run it repeats."""
    if not config.task.makes_a_run:
        return start_task(config, Path()).get("exit_code", 0)
    if config.output_dir is None or not (config.output_dir / record.CONFIG).is_file():
        require_ready(config)
    folder = record.make_folder(config)
    summary = record.finished(folder)
    if summary is not None:
        record.settle_configuration(folder, config)
        return nothing_to_do(folder, summary)
    with record.locked(folder) as lock:
        record.settle_configuration(folder, config)
        print(
            f"run     {shown(folder)}\npage    {shown(folder / PAGE)} follows the run", flush=True
        )
        record.environment(folder, TYPED, repeated)
        with live.following(folder):
            return processes.run_recorded(folder, lock)


def nothing_to_do(folder: Path, summary: dict) -> int:
    """For a run that is done. A kill just before the end may have left something to do."""
    # An archive may not be written to.
    with contextlib.suppress(OSError):
        remove_left_over(folder)
        heartbeats.forget_beats(folder)
        if summary_is_newer(folder):
            report.write_page(folder)
    loss = summary.get("objective")
    result = "" if loss is None else f" Its held-out loss is {loss:.4f}."
    if record.is_imported(folder):
        result = f" It was imported. To train on: {record.HOW_TO_TRAIN_ON}"
    print(f"{shown(folder)} is finished: nothing to do.{result}")
    return 0


def summary_is_newer(folder: Path) -> bool:
    page = folder / PAGE
    written = page.stat().st_mtime if page.is_file() else 0
    return written < (folder / record.SUMMARY).stat().st_mtime


# -- a sweep ------------------------------------------------------------------------------------


def sweep(command: translate.Command) -> int:
    """Composes, checks and records all jobs before the first one starts.

    For a search, the jobs at the ends of its ranges are checked.
    """
    overrides, composer = command.overrides(), command.composer
    if any(override.startswith("hydra.sweep.") for override in overrides):
        raise UserError(
            "hydra.sweep is not used here: output_dir=... is the folder of a sweep, and the folder "
            "of a job is named by its values"
        )
    try:
        planned, jobs, base = grid.sweep_of(overrides, composer)
    except MissingConfigException as error:
        engines.require_plugin(error.missing_cfg_file)
        raise
    searching, elsewhere = grid.is_search(base), engines.are_asked(base)
    if searching and elsewhere:
        raise UserError(
            "hydra/sweeper=optuna needs hydra/launcher=pool: it proposes jobs as others run"
        )
    if searching and (missing := lacking("optuna", "hydra/sweeper=optuna")):
        raise UserError(missing[0])
    launcher = (
        engines.launcher(planned, base)
        if elsewhere
        else pool.Pool.read(OmegaConf.to_container(base.hydra.launcher))
    )
    warn(base)
    for caution in grid.cautions(jobs, planned.swept):
        print(f"warning {caution}", flush=True)
    # A cluster's machines see other files and have other GPUs than this one.
    if not elsewhere and not planned.folder.exists():
        for _, config in jobs:
            require_ready(config)
    make_folder(planned.folder)
    with record.locked(planned.folder), live.following(planned.folder):
        remove_left_over(planned.folder)
        planned.freeze([] if searching else jobs, TYPED)
        if elsewhere:
            code = engines.run_with_launcher(planned, [job for job, _ in jobs], launcher)
        else:
            pool.wait_for_earlier(planned)
            if searching:
                queue = grid.search_of(overrides, composer, planned, base, launcher, TYPED)
            else:
                queue = pool.Given(planned, [job for job, _ in jobs], launcher)
            code = pool.run_pool(planned, queue, launcher, TYPED)
        comparison.conclude(planned)
    return code


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the sweep's folder {folder} cannot be written: {error.strerror}. "
            f"Choose another: output_dir=/disk/with/space"
        ) from error


if __name__ == "__main__":
    leaving.outlast_readers()
    try:
        leaving.leave(entry(sys.argv[1:]))
    except KeyboardInterrupt:  # a second one, while the first was handled
        leaving.leave(STOPPED)
