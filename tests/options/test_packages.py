"""A package that is not installed is named with the setting that needs it, and only then."""

import importlib.util
import sys

import pytest

import launch
from cogvx.config import Wrong
from cogvx.model import blocks
from cogvx.records import figures

NEEDED = {
    "bitsandbytes": ["memory.base_storage=nf4", "memory.gradient_checkpointing=true"],
    "wandb": ["tracking=wandb"],
    "trackio": ["tracking=trackio"],
    "tensorboard": ["tracking=tensorboard"],
    "datasets": ["data=dataset", "data.dataset_name=mine"],
    "prodigyopt": ["optimizer=prodigy"],
    "schedulefree": ["optimizer=schedule_free"],
    "torchao": ["optimizer=adamw8bit_torchao"],
}


@pytest.fixture
def without(monkeypatch):
    """without("wandb"): as if it were not installed."""
    find = importlib.util.find_spec

    def remove(*names: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name in names else find(name)
        )
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return remove


@pytest.mark.parametrize("package", NEEDED)
def test_a_missing_package_is_named_before_anything_is_loaded(package, without, compose):
    without(package)
    with pytest.raises(Wrong) as wrong:
        compose(*NEEDED[package])
    assert f"needs the package {package}, which is not installed: pip install {package}" in str(
        wrong.value
    )


def test_packages_that_no_setting_asks_for_may_be_missing(without, compose):
    without(*NEEDED, "optuna", "matplotlib")
    assert compose("model=2b").choices["optimizer"] == "adamw"


def test_a_search_without_optuna_says_what_installs_it(without, tmp_path, capsys):
    without("optuna")
    search = ["-m", "hydra/sweeper=optuna", "lora.rank=choice(4,8)", f"output_dir='{tmp_path}/s'"]
    assert launch.entry(search) == 2
    assert "hydra/sweeper=optuna needs the package optuna" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_page_without_matplotlib_says_what_is_missing(without):
    without("matplotlib")
    drawn = figures.styled(lambda: pytest.fail("nothing can be drawn"))
    assert "pip install matplotlib" in drawn()


def test_torch_without_a_limit_argument_gets_the_setting(monkeypatch):
    import torch

    def compile_of_torch_2_11(model=None, *, backend="inductor"):
        return model

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch, "compile", compile_of_torch_2_11)
    assert blocks.limit_of_variants() == {}
    assert torch._dynamo.config.recompile_limit == blocks.VARIANTS
