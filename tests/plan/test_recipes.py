"""Every recipe of conf/experiment/ can be planned at full size, and needs the memory it states."""

import dataclasses
import re

import pytest

from cogvx import config as configuration
from cogvx.plan import phases, planner
from cogvx.plan.allocator import GIB, replay

RECIPES = sorted((configuration.CONF / "experiment").glob("*.yaml"))
STATED = re.compile(r"plans ([\d.]+) GiB")


@pytest.fixture(autouse=True)
def another_run():
    """Lets a test choose its precision, as a new process could."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def quickly(config):
    """With two micro-batches a step at most: all after the first are alike."""
    accumulation = min(2, config.train.gradient_accumulation_steps)
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, gradient_accumulation_steps=accumulation)
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipes_step_can_be_taken(path, compose):
    config = compose(f"experiment={path.stem}", "data.instance_data_root=/clips")
    planner.require_known(config)
    recorder = phases.run_phases(quickly(config), ["train"], layers=2)
    assert replay(recorder.events)["train"].allocated > 0
    assert len(RECIPES) >= 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if STATED.search(path.read_text(encoding="utf-8"))],
    ids=lambda path: path.stem,
)
def test_a_recipe_takes_the_memory_that_it_states(path, compose):
    config = compose(f"experiment={path.stem}", "data.instance_data_root=/clips")
    stated = float(STATED.search(path.read_text(encoding="utf-8"))[1])
    recorder = phases.run_phases(quickly(config), ["train"])
    assert abs(replay(recorder.events)["train"].reserved / GIB - stated) < 0.1
