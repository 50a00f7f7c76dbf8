"""A run's record: it reads back exactly, starts the run again, and an older one still does."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import launch as launcher
from cogvx import config as configuration
from cogvx.compose import quoted
from cogvx.errors import UserError
from cogvx.records import record

PROJECT = Path(__file__).parent.parent.parent


def test_a_record_of_full_fine_tuning_can_become_a_lora(compose, tmp_path, door):
    record.open_folder(compose(f"output_dir={tmp_path}", "lora=null"))
    ran = door(
        "--config-dir", str(tmp_path), "--config-name", "config", "lora.rank=8", "--cfg", "job"
    )
    values = yaml.safe_load(ran.stdout)
    assert values["lora"]["rank"] == 8 and values["lora"]["target_modules"]


def test_a_record_of_another_version_is_named_as_such(compose, tmp_path, door):
    record.open_folder(compose(f"output_dir={tmp_path}"))
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("  image_to_video: false\n", ""))
    ran = door("--config-dir", str(tmp_path), "--config-name", "config")
    assert ran.returncode == 2 and "was recorded by another version of cogvx" in ran.stderr


def test_a_record_without_later_settings_still_starts(compose, tmp_path):
    config = compose()
    text = configuration.to_yaml(config)
    for line in ("  scheduler: null\n", "  negative_prompt: ''\n"):
        assert line in text
        text = text.replace(line, "")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert configuration.read(tmp_path / "config.yaml") == config


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


def test_a_set_with_links_out_of_its_folder_can_go_on(compose, tmp_path):
    folder = record.open_folder(compose(f"output_dir={tmp_path}"))
    record.open_folder(compose(f"output_dir={tmp_path}", "data.allow_outside_root=true"))
    assert configuration.read(folder / "config.yaml").data.allow_outside_root
    record.open_folder(compose(f"output_dir={tmp_path}"))
    assert configuration.read(folder / "config.yaml").data.allow_outside_root


def test_another_task_is_another_run(compose, tmp_path):
    record.open_folder(compose(f"output_dir={tmp_path}", "task=encode"))
    with pytest.raises(UserError, match="task: encode -> train"):
        record.open_folder(compose(f"output_dir={tmp_path}"))


def test_an_unwritable_output_folder_is_refused_before_torch(launch, tmp_path):
    (tmp_path / "file").write_text("")
    ran = launch(f"output_dir={tmp_path}/file/run")
    assert ran.returncode == 2
    assert "cannot be written" in ran.stderr and "output_dir=" in ran.stderr


def test_a_recorded_run_starts_again_with_changes(compose, tmp_path, door):
    """Options not chosen anew keep their recorded values; one chosen anew brings its own."""
    record.open_folder(
        compose(f"output_dir={tmp_path}", "optimizer.learning_rate=0.1", "lora.rank=7")
    )
    ran = door(
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


def test_a_newly_chosen_group_brings_everything_it_sets(compose, tmp_path, door):
    record.open_folder(compose(f"output_dir={tmp_path}", "lora.rank=7"))
    again = ["--config-dir", str(tmp_path), "--config-name", "config", "--cfg", "job"]
    memory = yaml.safe_load(door(*again, "memory=balanced").stdout)
    assert (
        memory["memory"]["gradient_checkpointing"] is True
        and memory["memory"]["vae_tiling"] is True
    )
    model = yaml.safe_load(door(*again, "model=5b", "--resolve").stdout)
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
    assert "Give one of them" in door(*again, "experiment=seed_2b").stderr


@pytest.mark.slow
def test_an_alpha_that_followed_the_rank_follows_it_again(compose, tmp_path, door):
    """Else half the rank would double the strength."""
    for name, alpha, expected in (("a", [], 8), ("b", ["lora.lora_alpha=4"], 4)):
        record.open_folder(compose(f"output_dir={tmp_path / name}", "lora.rank=64", *alpha))
        again = ["--config-dir", str(tmp_path / name), "--config-name", "config", "--cfg", "job"]
        lora = yaml.safe_load(door(*again, "lora.rank=8", "--resolve").stdout)["lora"]
        assert (lora["rank"], lora["lora_alpha"]) == (8, expected)
        lora = yaml.safe_load(door(*again, "seed=3", "--resolve").stdout)["lora"]
        assert (lora["rank"], lora["lora_alpha"]) == (64, (alpha and 4) or 64)


def test_two_processes_do_not_run_in_one_folder(tmp_path):
    with record.locked(tmp_path):
        code = (
            f"from cogvx.records import record; from pathlib import Path; "
            f"record.locked(Path({str(tmp_path)!r})).__enter__()"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True
        )
        assert "is in use by another process (process" in ran.stderr


def test_a_start_in_a_folder_in_use_writes_no_settings_there(compose, tmp_path):
    """Else one of two starts would train what the other one asked for."""
    with record.locked(tmp_path), pytest.raises(UserError, match="is in use by another process"):
        launcher.run(compose(f"output_dir={tmp_path}"), None)
    assert not (tmp_path / "config.yaml").exists()


def test_a_folder_without_a_record_is_named(door, tmp_path):
    ran = door("--config-dir", str(tmp_path), "--config-name", "config")
    assert ran.returncode == 2 and "does not exist" in ran.stderr
    ran = door(f"train.resume={tmp_path}")
    assert ran.returncode == 2 and "is not the folder of a run" in ran.stderr


@pytest.mark.parametrize("task", ["train", "plan"])
def test_a_record_from_before_settings_moved_starts_the_same_run(compose, tmp_path, door, task):
    """plan.card and plan.measure are now in task, gradient_checkpointing is in memory."""
    config = compose(f"output_dir={tmp_path}", "memory=balanced", f"task={task}")
    values = yaml.safe_load(record.open_folder(config).joinpath("config.yaml").read_text())
    values["plan"] = {"card": "a100_80gb", "measure": True}
    values["task"] = {}
    values["train"]["gradient_checkpointing"] = values["memory"].pop("gradient_checkpointing")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    again = configuration.read(tmp_path / "config.yaml")
    assert again.memory == config.memory and again.train == config.train
    if task == "plan":
        assert (again.task.card, again.task.measure) == ("a100_80gb", True)
    else:
        assert configuration.differences(config, again) == []
        record.open_folder(config)
    ran = door("--config-dir", str(tmp_path), "--config-name", "config", "--cfg", "job")
    shown = yaml.safe_load(ran.stdout)
    assert shown["memory"]["gradient_checkpointing"] is True and "plan" not in shown
    assert "gradient_checkpointing" not in shown["train"]


def test_a_shortened_warmup_is_recorded_as_a_number(compose, tmp_path):
    folder = record.open_folder(compose(f"output_dir={tmp_path}", "train.max_train_steps=20"))
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert recorded["scheduler"] == {"lr_warmup_steps": 2}
    assert configuration.read(folder / "config.yaml").scheduler.lr_warmup_steps == 2


def test_a_plan_that_read_no_data_is_recorded_and_read_back(compose, tmp_path):
    for data in ("text_files", "csv", "dataset"):
        config = compose(f"output_dir={tmp_path / data}", "task=plan", f"data={data}")
        assert configuration.read(record.open_folder(config) / "config.yaml").data == config.data


@pytest.mark.parametrize(
    "text",
    ["costs ${amount}", "${seed}", "1e5", "true", "[V]", "it's {a} = b", "a, b", "null and void"],
)
def test_what_is_typed_for_a_text_is_text_also_in_the_record(compose, tmp_path, text):
    """The shell's quotes are gone. Hydra and OmegaConf would read numbers and settings in it."""
    arguments = [f"{key}={text}" for key in ("data.id_token", "validation.validation_prompt")]
    config = compose(*[quoted(each, sweeping=False) for each in arguments])
    (tmp_path / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
    again = configuration.read(tmp_path / "config.yaml")
    for each in (config, again):
        assert (each.data.id_token, each.validation.validation_prompt) == (text, text)


def test_a_text_may_still_be_swept_null_or_in_quotes():
    for typed in ("data.id_token=A,B", "data.id_token=null", "data.id_token='a','b'"):
        assert quoted(typed, sweeping=True) == typed
    assert quoted('data.id_token="a, b"', sweeping=False) == 'data.id_token="a, b"'
