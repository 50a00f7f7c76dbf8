"""From what a user types to what Hydra understands: records, sweep=NAME, quotes.   [no torch]"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from cogvx import compose as composing
from cogvx import config as configuration
from cogvx.command_line import SHOW, require_key_value
from cogvx.compose import Composer
from cogvx.errors import UserError, did_you_mean
from cogvx.files import write_text
from cogvx.groups import GROUPS
from cogvx.inference.chat import KEY
from cogvx.records import record
from cogvx.wording import unknown_option

SWEEPS = configuration.PROJECT / "sweeps"
# A key goes to these without a question.
LOCAL_SERVER = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?(/|$)")
MULTIRUN = {"-m", "--multirun", "hydra.mode=MULTIRUN"}


@dataclass(frozen=True)
class Command:
    """A command line, translated."""

    arguments: list[str]  # for Hydra
    composer: Composer
    sweeping: bool
    shows: bool  # --cfg, --help and the like: nothing is run
    record: Path | None  # the run from whose record this one starts

    def overrides(self) -> list[str]:
        return [
            argument
            for argument in self.arguments
            if "=" in argument and not argument.startswith(("-", "hydra.searchpath", "hydra.mode"))
        ]

    def examples(self) -> list[str]:
        """The overrides of a sweep with the first value of each, to find out what is wrong."""
        overrides = self.overrides()
        return [composing.first_value(o) for o in overrides] if self.sweeping else overrides


def translated(arguments: list[str], scratch: Path) -> Command:
    """UserError names everything that is not KEY=VALUE. scratch: an empty folder."""
    arguments = without_dashes(arguments)
    require_key_value(arguments)
    require_options(arguments)
    arguments, places = without_searchpath(arguments)
    name = value_of(arguments, "sweep")
    sweeping = name is not None or bool(MULTIRUN & {*arguments})
    folder, path = configuration.CONF, None
    if name is not None:
        arguments = named_sweep(name, arguments)
        places = (*places, str(configuration.PROJECT))
    else:
        arguments, path = recorded_file(arguments)
    if path is not None:
        write_primary(path, arguments, scratch)
        folder, places = scratch, (*places, str(configuration.CONF))
        arguments = ["--config-path", str(scratch), *arguments]
    composer = Composer(folder, places)
    if places:
        arguments = options_first([*arguments, composing.searchpath_of(places)])
    return Command(
        [composing.quoted(argument, sweeping=sweeping) for argument in arguments],
        composer,
        sweeping,
        shows=any(argument.partition("=")[0] in SHOW for argument in arguments),
        record=None if path is None else path.parent.absolute(),
    )


def without_dashes(arguments: list[str]) -> list[str]:
    """--lora.rank=16 as lora.rank=16: wandb's agents write settings like this."""
    known = {*composing.settings(), *GROUPS, "experiment"}
    return [
        argument.removeprefix("--") if argument[2:].partition("=")[0] in known else argument
        for argument in arguments
    ]


def without_searchpath(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The other arguments, and the folders of options that hydra.searchpath names."""
    places = composing.searchpath_in(arguments)
    return [a for a in arguments if not a.startswith("hydra.searchpath=")], places


def require_options(arguments: list[str]) -> None:
    """Hydra would take `tracking=null` for a removed group."""
    for group in GROUPS:
        if value_of(arguments, group) in ("null", "None", ""):
            raise UserError(unknown_option(group, None))


def value_of(arguments: list[str], key: str) -> str | None:
    """VALUE of KEY=VALUE, None if the key is not given."""
    return next((a.partition("=")[2] for a in arguments if a.startswith(f"{key}=")), None)


def sweep_names() -> list[str]:
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def named_sweep(name: str, arguments: list[str]) -> list[str]:
    """sweep=NAME for Hydra: sweeps/NAME.yaml is an option of a group that is called sweeps."""
    if name not in sweep_names():
        raise UserError(
            f"sweep={name}: there is no such sweep{did_you_mean(name, sweep_names())} "
            f"sweeps/ has {', '.join(sweep_names())}"
        )
    if any(a.startswith(("--config-dir", "-cd", "train.resume=", "task.run=")) for a in arguments):
        raise UserError(
            "sweep=NAME starts from conf/; --config-dir, train.resume and task.run start from the "
            "record of a run. Give one of them"
        )
    others = [argument for argument in arguments if not argument.startswith("sweep=")]
    return [*others, f"+sweeps={name}"]


# -- starting from the record of a run ----------------------------------------------------------


def recorded_file(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without those that name a record, and the record's file.

    A record is named by `--config-dir RUN --config-name config`; by `train.resume=RUN`, which goes
    on in RUN's folder, or, with other settings or from a checkpoint, in a new one; and by
    `task=evaluate task.run=RUN`. None: the run starts from conf/.
    """
    arguments = list(arguments)
    folder = take_option(arguments, "--config-dir", "-cd")
    resume = value_of(arguments, "train.resume")
    judged = value_of(arguments, "task.run")
    if folder is None and resume not in (None, "auto", "null"):
        folder = str(run_folder_of(Path(resume), "train.resume"))
        alone = all(argument.startswith("train.resume=") for argument in arguments)
        if alone and Path(resume).absolute() == Path(folder).absolute():
            arguments.append(f"output_dir={Path(folder).absolute()}")
    reads_only = {"task=report", "task=doctor"} & {*arguments}
    if folder is None and judged is not None and not reads_only:
        folder = str(run_folder_of(Path(judged), "task.run"))
    if folder is None:
        return arguments, None
    name = take_option(arguments, "--config-name", "-cn") or "config"
    path = Path(folder) / (name if name.endswith(".yaml") else f"{name}.yaml")
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: --config-dir takes the folder of a run, such as outputs/RUN, "
            f"which holds its config.yaml"
        )
    return arguments, path


