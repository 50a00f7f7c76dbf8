"""Paths are made absolute at the door, so that a run can be started from any folder."""

import dataclasses
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

from cogvx import config as configuration
from cogvx.groups import GROUPS, SECTIONS

CLASSES = {
    f"{section}={option}": (section, option_class)
    for section, options in [*GROUPS.items(), *((name, {"": c}) for name, c in SECTIONS.items())]
    for option, option_class in options.items()
}
# Words in the name of a setting that holds a path.
PATH_WORDS = {"path", "file", "dir", "folder", "root", "run", "runs", "page", "images", "resume"}
# Texts that are a path or something else; their sections have a make_paths_absolute().
PATH_OR_OTHER = {
    *("model.path", "train.resume", "validation.validation_images", "task.clip_path"),
    *("task.add", "task.enhancer", "task.file", "lora.init_from"),
}


def is_path(hint: object) -> bool:
    return Path in (hint, *get_args(hint))


@pytest.mark.parametrize("option", CLASSES)
def test_every_path_of_an_option_becomes_absolute(option, compose, tmp_path, monkeypatch):
    """All settings are set to a relative path that exists; none may stay relative."""
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    section, option_class = CLASSES[option]
    config, hints = compose(), get_type_hints(option_class)
    names = {field.name for field in dataclasses.fields(option_class)}
    paths = {n for n in names if is_path(hints[n]) or f"{section}.{n}" in PATH_OR_OTHER}
    values = (
        dict.fromkeys(names)
        | {"validation_prompt_separator": ":::"}
        | {name: value_of(hints[name]) for name in paths}
    )
    built = option_class(**{name: values[name] for name in names})
    if "dataset_name" in names:
        built.dataset_name = "here"
    setattr(config, section, built)
    configuration.make_paths_absolute(config)
    for name in paths | ({"dataset_name"} & names if option == "data=dataset" else set()):
        value = getattr(built, name)
        value = value[0] if isinstance(value, list) else value
        assert Path(value).is_absolute(), f"{section}.{name} stays relative"


def value_of(hint: object) -> object:
    value = Path("here") if is_path(hint) else "here"
    return [value] if get_origin(hint) is list else value


@pytest.mark.parametrize("option", CLASSES)
def test_a_setting_with_the_name_of_a_path_is_typed_path(option):
    section, option_class = CLASSES[option]
    hints = get_type_hints(option_class)
    for name in [field.name for field in dataclasses.fields(option_class)]:
        other = f"{section}.{name}" in PATH_OR_OTHER or hints[name] is bool
        if PATH_WORDS & {*name.split("_")} and not other:
            assert is_path(hints[name]), f"{section}.{name}"
