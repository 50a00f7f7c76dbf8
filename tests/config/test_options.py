"""Every option and recipe composes, and every YAML opens with a command that works."""

import dataclasses
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from cogvx import compose as composing
from cogvx import config as configuration
from cogvx.options import optimizers
from cogvx.training import videos

PROJECT = Path(__file__).parent.parent.parent
ROOT = ["data.instance_data_root=/clips"]
OPTIONS = [(path.parent.name, path.stem) for path in sorted((PROJECT / "conf").glob("*/*.yaml"))]
RECIPES = [option for group, option in OPTIONS if group == "experiment"]


def test_every_yaml_is_an_option_and_every_option_has_a_yaml():
    declared = {
        (group, option) for group, options in configuration.GROUPS.items() for option in options
    }
    assert len(OPTIONS) >= 25
    assert declared == {(group, option) for group, option in OPTIONS if group != "experiment"}


NEEDED = {
    **dict.fromkeys(["text_files", "csv", "table", "folder", "webdataset", *RECIPES], ROOT),
    "nano_pretrain": [],
    "dataset": ["data.dataset_name=a/b"],
    "mix": ["data.sources.new.instance_data_root=/clips"],
    "low_full": ["lora=null"],
    "evaluate": ["task.run=outputs/RUN"],
    "generate": ["task.prompt=a"],
    "caption": ["data=folder", *ROOT, "task.captioner=my/captioner"],
    "export": ["task.run=outputs/RUN"],
    "import": ["task.file=lora.safetensors"],
    "report": ["task.run=outputs/RUN"],
    "doctor": ["task.run=outputs/RUN"],
    "compare": ["task.runs=[outputs/A,outputs/B]"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option, compose):
    config = compose(f"{group}={option}", *NEEDED.get(option, []))
    assert configuration.as_dict(config)["seed"] == 42


def test_the_seed_recipe_is_the_guides_command(compose):
    config = compose("experiment=seed_2b", *ROOT)
    assert (config.model.path, config.train.mixed_precision.name, config.seed) == (
        "THUDM/CogVideoX-2b",
        "fp16",
        42,
    )
    assert (config.lora.rank, config.lora.lora_alpha) == (64, 64)
    optimizer, train, data = config.optimizer, config.train, config.data
    assert type(optimizer) is optimizers.Adam
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == (1e-3, 0.9, 0.95)
    assert config.choices["scheduler"] == "cosine_with_restarts"
    assert (config.scheduler.lr_warmup_steps, config.scheduler.lr_num_cycles) == (200, 1)
    assert (train.num_train_epochs, train.max_train_steps, train.checkpointing_steps) == (
        30,
        None,
        1000,
    )
    assert (train.train_batch_size, train.gradient_accumulation_steps, train.max_grad_norm) == (
        1,
        1,
        1.0,
    )
    assert (data.height, data.width, data.max_num_frames, data.fps) == (480, 720, 49, 8)
    assert (data.skip_frames_start, data.skip_frames_end) == (0, 0)
    assert config.memory.vae_tiling and config.memory.gradient_checkpointing
    assert (config.choices["tracking"], config.tracking.mode) == ("wandb", "online")
    prompts = videos.validation_prompts(config.validation)
    assert len(prompts) == 2 and prompts[0].startswith("DISNEY ")
    assert config.validation.num_validation_videos == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_nothing_that_is_the_default(recipe):
    given = yaml.safe_load(
        (configuration.CONF / "experiment" / f"{recipe}.yaml").read_text(encoding="utf-8")
    )
    chosen = {
        key.removeprefix("override /"): option
        for each in given.pop("defaults")
        for key, option in each.items()
    }
    default = composing.composed_from([], configuration.CONF).hydra.runtime.choices
    assert [group for group, option in chosen.items() if default[group] == option] == []
    without = composing.composed_from(
        [f"{g}={option}" for g, option in chosen.items()], configuration.CONF
    )
    values = configuration.flat(given)
    assert len(RECIPES) >= 6 and values
    assert [key for key, value in values.items() if OmegaConf.select(without, key) == value] == []


YAMLS = sorted((PROJECT / "conf").rglob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_opens_with_its_command_and_says_what_it_is_for(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines[0] == "# @package _global_":
        lines = lines[1:]
    assert lines[0].startswith("# python launch.py")
    if path.parent.name in configuration.GROUPS:
        chosen = f"{path.parent.name}={path.stem}"
        is_the_default = chosen in ("task=train", "data=demo")
        assert chosen in lines[0] or is_the_default or "experiment=" in lines[0]
    assert len(composing.sentence(path)) > 10
    # A command is typed in one piece.
    assert all(len(line) <= 100 for line in lines if not line.startswith("# python launch.py"))


def commands() -> list[str]:
    """The commands at the beginning of each YAML, without sweeps and Hydra's own."""
    found = [
        line.partition("launch.py")[2].partition("   ")[0].strip()
        for path in YAMLS
        if "hydra" not in path.parts
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("# python launch.py")
    ]
    return sorted({*found})


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_the_command_of_a_yaml_composes(command, compose):
    assert len(commands()) > 40
    assert compose(*shlex.split(command))


def test_no_dataclass_has_a_second_default():
    classes = [c for options in configuration.GROUPS.values() for c in options.values()]
    fields = [
        field
        for c in [*classes, *configuration.SECTIONS.values()]
        for field in dataclasses.fields(c)
    ]
    assert len(fields) > 80
    assert all(field.default is dataclasses.MISSING for field in fields)
