"""The door: from Hydra's composed values to typed, checked, plain dataclasses. Behind it nothing knows Hydra.   [no torch]

Every group of conf/ has a dataclass per option, below, and every value stands in a YAML, so a dataclass has no defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogvx import tasks
from cogvx.data import sources
from cogvx.errors import UserError, did_you_mean, listed
from cogvx.model import checkpoint
from cogvx.model.lora import Lora
from cogvx.training import optimizers, options, schedules, tracking

PROJECT = Path(__file__).parent.parent
CONF = PROJECT / "conf"
HYDRAS = (HydraException, OmegaConfBaseException)  # what composing raises

GROUPS: dict[str, dict[str, type]] = {
    "task": {"train": tasks.Train, "encode": tasks.Encode, "plan": tasks.Plan, "nano_vae": tasks.NanoVae, "evaluate": tasks.Evaluate, "report": tasks.Report, "compare": tasks.Compare},
    "model": {
        "nano": checkpoint.Nano, "nano_i2v": checkpoint.Nano, "2b": checkpoint.Model, "5b": checkpoint.Model,
        "5b_i2v": checkpoint.Model, "1_5_5b": checkpoint.Model, "1_5_5b_i2v": checkpoint.Model,
    },
    "data": {
        "demo": sources.Demo, "world": sources.World, "text_files": sources.TextFiles, "csv": sources.Csv, "dataset": sources.Dataset,
    },
    "optimizer": {
        "adam": optimizers.Adam, "adamw": optimizers.AdamW, "adam8bit": optimizers.Adam8bit, "adamw8bit": optimizers.AdamW8bit,
        "adamw8bit_torchao": optimizers.AdamW8bitTorchao, "prodigy": optimizers.Prodigy,
        "schedule_free": optimizers.ScheduleFree, "muon": optimizers.Muon,
    },
    "scheduler": {
        "constant": schedules.Constant, "constant_with_warmup": schedules.ConstantWithWarmup, "linear": schedules.Linear,
        "cosine": schedules.Cosine, "cosine_with_restarts": schedules.CosineWithRestarts, "polynomial": schedules.Polynomial,
    },
    "memory": dict.fromkeys(("fast", "balanced", "low", "minimal", "low_full"), options.Memory),
    "parallel": {"single": options.Single, "ddp": options.DistributedDataParallel},
    "tracking": {"none": tracking.Tracking, "tensorboard": tracking.TensorBoard, "wandb": tracking.Wandb},
}  # fmt: skip
SECTIONS: dict[str, type] = {
    "lora": Lora, "train": options.Train, "validation": options.Validation, "plan": options.Plan,
}  # fmt: skip
# 'lora.lora_alpha=${half:lora.rank}': a strength of 1/2 at every rank
OmegaConf.register_new_resolver("half", lambda key, *, _root_: OmegaConf.select(_root_, key) / 2, replace=True)
NOT_COMPARED = (
    "output_dir",
    "train.resume",
    "plan.card",
    "train.profile_steps",
)  # where a run stands and how it was started, not what it computes


@dataclass
class Config:
    task: tasks.Task
    model: checkpoint.Model
    data: sources.Data
    lora: Lora | None  # None: every weight is trained
    optimizer: optimizers.Optimizer
    scheduler: schedules.Schedule
    train: options.Train
    validation: options.Validation
    plan: options.Plan
    memory: options.Memory
    parallel: options.Parallel
    tracking: tracking.Tracking
    seed: int
    output_dir: str | None
    choices: dict[str, str]  # the option chosen of every group

    def asked_of_model(self) -> dict:
        return asked_of_model(self.data, self.train)


def check(composed: DictConfig, choices: dict[str, str]) -> Config:
    """The typed configuration, paths absolute. UserError lists everything that is wrong with it at once."""
    values, problems = {}, []
    for name in composed:
        if name not in (*GROUPS, *SECTIONS, "seed", "output_dir"):
            problems.append(f"unknown setting {name}{did_you_mean(str(name), [*GROUPS, *SECTIONS])}")
    for group, classes in GROUPS.items():
        values[group], found = typed(composed, group, classes[choices[group]])
        problems += found
    for section, section_class in SECTIONS.items():
        if section == "lora" and "lora" in composed and composed.lora is None:
            values["lora"] = None
            continue
        values[section], found = typed(composed, section, section_class)
        problems += found
    problems += rules(values)
    problems += rules_of_choices(values, choices, full="lora" in composed and composed.lora is None)
    top, found = typed(OmegaConf.create({"top": {k: composed.get(k) for k in ("seed", "output_dir")}}), "top", Top)
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
        super().__init__(listed(f"{len(problems)} setting{'s are' if len(problems) > 1 else ' is'} wrong:", problems))
        self.problems = problems


def rules(values: dict[str, object]) -> list[str]:
    """What is wrong in or between the sections that have the right types; a section that has not is None."""
    found = []
    for section in values.values():
        own = getattr(section, "problems", None)
        found += own() if own else []
    model, data, scheduler, train, memory = (
        values.get(name) for name in ("model", "data", "scheduler", "train", "memory")
    )
    if model and data:
        found += model.refusals(**asked_of_model(data, train))
    if model and not model.image_to_video:
        for name, section in (("data.image_column", data), ("validation.validation_images", values.get("validation"))):
            if getattr(section, name.split(".")[1], None) is not None:
                found.append(f"{name} is for image-to-video, and this is text-to-video: model=5b_i2v, or {name}=null")
    if memory and train and not train.gradient_checkpointing:
        for name, used in (
            ("offload_activations", memory.offload_activations), ("stream_weights", memory.stream_weights),
            ("base_storage", memory.base_storage is not options.Storage.own),
        ):  # fmt: skip
            if used:
                found.append(
                    f"memory.{name} without train.gradient_checkpointing=true saves nothing: every block's weights and "
                    f"inputs would be kept for the backward pass"
                )
    if memory and train and train.gradient_checkpointing and memory.recompute is options.Recompute.selective:
        for name, used in (
            ("compile=true", train.compile),
            ("attention=math", train.attention is options.Attention.math),
        ):
            if used:
                found.append(
                    f"train.{name} with memory.recompute=selective, which keeps the results of fused attention by watching the "
                    f"operations of a block: memory.recompute=full"
                )
    if memory and train and train.compile and memory.feed_forward_chunks > 1:
        found.append(
            "train.compile=true with memory.feed_forward_chunks above 1: every block would be compiled by itself, and soon none any "
            "more: memory.feed_forward_chunks=1"
        )
    warmup = getattr(scheduler, "lr_warmup_steps", 0)
    if train and train.max_train_steps is not None and 0 < train.max_train_steps <= warmup:
        found.append(
            f"scheduler.lr_warmup_steps={warmup} with train.max_train_steps={train.max_train_steps}: the full learning rate is "
            f"never reached; lower the first (0: no warm-up) or raise the second"
        )
    return found


def rules_of_choices(values: dict[str, object], choices: dict[str, str], *, full: bool) -> list[str]:
    """What is wrong between the options chosen; `full`: lora=null, every weight is trained."""
    found = []
    model, train, memory, parallel = (values.get(name) for name in ("model", "train", "memory", "parallel"))
    if choices["model"] in ("nano", "nano_i2v") and model:
        option = "nano_i2v" if model.image_to_video else "nano"
        if option != choices["model"]:
            found.append(
                f"model.image_to_video with model={choices['model']}: the built-in models are one each: model={option}"
            )
    if choices["optimizer"] == "schedule_free" and train and train.ema_decay is not None:
        found.append("train.ema_decay with optimizer=schedule_free, which averages by itself: train.ema_decay=null")
    if full and choices["optimizer"] == "muon":
        found.append("optimizer=muon trains matrices only, and lora=null trains other weights too: optimizer=adamw")
    if full and memory and (memory.stream_weights or memory.base_storage is not options.Storage.own):
        found.append(
            "memory.base_storage and memory.stream_weights are for frozen weights, and lora=null trains all: "
            "memory=balanced or low_full"
        )
    if memory and memory.step_in_backward:
        found += refusals_of_stepping_in_backward(memory, train, parallel, choices["optimizer"], full)
    if memory and memory.offload_optimizer:
        if not full:
            found.append("memory.offload_optimizer is for lora=null: what a LoRA trains is small")
        if parallel and parallel.num_processes > 1:
            found.append("memory.offload_optimizer runs in one process: parallel=single")
        if train and train.mixed_precision is options.Precision.fp16:
            found.append("memory.offload_optimizer has no loss scaling, which fp16 needs: train.mixed_precision=bf16")
    return found


def refusals_of_stepping_in_backward(
    memory: options.Memory, train: options.Train | None, parallel: options.Parallel | None, optimizer: str, full: bool
) -> list[str]:
    """Each weight steps by itself, as soon as its gradient is there: what needs all gradients at once cannot be had."""
    needed = [("lora=null", full), ("optimizer=adam or adamw", optimizer in ("adam", "adamw")), ("memory.offload_optimizer=false", not memory.offload_optimizer)]  # fmt: skip
    if train:
        needed += [
            ("train.max_grad_norm=null", train.max_grad_norm is None),
            ("train.gradient_accumulation_steps=1", train.gradient_accumulation_steps == 1),
            ("train.mixed_precision=bf16 or no", train.mixed_precision is not options.Precision.fp16),
        ]
    if parallel:
        needed.append(("parallel=single", parallel.num_processes == 1))
    missing = [what for what, there in needed if not there]
    return [f"memory.step_in_backward needs {', '.join(missing)}"] if missing else []


def asked_of_model(data: sources.Data, train: options.Train | None) -> dict:
    """What decides whether a checkpoint can be trained so, as far as it has the right types."""
    return {
        "frames": data.max_num_frames,
        "height": data.height,
        "width": data.width,
        "precision": train.mixed_precision.name if train else "no",
    }


@dataclass
class Top:
    seed: int
    output_dir: str | None


def typed(composed: DictConfig, section: str, section_class: type) -> tuple[object | None, list[str]]:
    """The section as its dataclass, or what is wrong: each key that is unknown, missing or of another type."""
    node = composed[section]
    if not isinstance(node, DictConfig):
        hint = f"choose one of its options with {section}=OPTION" if section in GROUPS else "set its values one by one"
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
            problems.append(f"{full}: {first_line(error)}")
    problems += [f"{section}.{name} has no value" for name in names if name not in list(node.keys())]
    return (None if problems else OmegaConf.to_object(target)), problems


def make_paths_absolute(config: Config) -> None:
    for owner, name in (
        (config.data, "instance_data_root"), (config.data, "cache_dir"),
        (config.validation, "validation_prompts_file"), (config.task, "run"), (config.task, "prompts_file"),
        (config.task, "other_prompts_file"), (config.task, "page"), (config, "output_dir"), (config.lora, "init_from"),
    ):  # fmt: skip
        value = getattr(owner, name, None)
        if value is not None:
            setattr(owner, name, str(Path(value).expanduser().absolute()))
    if isinstance(config.task, tasks.Compare):
        config.task.runs = [str(Path(run).expanduser().absolute()) for run in config.task.runs]
    if config.validation.validation_images is not None:
        separator = config.validation.validation_prompt_separator
        images = config.validation.validation_images.split(separator)
        config.validation.validation_images = separator.join(
            str(Path(image.strip()).expanduser().absolute()) for image in images
        )
    if config.model.is_local():
        config.model.path = str(Path(config.model.path).expanduser().absolute())
    if config.train.resume not in (None, "auto"):
        config.train.resume = str(Path(config.train.resume).expanduser().absolute())
    local_table = getattr(config.data, "dataset_name", None)
    if isinstance(config.data, sources.Dataset) and Path(local_table).expanduser().exists():
        config.data.dataset_name = str(Path(local_table).expanduser().absolute())


# -- the record: a configuration as a file that launch.py can start from ----------------------------------------------


def as_dict(config: Config) -> dict:
    """Plain values, as in the YAML files, without the choices."""
    return {key: plain(value) for key, value in dataclasses.asdict(config).items() if key != "choices"}


def plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value


def to_yaml(config: Config) -> str:
    """Every value, resolved, under a defaults list that names the options: itself a file launch.py can start from."""
    defaults = [*({group: choice} for group, choice in config.choices.items()), "_self_"]
    values = as_dict(config)
    values["output_dir"] = None
    return yaml.safe_dump({"defaults": defaults, **values}, sort_keys=False, allow_unicode=True, width=1000)


def read(path: Path) -> Config:
    """The configuration recorded in a file written from to_yaml()."""
    try:
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
        choices = choices_of(recorded)
        del recorded["defaults"]
        if missing := [group for group in GROUPS if choices.get(group) not in GROUPS[group]]:
            raise UserError(f"{path}: its defaults list names no known option of {', '.join(missing)}")
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
    return {group: option for entry in entries for group, option in entry.items() if group in GROUPS}


def forget(recorded: dict, group: str) -> None:
    """Takes out of a record what an option of this group set, so that a newly chosen one brings its own: the group's values,
    those its file sets elsewhere, and those that conf/ takes from it, such as data.height from model.height."""
    choices = choices_of(recorded)
    composed = composed_from([f"{g}={c}" for g, c in choices.items()], CONF)
    del composed["hydra"]
    for key, value in flat(OmegaConf.to_container(composed, resolve=False)).items():
        section, _, name = key.rpartition(".")
        if section and section != group and isinstance(value, str) and f"${{{group}." in value:
            recorded[section][name] = value
    for section, name in set_elsewhere(group, choices[group]):
        recorded[section].pop(name, None)
    del recorded[group]


def set_elsewhere(group: str, option: str) -> list[tuple[str, str]]:
    """What an option's file, and those it builds on, set outside of their group: section and name."""
    text = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text) if "@package _global_" in text else {}
    found = [(section, name) for section in SECTIONS for name in values.get(section, {})]
    for earlier in values.get("defaults", []):
        found += [] if earlier == "_self_" else set_elsewhere(group, earlier)
    return found


