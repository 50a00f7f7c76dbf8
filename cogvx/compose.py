"""Composing settings with Hydra, outside of Hydra's own command line.   [no torch]"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from cogvx.config import CONF, Config, check, choices_of, flat
from cogvx.errors import UserError
from cogvx.groups import GROUPS, SECTIONS

BACKSLASH = "\\"
# What is typed for these is text, also if it looks like a number, a list or another setting.
PROSE = {
    *("data.id_token", "data.id_token_position", "data.caption_split", "data.caption"),
    *("task.prompt", "task.instructions", "task.style", "task.expander_instructions"),
    *("task.enhancer_instructions", "validation.validation_prompt", "validation.negative_prompt"),
}


def compose_config(
    overrides: list[str], folder: Path = CONF, searchpath: tuple[str, ...] = ()
) -> Config:
    """The checked configuration that `launch.py OVERRIDES` would run."""
    return checked(composed_from(overrides, folder, searchpath))


def checked(composed: DictConfig) -> Config:
    """The configuration of what composed_from() returns."""
    choices = {group: composed.hydra.runtime.choices[group] for group in GROUPS}
    values = composed.copy()
    del values["hydra"]
    return check(values, choices)


def checked_by_hydra(composed: DictConfig) -> Config:
    """The configuration of what Hydra's own command line composed."""
    choices = HydraConfig.get().runtime.choices
    return check(composed, {group: choices[group] for group in GROUPS})


@dataclass(frozen=True)
class Composer:
    """The folder of the primary configuration, and other folders with options."""

    folder: Path = CONF
    searchpath: tuple[str, ...] = ()

    def compose(self, overrides: list[str]) -> DictConfig:
        return composed_from(overrides, self.folder, self.searchpath)


