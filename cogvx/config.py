"""The typed configuration: from composed values to checked, plain dataclasses.   [no torch]

Every group of conf/ has a dataclass for each of its options. Every default stands in a YAML, once,
so the dataclasses have none. Behind check() nothing knows Hydra.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogvx.data import sources
from cogvx.errors import UserError, did_you_mean, first_line, listed
from cogvx.files import absolute
from cogvx.model import pretrained
from cogvx.model.lora import Lora
from cogvx.options import optimizers, parallel, schedules, tasks, tracking
from cogvx.options.memory import Memory
from cogvx.options.train import Train
from cogvx.options.validation import Validation
from cogvx.rules import asked_of_model, rules

PROJECT = Path(__file__).parent.parent
CONF = PROJECT / "conf"
HYDRAS = (HydraException, OmegaConfBaseException)  # what composing raises

GROUPS: dict[str, dict[str, type]] = {
    "task": {
        "train": tasks.TrainTask,
        "encode": tasks.EncodeTask,
        "plan": tasks.PlanTask,
        "nano_vae": tasks.NanoVaeTask,
        "evaluate": tasks.EvaluateTask,
        "report": tasks.ReportTask,
        "compare": tasks.CompareTask,
        "list": tasks.ListTask,
        "clean": tasks.CleanTask,
    },
    "model": {
        "nano": pretrained.Nano,
        "nano_i2v": pretrained.NanoI2v,
        "2b": pretrained.Model,
        "5b": pretrained.Model,
        "5b_i2v": pretrained.Model,
        "1_5_5b": pretrained.Model,
        "1_5_5b_i2v": pretrained.Model,
    },
    "data": {
        "demo": sources.Demo,
        "world": sources.World,
        "text_files": sources.TextFiles,
        "csv": sources.Csv,
        "dataset": sources.Dataset,
    },
    "optimizer": {
        "adam": optimizers.Adam,
        "adamw": optimizers.AdamW,
        "adam8bit": optimizers.Adam8bit,
        "adamw8bit": optimizers.AdamW8bit,
        "adamw8bit_torchao": optimizers.AdamW8bitTorchao,
        "prodigy": optimizers.Prodigy,
        "schedule_free": optimizers.ScheduleFree,
        "muon": optimizers.Muon,
    },
    "scheduler": {
        "constant": schedules.Constant,
        "constant_with_warmup": schedules.ConstantWithWarmup,
        "linear": schedules.Linear,
        "cosine": schedules.Cosine,
        "cosine_with_restarts": schedules.CosineWithRestarts,
        "polynomial": schedules.Polynomial,
    },
    "memory": dict.fromkeys(("fast", "balanced", "low", "minimal", "low_full"), Memory),
    "parallel": {"single": parallel.Single, "ddp": parallel.DistributedDataParallel},
    "tracking": {
        "none": tracking.Tracking,
        "tensorboard": tracking.TensorBoard,
        "wandb": tracking.Wandb,
    },
}
SECTIONS: dict[str, type] = {"lora": Lora, "train": Train, "validation": Validation}
# 'lora.lora_alpha=${half:lora.rank}': a strength of 1/2 at every rank
OmegaConf.register_new_resolver(
    "half", lambda key, *, _root_: OmegaConf.select(_root_, key) / 2, replace=True
)
NOT_COMPARED = (
    "output_dir",
    "train.resume",
    "task.card",
    "train.profile_steps",
)  # where a run stands and how it was started, not what it computes


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
    choices: dict[str, str]  # the option chosen of every group

    def asked_of_model(self) -> dict:
        """What decides whether a checkpoint can be trained so, for Model.refusals()."""
        return asked_of_model(self.data, self.train)


def check(composed: DictConfig, choices: dict[str, str]) -> Config:
    """The typed configuration, paths absolute. UserError lists everything that is wrong with it at once."""
    values, problems = {}, []
    for name in composed:
        if name not in (*GROUPS, *SECTIONS, "seed", "output_dir"):
            problems.append(
                f"unknown setting {name}{did_you_mean(str(name), [*GROUPS, *SECTIONS])}"
            )
    for group, classes in GROUPS.items():
        values[group], found = typed(composed, group, classes[choices[group]])
        problems += found
    for section, section_class in SECTIONS.items():
        if section == "lora" and "lora" in composed and composed.lora is None:
            values["lora"] = None
            continue
        values[section], found = typed(composed, section, section_class)
        problems += found
    problems += rules(values, choices, full="lora" in composed and composed.lora is None)
    top, found = typed(
        OmegaConf.create({"top": {k: composed.get(k) for k in ("seed", "output_dir")}}), "top", Top
    )
    problems += [problem.replace("top.", "") for problem in found]
    if top is not None and top.seed < 0:
        problems.append(f"seed={top.seed}: must be 0 or more")
    if problems:
        raise Wrong(problems)
    config = Config(**values, seed=top.seed, output_dir=top.output_dir, choices=dict(choices))
    make_paths_absolute(config)
    return config


class Wrong(UserError):
    """Settings that cannot be run, all of them."""

    def __init__(self, problems: list[str]):
        super().__init__(
            listed(
                f"{len(problems)} setting{'s are' if len(problems) > 1 else ' is'} wrong:", problems
            )
        )
        self.problems = problems


@dataclass
class Top:
    seed: int
    output_dir: Path | None


def typed(
    composed: DictConfig, section: str, section_class: type
) -> tuple[object | None, list[str]]:
    """The section as its dataclass, or what is wrong: each key that is unknown, missing or of another type."""
    node = composed[section]
    if not isinstance(node, DictConfig):
        hint = (
            f"choose one of its options with {section}=OPTION"
            if section in GROUPS
            else "set its values one by one"
        )
        return None, [f"{section}={node}: is not a section of settings; {hint}"]
    target, problems = OmegaConf.structured(section_class), []
    names = [field.name for field in dataclasses.fields(section_class)]
    for key in node:
        full = f"{section}.{key}"
        if key not in names:
            problems.append(
                f"unknown setting {full}{did_you_mean(str(key), names)} {section} has {', '.join(names) or 'no settings'}"
            )
            continue
        try:
            if OmegaConf.is_missing(node, key):
                problems.append(f"{full} must be given: {full}=...")
            else:
                target[key] = node[key]
        except OmegaConfBaseException as error:
            problems.append(f"{full}: {hydra_says(error)}")
    problems += [
        f"{section}.{name} has no value" for name in names if name not in list(node.keys())
    ]
    return (None if problems else OmegaConf.to_object(target)), problems


def make_paths_absolute(config: Config) -> None:
    """Every setting typed Path, and the few that hold either a path or something else."""
    for owner, field in path_fields(config):
        value = getattr(owner, field)
        if isinstance(value, Path):
            setattr(owner, field, absolute(value))
        elif isinstance(value, list):
            setattr(owner, field, [absolute(path) for path in value])
    for section in (config.model, config.data, config.train, config.validation):
        if hasattr(section, "make_paths_absolute"):
            section.make_paths_absolute()


def path_fields(config: Config) -> Iterator[tuple[object, str]]:
    sections = [value for value in vars(config).values() if dataclasses.is_dataclass(value)]
    for owner in (config, *sections):
        for field in dataclasses.fields(owner):
            if "Path" in str(field.type):
                yield owner, field.name


# -- the record: a configuration as a file that launch.py can start from ----------------------------------------------


def as_dict(config: Config) -> dict:
    """Plain values, as in the YAML files, without the choices."""
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
    """Every value, resolved, under a defaults list that names the options: itself a file launch.py can start from."""
    defaults = [*({group: choice} for group, choice in config.choices.items()), "_self_"]
    values = as_dict(config)
    values["output_dir"] = None
    return yaml.safe_dump(
        {"defaults": defaults, **values}, sort_keys=False, allow_unicode=True, width=1000
    )


def read(path: Path) -> Config:
    """The configuration recorded in a file written from to_yaml()."""
    try:
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
        choices = choices_of(recorded)
        del recorded["defaults"]
        if missing := [group for group in GROUPS if choices.get(group) not in GROUPS[group]]:
            raise UserError(
                f"{path}: its defaults list names no known option of {', '.join(missing)}"
            )
        return check(OmegaConf.create(recorded), choices)
    except Wrong as error:
        if not any("has no value" in problem for problem in error.problems):
            raise
        raise UserError(
            f"{path} was recorded by another version of cogvx: environment.json beside it has its git_commit. {error}"
        ) from error
    except (OSError, yaml.YAMLError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not the configuration of a run: {error!r}") from error


def choices_of(recorded: dict) -> dict[str, str]:
    """The option of every group, from a record's defaults list."""
    entries = [entry for entry in recorded["defaults"] if isinstance(entry, dict)]
    return {
        group: option for entry in entries for group, option in entry.items() if group in GROUPS
    }


def differences(ours: Config, theirs: Config) -> list[str]:
    """Keys that differ in what is computed, as `key: theirs -> ours`."""
    one, other = theirs.choices | flat(as_dict(theirs)), ours.choices | flat(as_dict(ours))
    keys = [key for key in dict.fromkeys([*one, *other]) if key not in NOT_COMPARED]
    return [
        f"{key}: {one.get(key)} -> {other.get(key)}"
        for key in keys
        if one.get(key) != other.get(key)
    ]


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in values.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return found


def hydra_says(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    return first_line(cause)
