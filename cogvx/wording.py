"""Sentences about settings that do not exist or have a wrong value.   [no torch]"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import get_args, get_origin

from cogvx.errors import did_you_mean
from cogvx.groups import GROUPS
from cogvx.options.other_names import OTHER_NAMES, OTHER_OPTIONS, OtherName

TOP_LEVEL = ("seed", "output_dir")
# These are chosen as a group's option is: experiment=seed_2b, sweep=rank_lr.
CHOSEN_BY_NAME = ("experiment", "sweep")


def in_yaml(value: object) -> str:
    """The value as a user types it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def type_in_words(hint: object) -> str:
    """What a field takes, after "must be"."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    or_null = ", or null" if type(None) in get_args(hint) else ""
    if get_origin(hint) is dict:
        return "names with settings: data.sources.NAME.KEY=VALUE"
    if get_origin(hint) is list:
        inner = {float: "0.5,1", int: "1,2"}.get(kinds[0], "A,B")
        return f"a list: [{inner}]"
    if isinstance(kinds[0], type) and issubclass(kinds[0], Enum):
        return f"one of {', '.join(kinds[0].__members__)}{or_null}"
    words = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    return words.get(kinds[0], "text") + or_null


def not_a_section(section: str, value: object) -> str:
    """For SECTION=VALUE, when the value is no section of settings."""
    said = f"{section}={in_yaml(value)}"
    if section == "lora":
        return f"{said}: to train every weight, without a LoRA, type lora=null"
    if section in GROUPS:
        return f"{said}: {section} is one of {', '.join(GROUPS[section])}"
    return f"{said}: {section} has several settings; set one of them, {section}.KEY=VALUE"


def unknown_setting(key: str, value: object, known: Iterable[str]) -> str:
    """What to type instead of a setting that does not exist. known: the settings that do."""
    value, about_hydra = in_yaml(value), key.startswith("hydra.")
    known = [name for name in known if name.startswith("hydra.") == about_hydra]
    other = OTHER_NAMES.get(key) or OTHER_NAMES.get(key.rpartition(".")[2])
    misspelt = "." in key and key not in OTHER_NAMES and other is not None
    misspelt = misspelt and difflib.get_close_matches(key, [other.ours or ""], cutoff=0.75)
    if other is not None and not misspelt and other.ours != key:
        return ours_for(key, value, other)
    section, _, name = key.rpartition(".")
    owners = [o for o, c in GROUPS.get(section, {}).items() if name in c.__dataclass_fields__]
    if owners:
        options = " or ".join(f"{section}={owner}" for owner in owners)
        return f"{key} is a setting of {options}, and another option is chosen"
    return f"unknown setting {key}{nearest(key, value, known)}"


def ours_for(key: str, value: str, other: OtherName) -> str:
    """What to type for a name of another trainer, or of an earlier version of this project."""
    if other.ours is None:
        return f"{key}: there is no such setting here. {other.note}"
    note = f" ({other.note})" if other.note else ""
    if "=" in other.ours:
        return f"{key} has another name here: type {other.ours}{note}"
    return f"{key} is {other.ours} here: type {other.ours}={value}{note}"


def nearest(key: str, value: str, known: list[str]) -> str:
    """The end of a sentence about an unknown setting: what was probably meant."""
    section, _, last = key.rpartition(".")
    if not section and (choice := nearest_choice(key, value)):
        return f"; did you mean {choice}?"
    by_last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.75)
    near = near or [
        by_last[word] for word in difflib.get_close_matches(last, by_last, n=2, cutoff=0.75)
    ]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    if section and beside:
        return f"; {section} has {', '.join(beside)}"
    groups = ", ".join([*GROUPS, "lora", "train", "validation", *CHOSEN_BY_NAME, *TOP_LEVEL])
    return f"; settings begin with {groups}. All of them: python launch.py --cfg job"


def nearest_choice(key: str, value: str) -> str | None:
    """GROUP=OPTION for a misspelt group, and where possible for a misspelt option."""
    names = [*GROUPS, "lora", *CHOSEN_BY_NAME, *TOP_LEVEL]
    near = difflib.get_close_matches(key.lower(), names, n=1)
    if not near:
        return None
    options = difflib.get_close_matches(value, GROUPS.get(near[0], ()), n=1)
    return f"{near[0]}={options[0] if options else value}"


def unknown_option(group: str, option: object, options: Iterable[str] = ()) -> str:
    """For GROUP=OPTION, when the group has no such option. options: those that it has."""
    option, options = in_yaml(option), list(options or GROUPS[group])
    other = OTHER_OPTIONS.get(group, {}).get(option.lower())
    hint = f"; did you mean {group}={other}?" if other else did_you_mean(option, options)
    return f"{group}={option}: there is no such option{hint} {group} is one of {', '.join(options)}"