def differences(ours: Config, theirs: Config) -> list[str]:
    """Keys that differ in what is computed, as `key: theirs -> ours`."""
    one, other = theirs.choices | flat(as_dict(theirs)), ours.choices | flat(as_dict(ours))
    keys = [key for key in dict.fromkeys([*one, *other]) if key not in NOT_COMPARED]
    return [f"{key}: {one.get(key)} -> {other.get(key)}" for key in keys if one.get(key) != other.get(key)]


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


# -- composing outside of Hydra's own command line ---------------------------------------------------------------------


def compose_config(overrides: list[str], folder: Path = CONF, searchpath: tuple[str, ...] = ()) -> Config:
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
    sections = [(group, c) for group, options in GROUPS.items() for c in options.values()] + list(SECTIONS.items())
    found = {f"{section}.{f.name}" for section, c in sections for f in dataclasses.fields(c) if "str" in str(f.type)}
    return found | {"output_dir"}


def composed_from(overrides: list[str], folder: Path, searchpath: tuple[str, ...] = ()) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder.absolute()), version_base="1.3", job_name="cogvx"):
            composed = compose(
                "config", [*(f"hydra.searchpath=['{p}']" for p in searchpath), *overrides], return_hydra_config=True
            )
    finally:
        GlobalHydra.instance().clear()
    OmegaConf.set_struct(composed, False)
    return composed


