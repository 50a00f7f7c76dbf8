"""From a command line with several values to jobs, all of them composed and checked before the first starts.   [no torch]

Hydra parses the values and composes each job; which values make a sweep, and what it is called, is decided here: the same command
finds the same sweep again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from cogvx import config as configuration
from cogvx.config import Config
from cogvx.errors import UserError, listed
from cogvx.runs.sweep import Job, Sweep

PLACE = Path("outputs") / "sweeps"
MOST_JOBS = 10_000
LONGEST = 40  # characters of a value in a folder's name


@dataclass(frozen=True)
class Place:
    """Where launch.py composes from."""

    folder: Path = configuration.CONF
    searchpath: tuple[str, ...] = ()

    def compose(self, overrides: list[str]) -> DictConfig:
        return configuration.composed_from(overrides, self.folder, self.searchpath)


def sweep_of(overrides: list[str], place: Place) -> tuple[Sweep, list[tuple[Job, Config]], DictConfig]:
    """The sweep of a command line, its jobs with their configurations, and the composed base, which says how they run.
    UserError names every job that is wrong."""
    named = name_of(overrides)
    fixed, swept = values_of(overrides, {})
    base = place.compose(fixed)
    fixed, swept = values_of(overrides, given_in_yaml(base))
    base = place.compose([o for o in fixed if key_of(o) not in swept])
    if not swept:
        raise UserError(
            "nothing is swept: give several values, as in  python launch.py -m lora.rank=16,64  (or leave out -m)"
        )
    jobs = composed_jobs(fixed, swept, place)
    folder = base.output_dir or str(
        PLACE / f"{named or '-'.join(short_names(list(swept)).values())}_{mark(base, list(swept))}"
    )
    return Sweep(Path(folder).expanduser().absolute(), named, list(swept)), jobs, base


def values_of(overrides: list[str], from_yaml: dict[str, str]) -> tuple[list[str], dict[str, list[str]]]:
    """The overrides that are the same for all jobs, and the values of each swept key; the command line goes before the YAML."""
    parser, fixed, swept = OverridesParser.create(), {}, {}
    for text in [*(f"{key}={value}" for key, value in from_yaml.items()), *overrides]:
        override = parser.parse_override(text)
        key = override.get_key_element()
        fixed.pop(key, None)
        if not override.is_sweep_override():
            swept.pop(key, None)
            fixed[key] = text
        elif override.is_discrete_sweep():
            swept[key] = list(dict.fromkeys(override.sweep_string_iterator()))
        else:
            raise UserError(f"{text}: a range to search in, and this sweep tries given values: {key}=VALUE,VALUE")
    return list(fixed.values()), swept


def given_in_yaml(base: DictConfig) -> dict[str, str]:
    """hydra.sweeper.params, as they are written: `${lora.rank}` in them is each job's own."""
    return {
        str(key): str(value)
        for key, value in (OmegaConf.to_container(base.hydra.sweeper, resolve=False).get("params") or {}).items()
    }


def composed_jobs(fixed: list[str], swept: dict[str, list[str]], place: Place) -> list[tuple[Job, Config]]:
    count, names = 1, short_names(list(swept))
    for values in swept.values():
        count *= len(values)
    if count > MOST_JOBS:
        raise UserError(f"{count} jobs: more than {MOST_JOBS}. Give fewer values")
    jobs, problems = {}, {}
    for values in itertools.product(*swept.values()):
        overrides = [f"{key}={value}" for key, value in zip(swept, values, strict=True)]
        try:
            composed = place.compose([*fixed, *overrides])
            config = checked(composed)
        except configuration.Wrong as wrong:
            for problem in wrong.problems:
                problems.setdefault(problem, " ".join(overrides))
            continue
        except configuration.HYDRAS as error:
            problems.setdefault(configuration.first_line(error), " ".join(overrides))
            continue
        found = {names[key]: value_of(composed, config, key) for key in swept}
        jobs.setdefault(folder_name(found), (Job(folder_name(found), found), config))
    if problems:
        said = [f"{problem}  (in {job})" for problem, job in problems.items()]
        raise UserError(listed("the sweep was not started, for some of its jobs are wrong:", said))
    return list(jobs.values())


def checked(composed: DictConfig) -> Config:
    choices = {group: composed.hydra.runtime.choices[group] for group in configuration.GROUPS}
    values = composed.copy()
    del values["hydra"]
    return configuration.check(values, choices)


def value_of(composed: DictConfig, config: Config, key: str) -> object:
    key = key.lstrip("+~")
    return config.choices[key] if key in configuration.GROUPS else OmegaConf.select(composed, key)


def key_of(override: str) -> str:
    return override.partition("=")[0]


def name_of(overrides: list[str]) -> str | None:
    """Of sweeps/NAME.yaml, which launch.py puts into Hydra's terms as +sweeps=NAME."""
    return next((o.partition("=")[2] for o in overrides if o.startswith("+sweeps=")), None)


def short_names(keys: list[str]) -> dict[str, str]:
    """Each key's last part, where no two have the same."""
    last = {key: key.lstrip("+~").rpartition(".")[2] for key in keys}
    return {key: last[key] if list(last.values()).count(last[key]) == 1 else key.lstrip("+~") for key in keys}


def folder_name(values: dict[str, object]) -> str:
    return "_".join(f"{name}-{in_a_name(value)}" for name, value in values.items())


def in_a_name(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    plain = re.sub(r"[^\w.+-]+", "-", text)[:LONGEST]
    return plain if plain == text else f"{plain}-{hashed(text)}"


def mark(base: DictConfig, swept: list[str]) -> str:
    """Tells sweeps apart that differ in what their jobs share."""
    values = OmegaConf.to_container(base, resolve=False)
    choices = {g: c for g, c in base.hydra.runtime.choices.items() if g in configuration.GROUPS and g not in swept}
    del values["hydra"]
    left_out = {*configuration.NOT_COMPARED, *(key.lstrip("+~") for key in swept)}
    shared = {key: value for key, value in configuration.flat(values).items() if key not in left_out}
    return hashed(json.dumps([choices, shared], sort_keys=True, default=str))


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:4]
