"""The door: everything composes, everything wrong is named at once, and nothing imports torch."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from cogvx import compose as composing
from cogvx import config as configuration
from cogvx.errors import UserError
from cogvx.options import optimizers
from cogvx.records import record
from cogvx.training import videos

PROJECT = Path(__file__).parent.parent
ROOT = ["data.instance_data_root=/clips"]
OPTIONS = [(path.parent.name, path.stem) for path in sorted((PROJECT / "conf").glob("*/*.yaml"))]
RECIPES = [option for group, option in OPTIONS if group == "experiment"]


def test_every_yaml_is_an_option_and_every_option_has_a_yaml():
    declared = {
        (group, option) for group, options in configuration.GROUPS.items() for option in options
    }
    assert len(OPTIONS) >= 25
    assert declared == {(group, option) for group, option in OPTIONS if group != "experiment"}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option, compose):
    needed = {
        "text_files": ROOT, "csv": ROOT, **dict.fromkeys(RECIPES, ROOT), "nano_pretrain": [], "dataset": ["data.dataset_name=a/b"], "low_full": ["lora=null"], "evaluate": ["task.run=outputs/RUN"],
        "report": ["task.run=outputs/RUN"], "compare": ["task.runs=[outputs/A,outputs/B]"],
    }.get(option, [])  # fmt: skip
    config = compose(f"{group}={option}", *needed)
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
def test_a_recipe_opens_with_its_command_and_says_nothing_that_the_defaults_say(recipe):
    text = (configuration.CONF / "experiment" / f"{recipe}.yaml").read_text(encoding="utf-8")
    assert text.splitlines()[1].startswith(f"# python launch.py experiment={recipe}")
    said = yaml.safe_load(text)
    chosen = {
        key.removeprefix("override /"): option
        for each in said.pop("defaults")
        for key, option in each.items()
    }
    default = composing.composed_from([], configuration.CONF).hydra.runtime.choices
    assert [group for group, option in chosen.items() if default[group] == option] == []
    without = composing.composed_from(
        [f"{g}={option}" for g, option in chosen.items()], configuration.CONF
    )
    values = configuration.flat(said)
    assert len(RECIPES) >= 6 and values
    assert [key for key, value in values.items() if OmegaConf.select(without, key) == value] == []


def commands() -> list[str]:
    """The settings of every command that a recipe opens with."""
    texts = [
        (configuration.CONF / "experiment" / f"{recipe}.yaml").read_text(encoding="utf-8")
        for recipe in RECIPES
    ]
    found = [
        line.partition("launch.py ")[2]
        for text in texts
        for line in text.splitlines()
        if "# python " in line
    ]
    return [command.partition("   ")[0] for command in found]


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_a_recipe_compose(command, compose):
    assert compose(*command.split()).choices["task"] == "train"


def test_everything_wrong_is_reported_at_once(launch):
    ran = launch(
        "lora.rnak=8", "optimzer.learning_rate=1", "data.max_num_frames=50", "data.height=50", "+lora.foo=2",
        "lora.lora_alpha=abc", "model=2c", "train.mixed_precision=bf8",
    )  # fmt: skip
    assert ran.returncode == 2
    for part in (
        "8 settings are wrong",
        "unknown setting lora.rnak; did you mean lora.rank?",
        "did you mean optimizer.learning_rate?",
        "data.max_num_frames=50: must be 4k + 1; nearest: 49 or 53",
        "data.height=50: must be a multiple of 8",
        "unknown setting lora.foo",
        "lora.lora_alpha: Value 'abc'",
        "model=2c: there is no such option",
        "expected one of [no, fp16, bf16]",
    ):
        assert part in ran.stderr
    assert "Traceback" not in ran.stderr and ran.stdout == ""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.rank=16,64", "add -m"),
        ("model.image_to_video=true", "model=nano_i2v"),
        ("data.video_column=prompts.txt", "each need their own column"),
        ("memory.offload_optimizer=true", "is for lora=null"),
        ("memory.base_storage=int8", "without memory.gradient_checkpointing=true saves nothing"),
        ("memory.feed_forward_chunks=0", "must be 1 (whole) or more"),
        ("train.ema_decay=1", "0.999 is usual"),
        ("train.attention=fast", "expected one of [auto, flash, efficient, cudnn, math]"),
        ("train.profile_steps=-1", "must be 0 (none) or more"),
        ("train.timestep_sampling=normal", "expected one of [uniform, stratified, logit_normal]"),
        ("lora.rank=0", "must be 1 or more"),
        ("seed=-1", "must be 0 or more"),
        ("data=text_files", "data.instance_data_root must be given"),
        ("train.max_train_steps=5", "lr_warmup_steps=20 with train.max_train_steps=5"),
        ("parallel.num_processes=2", "add parallel=ddp"),
        ("+foo=3", "unknown setting foo"),
        ("data.height=0", "nearest: 8"),
        ("data.fps=0", "must be above 0"),
        ("--lora.rank=3", "unrecognized arguments"),
    ],
)
def test_a_wrong_setting_is_named_with_exit_code_2(launch, override, said):
    ran = launch(override)
    assert ran.returncode == 2
    assert said in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["memory=balanced", "train.compile=true"], "memory.recompute=full"),
        (["memory=balanced", "train.attention=math"], "memory.recompute=full"),
        (["memory=low", "train.compile=true"], "memory.feed_forward_chunks=1"),
        (
            ["train.profile_steps=9", "train.max_train_steps=12", "scheduler=constant"],
            "there must be 13 or more",
        ),
    ],
)
def test_settings_that_exclude_each_other_say_which_to_change(compose, overrides, said):
    with pytest.raises(UserError, match=said):
        compose(*overrides)


@pytest.mark.parametrize(
    "text",
    [
        "/My Clips ü (1)",
        "a=b",
        "it's (a) cat",
        '"quoted" = yes',
        "🚲 {x}",
        "a: b; c",
        "a cat, a dog",
        "/my clips, all",
        "[x], y",
    ],
)
def test_paths_and_prompts_are_taken_as_typed(launch, text):
    ran = launch(f"validation.validation_prompt={text}", "--cfg", "job")
    assert yaml.safe_load(ran.stdout)["validation"]["validation_prompt"] == text, ran.stderr


def test_settings_of_a_lora_that_is_not_there_are_refused_in_words(launch):
    ran = launch("lora=null", "lora.rank=3")
    assert ran.returncode == 2 and "there is no LoRA to set: leave out one of the two" in ran.stderr


def test_a_record_of_full_fine_tuning_can_become_a_lora(compose, tmp_path, launch):
    record.open_folder(compose(f"output_dir={tmp_path}", "lora=null"))
    ran = launch(
        "--config-dir", str(tmp_path), "--config-name", "config", "lora.rank=8", "--cfg", "job"
    )
    values = yaml.safe_load(ran.stdout)
    assert values["lora"]["rank"] == 8 and values["lora"]["target_modules"]


def test_a_record_of_another_version_is_named_as_such(compose, tmp_path, launch):
    record.open_folder(compose(f"output_dir={tmp_path}"))
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("  image_to_video: false\n", ""))
    ran = launch("--config-dir", str(tmp_path), "--config-name", "config")
    assert ran.returncode == 2 and "was recorded by another version of cogvx" in ran.stderr


def test_a_misspelt_key_in_a_yaml_is_named(tmp_path, cache):
    import shutil

    shutil.copytree(configuration.CONF, tmp_path / "conf")
    (tmp_path / "conf/optimizer/adamw.yaml").write_text("learning_rate: 1\nbeta4: 0.9\n")
    with pytest.raises(UserError, match=r"unknown setting optimizer.beta4; did you mean") as raised:
        composing.compose_config([f"data.cache_dir='{cache}'"], tmp_path / "conf")
    assert "optimizer.epsilon has no value" in str(raised.value)


def test_no_dataclass_has_a_second_default():
    classes = [c for options in configuration.GROUPS.values() for c in options.values()]
    fields = [
        field
        for c in [*classes, *configuration.SECTIONS.values()]
        for field in dataclasses.fields(c)
    ]
    assert len(fields) > 80
    assert all(field.default is dataclasses.MISSING for field in fields)


def test_importing_launch_imports_no_torch():
    code = "import sys, launch; sys.exit(sum(name in sys.modules for name in ('torch', 'diffusers', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_help_names_every_group_and_option(launch):
    said = launch("--help").stdout
    for group, option in OPTIONS:
        assert group in said and option in said


def test_a_record_reads_back_as_the_same_configuration(compose, tmp_path):
    config = compose(
        "model=5b", "data=csv", "data.instance_data_root=/clips", "optimizer=adam", "seed=0"
    )
    (tmp_path / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
    again = configuration.read(tmp_path / "config.yaml")
    assert again == config
    assert "${" not in configuration.to_yaml(config)


def test_a_folder_holds_one_configuration(compose, tmp_path):
    record.open_folder(compose(f"output_dir={tmp_path}", "lora.rank=8"))
    record.open_folder(compose(f"output_dir={tmp_path}", "lora.rank=8"))
    with pytest.raises(UserError, match=r"lora.rank: 8 -> 16"):
        record.open_folder(compose(f"output_dir={tmp_path}", "lora.rank=16"))


def test_another_task_is_another_run(compose, tmp_path):
    record.open_folder(compose(f"output_dir={tmp_path}", "task=encode"))
    with pytest.raises(UserError, match="task: encode -> train"):
        record.open_folder(compose(f"output_dir={tmp_path}"))


def test_an_unwritable_output_folder_is_refused_before_torch(launch, tmp_path):
    (tmp_path / "file").write_text("")
    ran = launch(f"output_dir={tmp_path}/file/run")
    assert ran.returncode == 2
    assert "cannot be written" in ran.stderr and "output_dir=" in ran.stderr


def test_a_recorded_run_starts_again_with_changes(compose, tmp_path, launch):
    """Options not chosen anew keep their recorded values; one chosen anew brings its own."""
    record.open_folder(
        compose(f"output_dir={tmp_path}", "optimizer.learning_rate=0.1", "lora.rank=7")
    )
    ran = launch(
        "--config-dir",
        str(tmp_path),
        "--config-name",
        "config",
        "optimizer=adam",
        "lora.lora_alpha=3",
        "--cfg",
        "job",
    )
    values = yaml.safe_load(ran.stdout)
    assert (values["lora"]["rank"], values["lora"]["lora_alpha"]) == (7, 3)
    assert values["optimizer"] == yaml.safe_load((PROJECT / "conf/optimizer/adam.yaml").read_text())


def test_a_newly_chosen_group_brings_everything_it_sets(compose, tmp_path, launch):
    record.open_folder(compose(f"output_dir={tmp_path}", "lora.rank=7"))
    again = ["--config-dir", str(tmp_path), "--config-name", "config", "--cfg", "job"]
    memory = yaml.safe_load(launch(*again, "memory=balanced").stdout)
    assert (
        memory["memory"]["gradient_checkpointing"] is True
        and memory["memory"]["vae_tiling"] is True
    )
    model = yaml.safe_load(launch(*again, "model=5b", "--resolve").stdout)
    assert (
        model["data"]["height"],
        model["data"]["max_num_frames"],
        model["train"]["mixed_precision"],
    ) == (
        480,
        49,
        "bf16",
    )
    assert model["lora"]["rank"] == 7
    assert "give one of them" in launch(*again, "experiment=seed_2b").stderr


def test_two_processes_do_not_run_in_one_folder(tmp_path):
    with record.locked(tmp_path):
        code = f"from cogvx.records import record; from pathlib import Path; record.locked(Path({str(tmp_path)!r})).__enter__()"
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True
        )
        assert "is in use by another process (process" in ran.stderr


def test_a_bad_local_model_and_a_misspelt_key_are_both_named(launch, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text("{}")
    ran = launch("model=2b", f"model.path={tmp_path}", "lora.rnk=3", "optimizer.beta1=2")
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    for part in (
        "vae/config.json does not exist",
        "lora.rnk; did you mean lora.rank?",
        "optimizer.beta1=2.0: must be",
    ):
        assert part in ran.stderr


def test_a_folder_without_a_record_is_named(launch, tmp_path):
    ran = launch("--config-dir", str(tmp_path), "--config-name", "config")
    assert ran.returncode == 2 and "does not exist" in ran.stderr
    ran = launch(f"train.resume={tmp_path}")
    assert ran.returncode == 2 and "no run's folder" in ran.stderr