def composed_from(
    overrides: list[str], folder: Path, searchpath: tuple[str, ...] = ()
) -> DictConfig:
    """folder/config.yaml with its options and these overrides, Hydra's own settings included."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder.absolute()), version_base="1.3", job_name="cogvx"):
            composed = compose(
                "config",
                [*([searchpath_of(searchpath)] if searchpath else []), *map(addable, overrides)],
                return_hydra_config=True,
            )
    finally:
        GlobalHydra.instance().clear()
    OmegaConf.set_struct(composed, False)
    return composed


def defaults_for(recorded: dict) -> dict[str, object]:
    """The default of every setting, flat, for the options that a record chose.

    A default that follows another setting (lora_alpha follows rank) follows the recorded value.
    Raises what Hydra raises if the record's options are not known here.
    """
    chosen = [f"{group}={option}" for group, option in choices_of(recorded).items()]
    defaults = flat(OmegaConf.to_container(composed_from(chosen, CONF), resolve=False))
    values = OmegaConf.create({key: recorded[key] for key in recorded if key != "defaults"})
    for key, default in defaults.items():
        if isinstance(default, str) and "${" in default and OmegaConf.select(values, key):
            own = values.copy()
            OmegaConf.update(own, key, default)
            defaults[key] = OmegaConf.select(own, key)
    return defaults


def keys_of(composed: DictConfig) -> list[str]:
    """All settings by their full names, such as lora.rank."""
    return list(flat(OmegaConf.to_container(composed, resolve=False)))


def quoted(argument: str, *, sweeping: bool) -> str:
    """KEY=VALUE as Hydra's grammar needs it.

    A value is quoted if Hydra cannot read it (paths and prompts with brackets, umlauts or =), or if
    it is a text with commas and no sweep is asked for.
    """
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    argument = addable(argument)
    key = argument.partition("=")[0]
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        override = None
    if override is None and sweeping and "," in value:
        raise UserError(
            f"{argument}: one text with a comma, or several values? Quotes within quotes tell:  "
            f"\"{key}='one, text'\"  or  \"{key}='this','that'\""
        )
    name, several = (
        of_its_format(key.lstrip("+")),
        override is not None and override.is_sweep_override(),
    )
    if name in PROSE and value != "null" and value[:1] not in ("'", '"', "") and not several:
        # ${...} would be another setting's value.
        return f"{key}={in_quotes(value.replace('${', BACKSLASH + '${'))}"
    if override is not None and (sweeping or not several or name not in text_settings()):
        return argument
    return f"{key}={in_quotes(value)}"


def first_value(argument: str) -> str:
    """KEY=FIRST of KEY=FIRST,SECOND; the lower end of a range."""
    key, equals, value = argument.partition("=")
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        # Hydra reads none of it. So the mistake is in the first value, or in all of them.
        return argument if "[" in value else f"{key}{equals}{value.split(',')[0]}"
    if override.is_interval_sweep():
        return f"{key}={override.value().start}"
    return (
        f"{key}={next(override.sweep_string_iterator())}"
        if override.is_sweep_override()
        else argument
    )


def searchpath_in(arguments: list[str]) -> tuple[str, ...]:
    """The folders of hydra.searchpath=[A,B]."""
    given = [argument for argument in arguments if argument.startswith("hydra.searchpath=")]
    values = [OverridesParser.create().parse_override(argument).value() for argument in given]
    if not all(isinstance(value, list) for value in values):
        raise UserError(
            "hydra.searchpath must be a list of folders: hydra.searchpath=[file:///my/conf]"
        )
    return tuple(str(place) for value in values for place in value)


def searchpath_of(places: Iterable[str]) -> str:
    """As searchpath_in() reads it."""
    return f"hydra.searchpath=[{','.join(in_quotes(place) for place in dict.fromkeys(places))}]"


def addable(override: str) -> str:
    """A source of data=mix is not there before it is named: ++ adds it."""
    return f"++{override}" if override.startswith("data.sources.") else override


def of_its_format(key: str) -> str:
    """data.id_token for data.sources.NAME.id_token, which is a setting of the same kind."""
    return re.sub(r"^data\.sources\.\w+\.", "data.", key)


def in_quotes(text: str) -> str:
    escaped = text.replace("'", BACKSLASH + "'")
    return f"'{escaped}'"


def settings() -> dict[str, str]:
    """Every setting of every option, and its type as the dataclass writes it."""
    classes = [(group, c) for group, options in GROUPS.items() for c in options.values()]
    found = {
        f"{section}.{name}": str(field.type)
        for section, section_class in [*classes, *SECTIONS.items()]
        for name, field in section_class.__dataclass_fields__.items()
        if "ClassVar" not in str(field.type)
    }
    return {"seed": "int", "output_dir": "Path | None", **found}


def text_settings() -> set[str]:
    """The settings that hold one text: prompts, names and paths."""
    return {
        name
        for name, kind in settings().items()
        if ("str" in kind or "Path" in kind) and "list" not in kind
    }


def forget(recorded: dict, group: str) -> None:
    """Removes what an option of this group set, so that a newly chosen one brings its own values.

    These are the group's values, and those that conf/ takes from it, as data.height is
    ${model.height}.
    """
    choices = choices_of(recorded)
    composed = composed_from([f"{g}={c}" for g, c in choices.items()], CONF)
    del composed["hydra"]
    for key, value in flat(OmegaConf.to_container(composed, resolve=False)).items():
        section, _, name = key.rpartition(".")
        if section and section != group and isinstance(value, str) and f"${{{group}." in value:
            recorded[section][name] = value
    del recorded[group]


def described(group: str) -> str:
    """A line for each option of the group, for --help: its name and what it does."""
    return "\n".join(
        f"  {group}={option:<12} {sentence(CONF / group / f'{option}.yaml')}"
        for option in GROUPS[group]
    )


def sentence(path: Path) -> str:
    """The first comment line of an option's YAML that is no command."""
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    words = [line.removeprefix("#").strip() for line in comments]
    return next(line for line in words if not line.startswith(("@package", "python launch.py")))


OmegaConf.register_new_resolver("described", described, replace=True)
