"""From a command line with several values to the jobs of a sweep.   [no torch]

All jobs are composed and checked before the first one starts. Hydra parses the values and composes
each job. The folder of a sweep and of a job is named here by what they contain, so that the same
command finds the same sweep again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from cogvx import config as configuration
from cogvx.command_line import refusals
from cogvx.compose import Composer, checked
from cogvx.config import Config
from cogvx.errors import UserError, listed
from cogvx.records.alike import unlike_settings
from cogvx.records.sweep import Job, Sweep
from cogvx.runs import search
from cogvx.runs.pool import Pool

PLACE = Path("outputs") / "sweeps"
MOST_JOBS = 10_000
LONGEST = 40  # characters of a value in a folder's name
LONGEST_NAME = 200  # bytes of a folder's name; most file systems allow 255


def is_search(base: DictConfig) -> bool:
    return base.hydra.sweeper._target_ == f"{search.Search.__module__}.{search.Search.__name__}"


@dataclass(frozen=True)
class Grid:
    """Overrides that all jobs share, and the override of each swept key.

    A key in the YAML of a sweep counts as swept, even if it has one value.
    """

    fixed: list[str]
    swept: dict[str, Override]

    def values(self) -> dict[str, list[str]]:
        return {key: discrete(override) for key, override in self.swept.items()}


def sweep_of(
    overrides: list[str], composer: Composer
) -> tuple[Sweep, list[tuple[Job, Config]], DictConfig]:
    """The sweep of a command line, its jobs with their configurations, and the composed base.

    The base has what all jobs share, and how they run. For a search, the jobs are examples of what
    it may propose. UserError names every job that is wrong.
    """
    named, grids = sweep_name(overrides), grids_of(overrides, composer)
    swept = list(dict.fromkeys(key for grid in grids for key in grid.swept))
    base = composer.compose([o for o in grids[0].fixed if key_before_equals(o) not in swept])
    if not swept:
        raise UserError(
            "nothing is swept: give several values, as in  python launch.py -m lora.rank=16,64  "
            "(or leave out -m)"
        )
    for key in swept:
        if key == "output_dir" or key.startswith("hydra."):
            raise UserError(
                f"{key} says how a sweep runs, not what its jobs are: give it one value"
            )
    if is_search(base):
        search.Settings.read(OmegaConf.to_container(base.hydra.sweeper))
        jobs = composed_jobs(
            [(grid.fixed, examples(grid.swept, key)) for grid in grids for key in grid.swept],
            composer,
        )
    else:
        jobs = composed_jobs([(grid.fixed, grid.values()) for grid in grids], composer)
    if not jobs[0][1].task.makes_a_run:
        raise UserError(f"task={jobs[0][1].choices['task']} makes no run of a sweep: leave out -m")
    require_own_repositories([config for _, config in jobs])
    if is_search(base):
        require_one_judge([config for _, config in jobs], swept)
    called = "-".join([*(["search"] if is_search(base) else []), *short_names(swept).values()])
    folder = base.output_dir or str(PLACE / f"{named or short_enough(called)}_{mark(base, swept)}")
    return Sweep(Path(folder).expanduser().absolute(), named, swept), jobs, base


def require_one_judge(examples: list[Config], swept: list[str]) -> None:
    """UserError if a search would rank losses that measure unlike things."""
    unlike = unlike_settings(examples)
    if not unlike:
        return
    named = [key for key in swept if key in unlike] or [*unlike]
    raise UserError(
        f"a search ranks all jobs by their held-out loss, and {', '.join(named[:3])} changes what "
        f"that loss measures: jobs of different values are not comparable. Give one value, and "
        f"search once for each. Or try given values: a sweep without hydra/sweeper=optuna ranks "
        f"those that are comparable with each other"
    )


def cautions(jobs: list[tuple[Job, Config]], swept: list[str]) -> Iterator[str]:
    """What to know about these jobs before they start."""
    unlike = unlike_settings(config for _, config in jobs)
    if unlike:
        named = [key for key in swept if key in unlike] or [*unlike]
        yield (
            f"{', '.join(named[:3])} changes what the held-out loss measures: only jobs of one "
            f"value are comparable, and are ranked together"
        )


def require_own_repositories(jobs: list[Config]) -> None:
    """UserError if jobs would upload to one repository: the last one would replace the others."""
    names = [job.train.hub_repo_id for job in jobs if job.train.hub_repo_id is not None]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"train.hub_repo_id={twice}: several jobs of the sweep would upload to one "
            f"repository. Leave it null, and upload the best run afterwards: "
            f"task=export task.run=outputs/SWEEP/JOB task.hub_repo_id={twice}"
        )


def search_of(
    overrides: list[str],
    composer: Composer,
    sweep: Sweep,
    base: DictConfig,
    pool: Pool,
    command: list[str],
) -> search.Search:
    """Proposes the jobs of a sweep for which is_search() is true."""
    settings = search.Settings.read(OmegaConf.to_container(base.hydra.sweeper))
    branches = [branch_of(grid, composer) for grid in grids_of(overrides, composer)]
    return search.Search(sweep, branches, settings, pool, command)


def branch_of(grid: Grid, composer: Composer) -> search.Branch:
    single = {
        key: discrete(override)
        for key, override in grid.swept.items()
        if not override.is_sweep_override()
    }

    def make(values: dict[str, str]) -> tuple[Job, Config]:
        chosen = {key: [values[key]] if key in values else single[key] for key in grid.swept}
        return composed_jobs([(grid.fixed, chosen)], composer)[0]

    return search.Branch(
        {key: part_of_space(key, o) for key, o in grid.swept.items() if key not in single},
        # What a list or another setting's value comes to is known only in a job.
        {k: number_or_text(text) for k, (text,) in single.items() if text[:1] not in ("$", "[")},
        short_names(list(grid.swept)),
        make,
    )


def grids_of(overrides: list[str], composer: Composer) -> list[Grid]:
    """The grids of a command line and of the sweep's YAML (hydra.sweeper.params).

    Without a list in the YAML there is one grid, and the command line replaces values of it. Of a
    list, only the grids remain that have the values of the command line.
    """
    parse = OverridesParser.create().parse_override
    given = {override.get_key_element(): override for override in map(parse, overrides)}
    fixed = [override.input_line for override in given.values() if not override.is_sweep_override()]
    params = (
        OmegaConf.to_container(composer.compose(fixed).hydra.sweeper, resolve=False).get("params")
        or {}
    )
    grids = []
    for each in params if isinstance(params, list) else [params]:
        swept = {key: parse(f"{key}={value}") for key, value in each.items()}
        if isinstance(params, list):
            swept = {key: narrowed(override, given.get(key)) for key, override in swept.items()}
            if None in swept.values():
                continue
        anew = [key for key in given if key not in swept or not isinstance(params, list)]
        swept |= {key: given[key] for key in anew if given[key].is_sweep_override() or key in swept}
        grids.append(Grid([o for o in fixed if key_before_equals(o) not in swept], swept))
    if not grids:
        asked = " ".join(
            override.input_line
            for key, override in given.items()
            if any(key in each for each in params)
        )
        raise UserError(
            f"none of the sweep's grids has {asked}: they are " + "; ".join(map(str, params))
        )
    return grids


def narrowed(override: Override, asked: Override | None) -> Override | None:
    """The values that are among those asked for. None if there are none."""
    if asked is None:
        return override
    if not override.is_discrete_sweep() and override.is_sweep_override():
        return asked
    wanted = [number_or_text(text) for text in discrete(asked)]
    left = [text for text in discrete(override) if number_or_text(text) in wanted]
    key = override.get_key_element()
    return OverridesParser.create().parse_override(f"{key}={','.join(left)}") if left else None


def discrete(override: Override) -> list[str]:
    """The values of a key, each as the user wrote it."""
    if not override.is_sweep_override():
        return [override.input_line.partition("=")[2]]
    if not override.is_discrete_sweep():
        raise UserError(
            f"{override.input_line} is a range to search in, and this sweep tries given values: "
            f"{override.get_key_element()}=VALUE,VALUE  (or let it search: hydra/sweeper=optuna)"
        )
    return list(dict.fromkeys(override.sweep_string_iterator()))


def part_of_space(key: str, override: Override) -> search.Choice | search.Range:
    value = override.value()
    if not override.is_sweep_override() or override.is_discrete_sweep():
        texts = discrete(override)
        return search.Choice([number_or_text(text) for text in texts], texts)
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    log = "log" in value.tags or key.endswith("learning_rate")
    if not value.start < value.end or (log and value.start <= 0):
        raise UserError(
            f"{override.input_line}: an interval goes from low to high"
            + (", and on a log scale from above 0" if log else "")
        )
    return search.Range(value.start, value.end, log, whole)


def number_or_text(text: str) -> object:
    value = OverridesParser.create().parse_override(f"value={text}").value()
    return value if isinstance(value, bool | int | float) else text


def examples(swept: dict[str, Override], varied: str) -> dict[str, list[str]]:
    """All values, or both ends, of the varied key, with the first value of the other keys."""
    found = {}
    for key, override in swept.items():
        part = part_of_space(key, override)
        texts = [part.text(value) for value in part.examples()]
        found[key] = texts if key == varied else texts[:1]
    return found


def composed_jobs(
    grids: list[tuple[list[str], dict[str, list[str]]]], composer: Composer
) -> list[tuple[Job, Config]]:
    """Every combination of each grid. A grid: overrides that are fixed, and the values of keys."""
    names = short_names(list(dict.fromkeys(key for _, swept in grids for key in swept)))
    count = sum(math.prod(map(len, swept.values())) for _, swept in grids)
    if count > MOST_JOBS:
        raise UserError(f"{count} jobs: more than {MOST_JOBS}. Give fewer values")
    jobs, problems = {}, {}
    for fixed, swept in grids:
        for values in itertools.product(*swept.values()):
            overrides = [f"{key}={value}" for key, value in zip(swept, values, strict=True)]
            try:
                composed = composer.compose([*fixed, *overrides])
                config = checked(composed)
            except configuration.Wrong as wrong:
                for problem in wrong.problems:
                    problems.setdefault(problem, " ".join(overrides))
                continue
            except configuration.HYDRAS as error:
                for problem in refusals(error, [*fixed, *overrides], composer):
                    problems.setdefault(problem, " ".join(overrides))
                continue
            found = {names[key]: job_value(composed, config, key) for key in swept}
            jobs.setdefault(folder_name(found), (Job(folder_name(found), found), config))
    if problems:
        lines = [f"{problem}  (in {job})" for problem, job in problems.items()]
        raise UserError(listed("the sweep was not started; some of its jobs are wrong:", lines))
    return list(jobs.values())


def job_value(composed: DictConfig, config: Config, key: str) -> object:
    key = key.lstrip("+~")
    if key in configuration.GROUPS:
        return config.choices[key]
    value = OmegaConf.select(composed, key)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def key_before_equals(override: str) -> str:
    return override.partition("=")[0]


def sweep_name(overrides: list[str]) -> str | None:
    """NAME of sweeps/NAME.yaml. launch.py gives it to Hydra as +sweeps=NAME."""
    return next((o.partition("=")[2] for o in overrides if o.startswith("+sweeps=")), None)


def short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each key, or the whole key if two have the same last part."""
    last = {key: key.lstrip("+~").rpartition(".")[2] for key in keys}
    return {
        key: last[key] if list(last.values()).count(last[key]) == 1 else key.lstrip("+~")
        for key in keys
    }


