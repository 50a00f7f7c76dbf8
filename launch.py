"""Compose, check, record, run.    python launch.py --help

Hydra composes the settings; cogvx.config checks them; the run's folder gets them as config.yaml; the task runs from that
file. Nothing here imports torch, so that a mistake costs a second.
"""

import os
import sys
import tempfile
from pathlib import Path

import yaml

os.environ["HYDRA_FULL_ERROR"] = (
    "1"  # Hydra raises instead of printing and exiting, so that errors can be put in words
)

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from cogvx import compose as composing
from cogvx import config as configuration
from cogvx.errors import UserError, did_you_mean
from cogvx.files import shown
from cogvx.records import comparison, record
from cogvx.runs import engines, grid, pool, processes
from cogvx.runs.pool import STOPPED
from cogvx.start import start_task

SWEEPS = configuration.PROJECT / "sweeps"
exit_codes: list[int] = []
repeated: list[Path] = []  # the run whose record this one starts from
typed = list(sys.argv)  # the command, for the record


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(composed: DictConfig) -> None:
    choices = {group: HydraConfig.get().runtime.choices[group] for group in configuration.GROUPS}
    try:
        exit_codes.append(run(configuration.check(composed, choices)))
    except (
        UserError
    ) as error:  # caught here: Hydra would print a line of its own before it passes an error on
        exit_codes.append(say(error))


def say(error: object) -> int:
    print(f"error: {error}", file=sys.stderr)
    return processes.FAILED


def run(config: configuration.Config) -> int:
    if not config.task.makes_a_run:
        start_task(config, Path())
        return 0
    folder = record.open_folder(config)
    summary = record.finished(folder)
    if summary is not None:
        loss = summary.get("objective")
        result = "" if loss is None else f" Its held-out loss is {loss:.4f}."
        print(f"{shown(folder)} is finished: nothing to do.{result}")
        return 0
    print(f"run     {shown(folder)}", flush=True)
    with record.locked(folder) as lock:
        record.environment(folder, typed, *repeated)
        return processes.run_recorded(folder, lock)


def run_sweep(overrides: list[str], place: grid.Place) -> int:
    """All jobs are composed, checked and frozen before the first starts; of a search, those at the ends of its ranges are checked."""
    try:
        sweep, jobs, base = grid.sweep_of(overrides, place)
    except MissingConfigException as error:
        engines.require_plugin(error.missing_cfg_file)
        raise
    searching, elsewhere = grid.is_search(base), engines.are_asked(base)
    if searching and elsewhere:
        raise UserError(
            "hydra/sweeper=optuna proposes jobs while others run, which hydra/launcher=pool alone does"
        )
    launcher = (
        engines.launcher(sweep, base)
        if elsewhere
        else pool.Pool.read(OmegaConf.to_container(base.hydra.launcher))
    )
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the sweep's folder {sweep.folder} cannot be written: {error.strerror}. Choose another: output_dir=/disk/with/space"
        ) from error
    with record.locked(sweep.folder):  # the same command in another terminal is told so
        sweep.freeze([] if searching else jobs, typed)
        if elsewhere:
            code = engines.run_with_launcher(sweep, [job for job, _ in jobs], launcher)
        else:
            pool.wait_for_earlier(sweep)
            if searching:
                queue = grid.search_of(overrides, place, sweep, base, launcher, typed)
            else:
                queue = pool.Given(sweep, [job for job, _ in jobs], launcher)
            code = pool.run_pool(sweep, queue, launcher, typed)
        comparison.conclude(sweep)
    return code


