"""The short form: some kills and injections of those that long.py makes by the hundred."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

import launch as launching_script
import warm
from injected import INJECTIONS, Injecting
from kinds import INTERVAL, KINDS
from trials import Place, run_trial

from cogvx.files import unfinished

# Of every room: (kind, seed of the trial). Each kills two or three times, and recovers.
TRIALS = [("LoRA, videos", 2), ("full", 1), ("task=encode", 1), ("two processes", 0)]
INJECTED = ["Newest checkpoint: a flipped byte", "metrics.jsonl: truncated"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("kills"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), TRIALS)
def test_a_killed_run_ends_as_an_undisturbed_one(place, kind, seed):
    trial = run_trial(place, kind, seed)
    assert trial.kills, "the kill must have met"
    assert trial.recovered and trial.fault is None, trial
    assert trial.differences == [] and trial.strays == [] and trial.again <= INTERVAL