def explain(
    error: Exception, overrides: list[str], folder: Path, searchpath: tuple[str, ...], *, sweeping: bool
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
            problems.append(in_words(found, override, known or known_keys(good, folder, searchpath)))
    try:
        compose_config(good, folder, searchpath)
    except Wrong as found:
        problems += found.problems
    except HYDRAS as found:
        problems.append(first_line(found))
    return str(Wrong(problems or [first_line(error)]))


def known_keys(overrides: list[str], folder: Path, searchpath: tuple[str, ...]) -> list[str]:
    try:
        return list(flat(OmegaConf.to_container(composed_from(overrides, folder, searchpath), resolve=False)))
    except HYDRAS:
        return []


def in_words(error: Exception, override: str, known: list[str]) -> str:
    key, _, value = override.partition("=")
    key, text = key.lstrip("+~"), str(error)
    if key in GROUPS:
        if value not in GROUPS[key]:
            return f"{override}: there is no such option{did_you_mean(value, GROUPS[key])} {key} is one of {', '.join(GROUPS[key])}"
        return f"{override}: {first_line(error)}"
    if key.startswith("lora.") and "lora" in known:
        return (
            f"{override}: with lora=null every weight is trained and there is no LoRA to set: leave out one of the two"
        )
    if "not in struct" in text or "Could not override" in text:
        return f"unknown setting {key}{nearest(key, [k for k in known if not k.startswith('hydra.')])}"
    if text.startswith("Ambiguous value"):
        return f"{override}: to run one job for each value, add -m; for a list, write [{value}]; for text, quote it: '{key}=\"{value}\"'"
    return f"{override}: {first_line(error)}"


def nearest(key: str, known: list[str]) -> str:
    """Settings near a misspelt one by their full names, else by their last parts, else those beside it."""
    section, _, last = key.rpartition(".")
    by_last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.75)
    near = near or [by_last[word] for word in difflib.get_close_matches(last, by_last, n=2, cutoff=0.75)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    return f"; {section or 'the top level'} has {', '.join(beside)}" if beside else ""


def first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    return str(cause).strip().splitlines()[0]