def from_record(arguments: list[str], scratch: Path) -> list[str]:
    """Arguments that start from a run's config.yaml, put into Hydra's terms.

    `--config-dir RUN --config-name config`: Hydra would find conf/config.yaml first and train the defaults, so the record
    becomes the primary configuration and conf/ the place of its options. `train.resume=RUN` starts from RUN's record too:
    alone, it goes on in RUN's folder; with changes, or from one of RUN's checkpoints, in a new one. So does task=evaluate task.run=RUN.
    """
    arguments = list(arguments)
    folder = take_option(arguments, "--config-dir", "-cd")
    resume = next((a.split("=", 1)[1] for a in arguments if a.startswith("train.resume=")), "null")
    judged = next((a.split("=", 1)[1] for a in arguments if a.startswith("task.run=")), None)
    if folder is None and resume not in ("auto", "null"):
        folder = str(run_folder_of(Path(resume), "train.resume"))
        if Path(resume).absolute() == Path(folder).absolute() and all(
            a.startswith("train.resume=") for a in arguments
        ):
            arguments.append(f"output_dir={Path(folder).absolute()}")
    if folder is None and judged is not None and "task=report" not in arguments:
        folder = str(run_folder_of(Path(judged), "task.run"))
    if folder is None:
        return arguments
    name = take_option(arguments, "--config-name", "-cn") or "config"
    path = Path(folder) / (name if name.endswith(".yaml") else f"{name}.yaml")
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: --config-dir takes the folder of a run, outputs/RUN, which holds its config.yaml"
        )
    configuration.read(path)
    repeated.append(Path(folder).absolute())
    recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
    if any(a.startswith("experiment=") for a in arguments):
        raise UserError(
            "experiment=... starts from a recipe, and --config-dir or train.resume from a run's record: give one of them"
        )
    for group in configuration.GROUPS:
        if any(a.startswith(f"{group}=") for a in arguments):
            composing.forget(recorded, group)
    if recorded["lora"] is None and any(a.startswith("lora.") for a in arguments):
        recorded["lora"] = yaml.safe_load(
            (configuration.CONF / "config.yaml").read_text(encoding="utf-8")
        )["lora"]
    recorded["train"]["resume"] = None
    recorded["hydra"] = yaml.safe_load(
        (configuration.CONF / "config.yaml").read_text(encoding="utf-8")
    )["hydra"]
    recorded["defaults"] += [
        {"override hydra/launcher": "pool"},
        {"override hydra/job_logging": "none"},
        {"override hydra/hydra_logging": "none"},
    ]
    (scratch / "config.yaml").write_text(
        yaml.safe_dump(recorded, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    arguments.append(f"hydra.searchpath=['{configuration.CONF}']")
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    options = [
        a for a in arguments if a not in overrides
    ]  # argparse wants the overrides in one place
    return ["--config-path", str(scratch), *options, *overrides]


def run_folder_of(place: Path, setting: str) -> Path:
    """The run that a folder or one of its checkpoints belongs to."""
    for folder in (place, place.parent.parent):
        if (folder / record.CONFIG).is_file():
            return folder
    raise UserError(
        f"{setting}={place}: no run's folder (it would hold {record.CONFIG}) and no checkpoint of one"
    )


def take_option(arguments: list[str], *names: str) -> str | None:
    """Removes `--option value` or `--option=value`; returns the value."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name not in names:
            continue
        if equals:
            del arguments[index]
            return value
        if index + 1 == len(arguments):
            raise UserError(f"{argument} needs a value")
        value = arguments[index + 1]
        del arguments[index : index + 2]
        return value
    return None


def named_sweep(arguments: list[str]) -> list[str]:
    """sweep=NAME in Hydra's terms: sweeps/NAME.yaml is an option of a group named as the folder is."""
    name = next((a.partition("=")[2] for a in arguments if a.startswith("sweep=")), None)
    if name is None:
        return arguments
    there = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
    if name not in there:
        raise UserError(
            f"sweep={name}: there is no such sweep{did_you_mean(name, there)} sweeps/ has {', '.join(there)}"
        )
    if any(a.startswith(("--config-dir", "-cd", "train.resume=", "task.run=")) for a in arguments):
        raise UserError(
            "sweep=NAME starts from conf/, and --config-dir, train.resume and task.run from a run's record: give one of them"
        )
    others = [a for a in arguments if not a.startswith("sweep=")]
    return [*others, f"hydra.searchpath=['{configuration.PROJECT}']", f"+sweeps={name}"]


SHOWING = {
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--help",
    "-h",
    "--hydra-help",
    "--resolve",
    "--package",
    "-p",
}


def entry(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code. What a user can mend is said without a traceback, with exit code 2."""
    with tempfile.TemporaryDirectory() as scratch:
        place, overrides = grid.Place(), arguments
        named = any(a.startswith("sweep=") for a in arguments)
        sweeping = named or bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments))
        try:
            translated = from_record(named_sweep(arguments), Path(scratch))
            translated = [composing.as_text(argument, sweeping=sweeping) for argument in translated]
            if translated and translated[0] == "--config-path":
                place = grid.Place(Path(scratch), (str(configuration.CONF),))
            elif named:
                place = grid.Place(searchpath=(str(configuration.PROJECT),))
            overrides = [
                a
                for a in translated
                if not a.startswith(("-", "hydra.searchpath", "hydra.mode")) and "=" in a
            ]
            if sweeping and not SHOWING & set(arguments):
                require_known(translated, overrides)
                return run_sweep(overrides, place)
            sys.argv = [sys.argv[0], *translated]
            main()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return STOPPED
        except UserError as error:
            return say(error)
        except yaml.YAMLError as error:
            return say(f"a YAML file cannot be parsed: {error}")
        except configuration.HYDRAS as error:
            return say(
                composing.explain(
                    error, overrides, place.folder, place.searchpath, sweeping=sweeping
                )
            )
        except OSError as error:  # a full disk, a folder that cannot be written; some of Hydra's are of this kind too
            message, code = processes.explained(error)
            if code != processes.FAILED:
                raise
            return say(message)
    return max(exit_codes, default=0)


def require_known(translated: list[str], overrides: list[str]) -> None:
    """A sweep does not pass through Hydra's own command line, which would name what it does not know."""
    options = {"-m", "--multirun", "--config-path", *overrides}
    scratch = translated[1] if translated and translated[0] == "--config-path" else None
    unknown = [
        a
        for a in translated
        if a not in options
        and a != scratch
        and not a.startswith(("hydra.searchpath=", "hydra.mode="))
    ]
    if any(a.startswith("hydra.sweep.") for a in overrides):
        raise UserError(
            "hydra.sweep is not used here: the folder of a sweep is output_dir=..., that of a job follows from its values"
        )
    if unknown:
        raise UserError(
            f"unrecognized arguments: {' '.join(unknown)}. Settings are written KEY=VALUE"
        )


if __name__ == "__main__":
    try:
        sys.exit(entry(sys.argv[1:]))
    except KeyboardInterrupt:  # a second one, while the first was dealt with
        sys.exit(STOPPED)