def write_primary(path: Path, arguments: list[str], scratch: Path) -> None:
    """Writes the record to scratch/config.yaml, as the file that Hydra starts from.

    In the run's own folder Hydra would not read it: conf/config.yaml comes first there.
    """
    configuration.read(path)
    if value_of(arguments, "experiment") is not None:
        raise UserError(
            "experiment=... starts from a recipe; --config-dir and train.resume start from the "
            "record of a run. Give one of them"
        )
    recorded = configuration.read_record(path)
    defaults = yaml.safe_load((configuration.CONF / "config.yaml").read_text(encoding="utf-8"))
    for group in GROUPS:
        if value_of(arguments, group) is not None:
            composing.forget(recorded, group)
    require_own_servers(path, recorded.get("task", {}), arguments)
    if recorded["lora"] is None and any(a.startswith("lora.") for a in arguments):
        recorded["lora"] = defaults["lora"]
    else:
        follow_again(recorded, defaults, arguments)
    recorded["train"]["resume"] = None
    recorded["hydra"] = defaults["hydra"]
    # Not what else may stand in the list: Hydra would load it.
    chosen = [{group: option} for group, option in configuration.choices_of(recorded).items()]
    recorded["defaults"] = [*chosen, "_self_"]
    recorded["defaults"] += [
        entry for entry in defaults["defaults"] if "override hydra/" in str(entry)
    ]
    text = yaml.safe_dump(recorded, sort_keys=False, allow_unicode=True)
    write_text(scratch / "config.yaml", text)


def require_own_servers(path: Path, task: dict, arguments: list[str]) -> None:
    """UserError if a key of this user would go to a server that only the record names."""
    for name in ("captioner_url", "expander_url", "enhancer_url"):
        url = task.get(name)
        elsewhere = url is not None and not LOCAL_SERVER.match(str(url))
        if elsewhere and os.environ.get(KEY) and value_of(arguments, f"task.{name}") is None:
            raise UserError(
                f"{path} has task.{name}={url}, and this server would get your {KEY}. If you know "
                f"it, type its address too: task.{name}={url}. If not: env -u {KEY} python ..."
            )


def follow_again(recorded: dict, defaults: dict, arguments: list[str]) -> None:
    """What follows another setting by default, and did in the record, follows its new value.

    lora_alpha follows rank: with an alpha that stays, another rank would change the strength.
    """
    for key, default in configuration.flat({"lora": defaults["lora"]}).items():
        followed = re.fullmatch(r"\$\{([\w.]+)\}", str(default))
        if followed is None or value_of(arguments, followed[1]) is None:
            continue
        values = configuration.flat(recorded)
        if values.get(key) == values.get(followed[1]):
            section, _, name = key.rpartition(".")
            recorded[section][name] = default


def options_first(arguments: list[str]) -> list[str]:
    """Hydra reads no setting that stands after an option and a setting."""
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    return [*(a for a in arguments if a not in overrides), *overrides]


def run_folder_of(place: Path, setting: str) -> Path:
    """The folder of a run, also of a run's checkpoint."""
    for folder in (place, place.parent.parent):
        if (folder / record.CONFIG).is_file():
            return folder
    other = (
        ""
        if setting != "task.run"
        else (
            ". Videos with a LoRA file, or with one of the hub: task=generate model=5b "
            f"task.add=[{place}]"
        )
    )
    raise UserError(
        f"{setting}={place} is not the folder of a run (it has no {record.CONFIG}) and not a "
        f"checkpoint of one{other}"
    )


def take_option(arguments: list[str], *names: str) -> str | None:
    """Removes `--option value` or `--option=value` from the arguments; returns the value."""
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


# -- completion in the shell --------------------------------------------------------------------


def completions(line: str) -> list[str] | None:
    """What completes `sweep=`, which Hydra does not know; None where Hydra knows better.

    line: the command line so far.
    """
    word = "" if line.endswith(" ") else line.rpartition(" ")[2]
    if word.startswith("sweep="):
        return [f"sweep={name}" for name in sweep_names() if f"sweep={name}".startswith(word)]
    return ["sweep="] if word and "sweep=".startswith(word) else None