def folder_name(values: dict[str, object]) -> str:
    return short_enough("_".join(f"{name}-{in_a_name(value)}" for name, value in values.items()))


def in_a_name(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    plain = re.sub(r"[^\w.+-]+", "-", text)[:LONGEST]
    # The hash tells two prompts apart that begin alike.
    return plain if plain == text else f"{plain}-{hashed(text, 8)}"


def short_enough(name: str) -> str:
    whole = name.encode()
    return (
        name
        if len(whole) <= LONGEST_NAME
        else f"{whole[:LONGEST_NAME].decode(errors='ignore')}-{hashed(name, 8)}"
    )


def mark(base: DictConfig, swept: list[str]) -> str:
    """A hash of all settings that are not swept. Sweeps that differ in one are different sweeps."""
    values = OmegaConf.to_container(base, resolve=False)
    choices = {
        g: c
        for g, c in base.hydra.runtime.choices.items()
        if g in configuration.GROUPS and g not in swept
    }
    del values["hydra"]
    left_out = {*configuration.NOT_COMPARED, *(key.lstrip("+~") for key in swept)}
    # A later version, which has more settings, finds the same sweep.
    added = configuration.flat(configuration.ADDED_SETTINGS)
    shared = {
        key: value
        for key, value in configuration.flat(values).items()
        if key not in left_out and (key not in added or value != added[key])
    }
    return hashed(json.dumps([choices, shared], sort_keys=True, default=str))


def hashed(text: str, digits: int = 4) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
