"""Names of other trainers: each leads to a setting that exists, or says why there is none."""

import dataclasses

import pytest

from cogvx import config as configuration
from cogvx.options.other_names import (
    DIFFUSERS,
    ELSEWHERE,
    OTHER_NAMES,
    OTHER_OPTIONS,
    RENAMED,
    SWEEPER,
)

SETTINGS = {
    f"{section}.{field.name}"
    for section, classes in {
        **{group: list(options.values()) for group, options in configuration.GROUPS.items()},
        **{section: [each] for section, each in configuration.SECTIONS.items()},
    }.items()
    for each in classes
    for field in dataclasses.fields(each)
} | {"seed", "output_dir"}
WHOLE = sorted({o.ours for o in OTHER_NAMES.values() if o.ours is not None and "=" in o.ours})


def test_the_tables_hold_every_flag_of_the_script_and_name_nothing_twice():
    assert len(DIFFUSERS) == 68 and len(OTHER_NAMES) > 200
    assert len(OTHER_NAMES) == sum(map(len, (DIFFUSERS, ELSEWHERE, RENAMED, SWEEPER)))


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_every_name_leads_to_a_setting_or_says_why_there_is_none(name):
    ours, note = OTHER_NAMES[name]
    if ours is None:
        assert note.endswith(".") and len(note) > 20
    elif ours.startswith("hydra."):
        _, section, key = ours.split(".")
        yamls = (configuration.CONF / "hydra" / section).glob("*.yaml")
        assert any(f"\n{key}:" in path.read_text(encoding="utf-8") for path in yamls)
    elif "=" not in ours:
        assert ours in SETTINGS or ours in configuration.GROUPS or ours == "experiment"


@pytest.mark.parametrize("settings", WHOLE)
def test_what_is_to_be_typed_whole_composes(settings, compose):
    needed = ["data.instance_data_root=/clips"]
    known = {"STEPS": "5", "train.resume=outputs/RUN": "train.resume=null"}
    for word, value in known.items():
        settings = settings.replace(word, value)
    model = ["model=2b", *needed] if "data.height" in settings else needed
    assert compose(*model, *settings.split())


def test_other_options_lead_to_options_that_exist():
    for group, options in OTHER_OPTIONS.items():
        assert set(options.values()) <= set(configuration.GROUPS[group])
        assert not set(options) & set(configuration.GROUPS[group])
        assert all(name == name.lower() for name in options)
