"""The typed configuration: from composed values to checked, plain dataclasses.   [no torch]

Every group of conf/ has a dataclass for each of its options. Every default stands in a YAML, once,
so the dataclasses have none. Behind check() nothing knows Hydra.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from cogvx.data import mix, sources
from cogvx.errors import UserError, first_line, listed
from cogvx.files import absolute
from cogvx.groups import GROUPS, SECTIONS
from cogvx.hub_client import pinned
from cogvx.model import pretrained
from cogvx.model.lora import Lora
from cogvx.options import optimizers, parallel, schedules, tasks, tracking
from cogvx.options.memory import Memory
from cogvx.options.train import Train
from cogvx.options.validation import Validation
from cogvx.progress import counted
from cogvx.rules import asked_of_model, rules
from cogvx.wording import (
    TOP_LEVEL,
    in_yaml,
    not_a_section,
    type_in_words,
    unknown_option,
    unknown_setting,
)

PROJECT = Path(__file__).parent.parent
CONF = PROJECT / "conf"
HYDRAS = (HydraException, OmegaConfBaseException)  # what composing raises

# Values in a record, lists and tables counted too. A text of a few lines can stand for billions.
MOST_VALUES, LARGEST_RECORD = 100_000, 10_000_000  # bytes
# What calls a function in a value, such as ${oc.env:NAME}. Not: another setting's name.
CALL = re.compile(r"(\\*)\$\{(?![\w.]+\})")

# Whether files outside of the set's folder may be read.
ALLOWED_OUTSIDE = "data.allow_outside_root"

# Where a run stands and how it was started. These do not change what it computes.
NOT_COMPARED = ("output_dir", "train.resume", "task.card", "train.profile_steps", ALLOWED_OUTSIDE)

# Settings that earlier versions did not have, with the value that stands for what these did.
ADDED_SETTINGS = {
    "data": {
        "allow_outside_root": False,
        "buckets": None,
        "decode_seconds": 300.0,
        "decode_gigabytes": 8.0,
        "shard": None,
        "id_token_position": "start",
        "id_token_share": 1.0,
        "caption_split": None,
        "tag_shuffles": 0,
        "keep_tags": 0,
        "long_files": "head",
        "random_windows": 4,
        "window_overlap": 0.5,
        "scene_threshold": 27,
        "short_files": "drop",
        "flip": False,
        "near_duplicates_together": True,
    },
    "train": {
        "hub_repo_id": None,
        "hub_private": True,
        "hub_checkpoints": False,
        "deterministic": False,
    },
    "validation": {
        "scheduler": None,
        "negative_prompt": "",
        "preview": "none",
        "preview_steps": 50,
    },
}
ADDED_TO_GENERATE = {
    "add": [],
    "add_strengths": [],
    "held_out_clips": 0,
    "video": None,
    "video_strength": 0.8,
    "enhancer": None,
    "enhancer_url": None,
    "enhancer_instructions": "",
}


def half(key: str, *, _root_: DictConfig) -> float:
    """'lora.lora_alpha=${half:lora.rank}' keeps the strength at 1/2 for every rank."""
    return OmegaConf.select(_root_, key) / 2


def warmup(usual: int, *, _root_: DictConfig) -> int:
    """The usual number of warm-up steps, or a tenth of a run that is not longer than that."""
    steps = OmegaConf.select(_root_, "train.max_train_steps")
    return steps // 10 if isinstance(steps, int) and 0 < steps <= usual else usual


OmegaConf.register_new_resolver("half", half, replace=True)
OmegaConf.register_new_resolver("warmup", warmup, replace=True)


def shortened_warmup(composed: DictConfig) -> str | None:
    """A warning, if warmup() gave this run fewer steps than usual."""
    scheduler, steps = (
        composed.get("scheduler"),
        OmegaConf.select(composed, "train.max_train_steps"),
    )
    if not isinstance(scheduler, DictConfig) or "lr_warmup_steps" not in scheduler:
        return None
    usual = re.fullmatch(r"\$\{warmup:(\d+)\}", str(written(scheduler, "lr_warmup_steps")))
    used = scheduler.lr_warmup_steps
    if usual is None or used == int(usual[1]):
        return None
    return (
        f"the usual warm-up of {usual[1]} steps would not end in train.max_train_steps={steps}, so "
        f"it takes {counted(used, 'step')}; another length: scheduler.lr_warmup_steps=STEPS"
    )


@dataclass
class Config:
    task: tasks.Task
    model: pretrained.Model
    data: sources.Data
    lora: Lora | None  # None: every weight is trained
    optimizer: optimizers.Optimizer
    scheduler: schedules.Schedule
    train: Train
    validation: Validation
    memory: Memory
    parallel: parallel.Parallel
    tracking: tracking.Tracking
    seed: int
    output_dir: Path | None
    choices: dict[str, str]  # the chosen option of each group

    def asked_of_model(self) -> dict:
        """The settings that decide whether a checkpoint can be trained, for Model.refusals()."""
        return asked_of_model(self.data, self.train)


class Wrong(UserError):
    """Settings that cannot be run. `problems` has a sentence for each."""

    def __init__(self, problems: list[str]):
        number = "1 setting is" if len(problems) == 1 else f"{len(problems)} settings are"
        super().__init__(listed(f"{number} wrong:", problems))
        self.problems = problems


@dataclass
class Top:
    """The settings that are in no section."""

    seed: int
    output_dir: Path | None


def check(composed: DictConfig, choices: dict[str, str]) -> Config:
    """The typed configuration, with absolute paths. Wrong lists everything that is wrong."""
    problems = unknown_at_the_top(composed)
    no_options = [unknown_option(g, o) for g, o in choices.items() if o not in GROUPS[g]]
    if no_options:
        raise Wrong(problems + no_options)
    full = "lora" in composed and composed.lora is None
    values, wrong = typed_sections(composed, choices, full=full)
    if isinstance(values["data"], mix.Mix):
        wrong |= type_sources(values["data"])
    broken = rules(values, choices, full=full)
    top, found = typed(
        OmegaConf.create({"top": {name: composed.get(name) for name in TOP_LEVEL}}), "top", Top
    )
    wrong |= {key.removeprefix("top."): text.removeprefix("top.") for key, text in found.items()}
    if top.seed < 0:
        broken.append(f"seed={top.seed}: must be 0 or more")
    problems += roots(wrong, composed)
    problems += [problem for problem in broken if not names_one_of(problem, wrong)]
    if problems:
        raise Wrong(problems)
    config = Config(**values, seed=top.seed, output_dir=top.output_dir, choices=dict(choices))
    make_paths_absolute(config)
    return config


def unknown_at_the_top(composed: DictConfig) -> list[str]:
    known = [*GROUPS, *SECTIONS, *TOP_LEVEL]
    return [
        unknown_setting(str(name), written(composed, name), known)
        for name in composed
        if name not in known
    ]


def typed_sections(
    composed: DictConfig, choices: dict[str, str], *, full: bool
) -> tuple[dict[str, object], dict[str, str]]:
    """Every section as its dataclass, and what is wrong with their keys. full: lora=null."""
    needs_data = GROUPS["task"][choices["task"]].needs_data
    classes = {group: options[choices[group]] for group, options in GROUPS.items()} | SECTIONS
    values, wrong = {}, {}
    for section, section_class in classes.items():
        if section == "lora" and full:
            values[section] = None
            continue
        fill = section == "data" and not needs_data
        values[section], found = typed(composed, section, section_class, fill_missing=fill)
        wrong |= found
    return values, wrong


def typed(
    composed: DictConfig, section: str, section_class: type, *, fill_missing: bool = False
) -> tuple[object | None, dict[str, str]]:
    """The section as its dataclass, and what is wrong with its keys: {key: sentence}.

    A value of the wrong type is replaced by one of the right type, so that the rules between the
    others can still be checked. fill_missing: a value that must be given is replaced too, and is
    not reported. None if it is no section at all.
    """
    node = composed.get(section)
    if not isinstance(node, DictConfig):
        return None, {section: not_a_section(section, node)}
    hints = get_type_hints(section_class)
    names = [field.name for field in dataclasses.fields(section_class)]
    known = [f"{section}.{name}" for name in names]
    wrong = {
        f"{section}.{key}": unknown_setting(f"{section}.{key}", written(node, key), known)
        for key in node
        if key not in names
    }
    given, filled = OmegaConf.structured(section_class), []
    for name in names:
        problem = assign(given, node, name, hints[name], section)
        if problem is not None:
            given[name] = stand_in(hints[name])
            if fill_missing and OmegaConf.is_missing(node, name):
                filled.append(name)
            else:
                wrong[f"{section}.{name}"] = problem
    built = OmegaConf.to_object(given)
    for name in filled:
        if hints[name] is str:
            setattr(built, name, MISSING)
    return built, wrong


def type_sources(data: mix.Mix) -> dict[str, str]:
    """Gives a mix its sources as their dataclasses. Returns what is wrong with their keys."""
    parts, recorded, wrong = {}, {}, {}
    for name, given in data.sources.items():
        section = f"data.sources.{name}"
        if not isinstance(given, dict) or not re.fullmatch(r"[A-Za-z]\w*", str(name)):
            wrong[section] = f"{section}={in_yaml(given)}: a source is data.sources.NAME.KEY=VALUE"
            continue
        option, share = given.get(mix.FORMAT, mix.USUAL_FORMAT), given.get(mix.SHARE)
        if option not in GROUPS["data"] or option == "mix":
            formats = ", ".join(key for key in GROUPS["data"] if key != "mix")
            wrong[f"{section}.format"] = (
                f"{section}.format={in_yaml(option)}: must be one of {formats}"
            )
            continue
        if share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
            wrong[section] = (
                f"{section}.share={in_yaml(share)}: must be above 0, at most 1, or null"
            )
            share = None
        parts[name], found = typed_source(data, section, option, given)
        recorded[name] = mix.recorded_part(parts[name], option, share)
        wrong |= found
    data.sources = recorded
    data.use(parts)
    return wrong


def typed_source(
    data: mix.Mix, section: str, option: str, given: dict
) -> tuple[sources.Data, dict[str, str]]:
    """A source of a mix, and what is wrong with its keys.

    It has the defaults of its format, and of what all sources share, the values of the mix.
    """
    part_class = GROUPS["data"][option]
    own = mix.settings_of_part(part_class)
    shared = {key: plain(v) for key, v in vars(data).items() if key not in (*own, "sources")}
    given = {key: v for key, v in given.items() if key not in (mix.FORMAT, mix.SHARE)}
    wrong = {
        f"{section}.{key}": f"{section}.{key}={in_yaml(value)}: all sources share it: data.{key}"
        for key, value in given.items()
        if key in shared
    }
    values = defaults_of_format(option) | given | shared
    node = OmegaConf.create({section: escaped(values)})
    part, found = typed(node, section, part_class)
    return part, wrong | found


def defaults_of_format(option: str) -> dict:
    """The values of conf/data/OPTION.yaml, and of those that it begins with."""
    written = yaml.safe_load((CONF / "data" / f"{option}.yaml").read_text(encoding="utf-8"))
    first = [each for each in written.pop("defaults", []) if each != "_self_"]
    values = [defaults_of_format(each) for each in first]
    return {key: value for each in (*values, written) for key, value in each.items()}


def assign(
    given: DictConfig, node: DictConfig, name: str, hint: object, section: str
) -> str | None:
    """given.name = node.name, or what is wrong with the value."""
    full = f"{section}.{name}"
    if name not in list(node.keys()):
        return f"{full} has no value"
    if OmegaConf.is_missing(node, name):
        return f"{full} must be given: {full}=..."
    try:
        given[name] = escaped(node[name])
    except InterpolationResolutionError as error:
        return f"{full}: {first_line(error)}"
    except OmegaConfBaseException:
        return f"{full}={in_yaml(node[name])}: must be {type_in_words(hint)}"
    return None


def stand_in(hint: object) -> object:
    """A value of this type."""
    if hint is Any or type(None) in get_args(hint):
        return None
    if get_origin(hint) in (list, dict):
        return get_origin(hint)()
    if isinstance(hint, type) and issubclass(hint, Enum):
        return next(iter(hint))
    return hint("1")  # 1, 1.0, True, "1" or Path("1")


def written(node: DictConfig, key: str) -> object:
    """The value as it stands in the YAML: "${lora.rank}", not the rank."""
    value = node._get_node(key)
    return value if isinstance(value, DictConfig | ListConfig) else value._value()


def roots(wrong: dict[str, str], composed: DictConfig) -> list[str]:
    """What is wrong, without values that are only taken over from another wrong one."""
    found = []
    for key, problem in wrong.items():
        section, _, name = key.rpartition(".")
        there = section and isinstance(composed.get(section), DictConfig)
        text = str(written(composed[section], name)) if there and name in composed[section] else ""
        if not ("${" in text and names_one_of(text, wrong)):
            found.append(problem)
    return found


def names_one_of(text: str, keys: Iterable[str]) -> bool:
    """Whether one of these settings is named in the text, as a whole word."""
    return any(re.search(rf"(?<![\w.]){re.escape(key)}(?![\w])", text) for key in keys)


def make_paths_absolute(config: Config) -> None:
    """Every setting typed Path. A section with other paths has its own make_paths_absolute()."""
    sections = [value for value in vars(config).values() if dataclasses.is_dataclass(value)]
    for owner in (config, *sections):
        for name, hint in get_type_hints(type(owner)).items():
            if Path not in (hint, *get_args(hint)):
                continue
            value = getattr(owner, name)
            if isinstance(value, Path):
                setattr(owner, name, absolute(value))
            elif isinstance(value, list):
                setattr(owner, name, [absolute(path) for path in value])
        if owner is not config and hasattr(owner, "make_paths_absolute"):
            owner.make_paths_absolute()


def pin_places(config: Config, commits: dict[str, str]) -> None:
    """Names the commit of each LoRA and data set of the hub whose commit is known.

    commits: by the place as it stands in the configuration, such as name/repo.
    """
    if config.lora is not None and config.lora.init_from is not None:
        config.lora.init_from = pinned(config.lora.init_from, commits)
    if isinstance(config.task, tasks.GenerateTask | tasks.ExportTask):
        config.task.add = [pinned(place, commits) for place in config.task.add]
    for part in (config.data, *getattr(config.data, "sources", {}).values()):
        # A source of a mix is recorded as a dict.
        named = part if isinstance(part, dict) else vars(part)
        if isinstance(named.get("dataset_name"), str):
            named["dataset_name"] = pinned(named["dataset_name"], commits)


# -- the record: a configuration as a file that launch.py can start from -------------------------


def as_dict(config: Config) -> dict:
    """The values as they stand in a YAML file, without the choices."""
    return {
        key: plain(value) for key, value in dataclasses.asdict(config).items() if key != "choices"
    }


def plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value


def to_yaml(config: Config) -> str:
    """Every value, under a defaults list that names the options. launch.py can start from it."""
    defaults = [*({group: choice} for group, choice in config.choices.items()), "_self_"]
    values = as_dict(config)
    values["output_dir"] = None
    # A text with ${...} is no other setting's value.
    values = escaped(values)
    return yaml.safe_dump(
        {"defaults": defaults, **values}, sort_keys=False, allow_unicode=True, width=1000
    )


def escaped(value: object) -> object:
    if isinstance(value, str):
        # Backslashes before it would else undo the one that is put there.
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    return value


def read(path: Path) -> Config:
    """The configuration in a file that was made of to_yaml(). UserError if it is another file."""
    recorded = read_record(path)
    choices = choices_of(recorded)
    missing = [group for group in GROUPS if choices.get(group) not in GROUPS[group]]
    if missing:
        raise UserError(f"{path}: its defaults list names no known option of {', '.join(missing)}")
    del recorded["defaults"]
    try:
        return check(OmegaConf.create(recorded), choices)
    except Wrong as error:
        if not any("has no value" in problem for problem in error.problems):
            raise
        raise UserError(
            f"{path} was recorded by another version of cogvx: environment.json beside it has its "
            f"git_commit. {error}"
        ) from error


def read_record(path: Path) -> dict:
    """The values of a run's config.yaml, each under the name that it has in this version.

    Others may have written the file. UserError if a value of it would call something.
    """
    try:
        if path.stat().st_size > LARGEST_RECORD:
            raise ValueError("it is too large")
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
        require_plain_values(path, recorded)
        return upgraded(recorded)
    except UserError:
        raise
    # Broken files raise errors of many kinds, and very deep ones a RecursionError.
    except Exception as error:
        raise UserError(f"{path} is not the configuration of a run: {error!r:.300}") from error


def require_plain_values(path: Path, recorded: object) -> None:
    """UserError if a value calls something, as ${oc.env:NAME} reads the environment."""
    left, seen = [recorded], 0
    while left:
        value, seen = left.pop(), seen + 1
        if seen > MOST_VALUES:
            raise UserError(f"{path} is not the configuration of a run: it has too many values")
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and any(len(c[1]) % 2 == 0 for c in CALL.finditer(value)):
            raise UserError(
                f"{path} has the value {value!r:.100}, which would call something here. A run's "
                f"own record has none: do not use this file, or write the value itself in its place"
            )


def upgraded(recorded: dict) -> dict:
    """A record of an earlier version, with the settings that were renamed or added since then."""
    plan = recorded.pop("plan", None)
    if plan is not None and choices_of(recorded)["task"] == "plan":
        recorded["task"] = plan
    if choices_of(recorded)["task"] == "plan":
        recorded["task"] = {"of": "train", "run": None} | recorded["task"]
    if "gradient_checkpointing" in recorded["train"]:
        recomputed = recorded["train"].pop("gradient_checkpointing")
        recorded["memory"].setdefault("gradient_checkpointing", recomputed)
    for section, values in ADDED_SETTINGS.items():
        recorded[section] = values | recorded[section]
    if choices_of(recorded)["tracking"] == "wandb":
        recorded["tracking"] = {"entity": None, "group": None, "tags": []} | recorded["tracking"]
    if choices_of(recorded)["task"] == "generate":
        recorded["task"] = ADDED_TO_GENERATE | recorded["task"]
    return recorded


def choices_of(recorded: dict) -> dict[str, str]:
    """The chosen option of each group, from a record's defaults list."""
    entries = [entry for entry in recorded["defaults"] if isinstance(entry, dict)]
    return {
        group: option for entry in entries for group, option in entry.items() if group in GROUPS
    }


def differences(ours: Config, theirs: Config) -> list[str]:
    """The settings that differ and change what is computed, as `key: theirs -> ours`."""
    one, other = theirs.choices | flat(as_dict(theirs)), ours.choices | flat(as_dict(ours))
    keys = [key for key in dict.fromkeys([*one, *other]) if key not in NOT_COMPARED]
    return [
        f"{key}: {one.get(key)} -> {other.get(key)}"
        for key in keys
        if one.get(key) != other.get(key)
    ]


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    """{"lora": {"rank": 4}} -> {"lora.rank": 4}"""
    found = {}
    for key, value in values.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return found


def hydra_says(error: Exception) -> str:
    """The first line of what Hydra or OmegaConf says."""
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    return first_line(cause)
