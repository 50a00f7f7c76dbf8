"""Composing settings with Hydra outside of its own command line, and explaining what it refuses.   [no torch]"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from cogvx.config import (
    CONF,
    GROUPS,
    HYDRAS,
    SECTIONS,
    Config,
    Wrong,
    check,
    choices_of,
    flat,
    hydra_says,
)
from cogvx.errors import UserError, did_you_mean


def compose_config(
    overrides: list[str], folder: Path = CONF, searchpath: tuple[str, ...] = ()
) -> Config:
    """What `launch.py OVERRIDES` would run."""
    composed = composed_from(overrides, folder, searchpath)
    choices = {group: composed.hydra.runtime.choices[group] for group in GROUPS}
    del composed["hydra"]
    return check(composed, choices)


def as_text(argument: str, *, sweeping: bool) -> str:
    """KEY=VALUE, with the value quoted where it can only be meant as it stands: when Hydra's grammar has no place for it (paths
    and prompts with brackets, umlauts or =), and when it is a text with commas that asks for no sweep."""
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        override = None
    if override is None and sweeping and "," in value:
        raise UserError(
            f"{argument}: one text with a comma, or several values? Quotes within quotes tell:  "
            f"\"{key}='one, text'\"  or  \"{key}='this','that'\""
        )
    if override is not None and (
        sweeping or not override.is_sweep_override() or key.lstrip("+") not in text_settings()
    ):
        return argument
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def text_settings() -> set[str]:
    """The settings that hold text: prompts and paths."""
    sections = [(group, c) for group, options in GROUPS.items() for c in options.values()] + list(
        SECTIONS.items()
    )
    found = {
        f"{section}.{f.name}"
        for section, c in sections
        for f in dataclasses.fields(c)
        if "str" in str(f.type)
    }
    return found | {"output_dir"}


def composed_from(
    overrides: list[str], folder: Path, searchpath: tuple[str, ...] = ()
) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder.absolute()), version_base="1.3", job_name="cogvx"):
            composed = compose(
                "config",
                [*(f"hydra.searchpath=['{p}']" for p in searchpath), *overrides],
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


def explain(
    error: Exception,
    overrides: list[str],
    folder: Path,
    searchpath: tuple[str, ...],
    *,
    sweeping: bool,
) -> str:
    """All that is wrong with a command line that Hydra refused: it stops at the first mistake, we try them one by one."""
    problems, good, known = [], [], []
    if sweeping:  # of several values, the first
        overrides = [
            f"{key}={value.split(',')[0] if '[' not in value else value}"
            for key, _, value in (o.partition("=") for o in overrides)
        ]
    choosing = [o for o in overrides if o.split("=")[0].lstrip("+~") in (*GROUPS, "experiment")]
    for override in [*choosing, *(o for o in overrides if o not in choosing)]:
        try:
            composed = composed_from([*good, override], folder, searchpath)
            good.append(override)
            known = list(flat(OmegaConf.to_container(composed, resolve=False)))
        except HYDRAS as found:
            problems.append(
                in_words(found, override, known or known_keys(good, folder, searchpath))
            )
    try:
        compose_config(good, folder, searchpath)
    except Wrong as found:
        problems += found.problems
    except HYDRAS as found:
        problems.append(hydra_says(found))
    return str(Wrong(problems or [hydra_says(error)]))


def known_keys(overrides: list[str], folder: Path, searchpath: tuple[str, ...]) -> list[str]:
    try:
        return list(
            flat(
                OmegaConf.to_container(composed_from(overrides, folder, searchpath), resolve=False)
            )
        )
    except HYDRAS:
        return []


def in_words(error: Exception, override: str, known: list[str]) -> str:
    key, _, value = override.partition("=")
    key, text = key.lstrip("+~"), str(error)
    if key in GROUPS:
        if value not in GROUPS[key]:
            return f"{override}: there is no such option{did_you_mean(value, GROUPS[key])} {key} is one of {', '.join(GROUPS[key])}"
        return f"{override}: {hydra_says(error)}"
    if key.startswith("lora.") and "lora" in known:
        return f"{override}: with lora=null every weight is trained and there is no LoRA to set: leave out one of the two"
    if "not in struct" in text or "Could not override" in text:
        return (
            f"unknown setting {key}{nearest(key, [k for k in known if not k.startswith('hydra.')])}"
        )
    if text.startswith("Ambiguous value"):
        return f"{override}: to run one job for each value, add -m; for a list, write [{value}]; for text, quote it: '{key}=\"{value}\"'"
    return f"{override}: {hydra_says(error)}"


def nearest(key: str, known: list[str]) -> str:
    """Settings near a misspelt one by their full names, else by their last parts, else those beside it."""
    section, _, last = key.rpartition(".")
    by_last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.75)
    near = near or [
        by_last[word] for word in difflib.get_close_matches(last, by_last, n=2, cutoff=0.75)
    ]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    return f"; {section or 'the top level'} has {', '.join(beside)}" if beside else ""


def forget(recorded: dict, group: str) -> None:
    """Takes out of a record what an option of this group set, so that a newly chosen one brings its own: the group's values,
    and those that conf/ takes from it, such as data.height from model.height."""
    choices = choices_of(recorded)
    composed = composed_from([f"{g}={c}" for g, c in choices.items()], CONF)
    del composed["hydra"]
    for key, value in flat(OmegaConf.to_container(composed, resolve=False)).items():
        section, _, name = key.rpartition(".")
        if section and section != group and isinstance(value, str) and f"${{{group}." in value:
            recorded[section][name] = value
    del recorded[group]
