"""What is typed: taken as it is meant, or answered with what to type instead."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cogvx import compose as composing
from cogvx import config as configuration
from cogvx.runs import grid, translate

PROJECT = Path(__file__).parent.parent.parent
OPTIONS = [(path.parent.name, path.stem) for path in sorted((PROJECT / "conf").glob("*/*.yaml"))]


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
def test_paths_and_prompts_are_taken_as_typed(door, text):
    ran = door(f"validation.validation_prompt={text}", "--cfg", "job")
    assert yaml.safe_load(ran.stdout)["validation"]["validation_prompt"] == text, ran.stderr


def test_importing_launch_imports_no_torch():
    heavy = ("torch", "diffusers", "transformers", "numpy")
    code = f"import sys, launch; sys.exit(sum(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_a_path_with_commas_is_one_path(door):
    ran = door("data.instance_data_root=/my clips, all", "--cfg", "job")
    shown = yaml.safe_load(ran.stdout)
    assert shown["data"]["instance_data_root"] == "/my clips, all", ran.stderr


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["lora.rank", "=", "16"], "lora.rank=16"),
        (["lora.rank=", "16"], "lora.rank=16"),
        (["lora.rank", "=16"], "lora.rank=16"),
        (["lora.rank", "16"], "lora.rank=16"),
        (["--rank", "16"], "lora.rank=16"),
        (["--learning-rate", "-1"], "optimizer.learning_rate=-1"),
        (["--use_8bit_adam", "--rank", "8"], "optimizer=adamw8bit lora.rank=8"),
        (["-m", "--rank", "8", "seed=1,2"], "-m lora.rank=8 seed=1,2"),
        (["plan", "model=5b"], "task=plan model=5b"),
        (
            ["validation.validation_prompt=a", "cat,", "a", "dog:", "happy"],
            "'validation.validation_prompt=a cat, a dog: happy'",
        ),
        (["data.instance_data_root=/my", "clips"], "'data.instance_data_root=/my clips'"),
    ],
)
def test_what_is_not_key_value_is_answered_with_the_command(door, typed, meant):
    ran = door(*typed)
    assert ran.returncode == 2 and "KEY=VALUE" in ran.stderr
    assert f"The whole command:  python launch.py {meant}\n" in ran.stderr


def test_stray_words_are_named(door):
    said = door("lora.rank=16", "32").stderr
    assert "32, after lora.rank=16, is not KEY=VALUE" in said
    said = door("frobnicate", "--push_to_hub").stderr
    assert "frobnicate is not KEY=VALUE" in said and "train.hub_repo_id=NAME" in said


def test_help_names_every_group_and_option_and_says_what_tasks_and_data_do(launch):
    said = launch("--help").stdout
    assert len(OPTIONS) >= 45
    for group, option in OPTIONS:
        assert group in said and option in said
    # Hydra puts the options of a group into one line.
    lists = tuple(f"{group}: " for group in configuration.GROUPS)
    assert all(len(line) <= 100 for line in said.splitlines() if not line.startswith(lists))
    for group in ("task", "data"):
        for option in configuration.GROUPS[group]:
            sentence = composing.sentence(configuration.CONF / group / f"{option}.yaml")
            assert f"{group}={option} " in said and sentence in said and len(sentence) > 20


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("python launch.py model=2b sweep=rank", ["sweep=rank_alpha_lr", "sweep=rank_lr"]),
        ("python launch.py sw", ["sweep="]),
        ("python launch.py sweep=rank_lr ", None),
        ("python launch.py model=", None),
    ],
)
def test_the_shell_completes_the_names_of_sweeps(line, found):
    assert translate.completions(line) == found


@pytest.mark.parametrize(("line", "found"), [("sweep=opt", "sweep=optimizers"), ("mod", "model=")])
def test_completion_in_bash(door, monkeypatch, line, found):
    monkeypatch.setenv("COMP_LINE", f"python launch.py {line}")
    assert found in door("-sc", "query=bash").stdout.split()


def test_settings_with_dashes_in_front_are_taken_as_wandbs_agents_write_them(door):
    ran = door("--lora.rank=16", "--optimizer=adam", "--cfg", "job")
    shown = yaml.safe_load(ran.stdout)
    assert shown["lora"]["rank"] == 16 and "weight_decay" not in shown["optimizer"], ran.stderr


@pytest.fixture
def own_conf(tmp_path):
    (tmp_path / "my conf" / "experiment").mkdir(parents=True)
    recipe = tmp_path / "my conf" / "experiment" / "cats.yaml"
    recipe.write_text("# @package _global_\nlora: {rank: 7}\n")
    return f"hydra.searchpath=['file://{tmp_path / 'my conf'}']"


@pytest.mark.slow
def test_a_folder_of_ones_own_options_works_alone_and_in_a_sweep(door, own_conf, tmp_path):
    ran = door(own_conf, "experiment=cats", "--cfg", "job")
    assert yaml.safe_load(ran.stdout)["lora"]["rank"] == 7, ran.stderr
    command = translate.translated(["-m", own_conf, "experiment=cats", "seed=1,2"], tmp_path)
    jobs = grid.sweep_of(command.overrides(), command.composer)[1]
    assert [(config.lora.rank, config.seed) for _, config in jobs] == [(7, 1), (7, 2)]
    named = translate.translated([own_conf, "experiment=cats", "sweep=data_size"], tmp_path)
    assert grid.sweep_of(named.overrides(), named.composer)[1][0][1].lora.rank == 7
    assert "experiment=dogs: there is no such option" in door(own_conf, "experiment=dogs").stderr
    assert "must be a list of folders" in door("hydra.searchpath=/conf").stderr


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("lora.rank=choice(4,16)", "lora.rank=4"),
        ("lora.rank=4,16", "lora.rank=4"),
        ("lora.target_modules=[to_q],[to_q,to_k]", "lora.target_modules=[to_q]"),
        ("lora.target_modules=[to_q,to_k]", "lora.target_modules=[to_q,to_k]"),
        ("optimizer.learning_rate=interval(1e-5,1e-2)", "optimizer.learning_rate=1e-05"),
        ("seed=range(3,7)", "seed=3"),
        ("data.id_token='a, b'", "data.id_token='a, b'"),
        ("seed=1", "seed=1"),
    ],
)
def test_the_first_of_several_values_stands_for_them(typed, first):
    assert composing.first_value(typed) == first


def test_a_wrong_setting_of_the_search_brings_no_other_mistake(door):
    ran = door("-m", "lora.rank=choice(4,16)", "hydra.sweeper.direction=minimize")
    assert "hydra.sweeper.direction: there is no such setting here. The lowest" in ran.stderr
    assert ran.returncode == 2 and "1 setting is wrong" in ran.stderr
