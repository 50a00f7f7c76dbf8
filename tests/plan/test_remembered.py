"""What was traced once is remembered, and traced again when anything that it depends on changes."""

import json
import sys

import pytest

from cogvx.files import read_json, write_text
from cogvx.options.cards import CARDS
from cogvx.plan import remembered, traces
from cogvx.plan.allocator import Peak
from cogvx.plan.found import MEMORY_PARTS, Outcome, Phase, Work

FOUND = Outcome(
    [
        Phase(
            "train",
            Peak(7, 9),
            dict.fromkeys(MEMORY_PARTS, 1),
            {("mm", "bfloat16"): Work(10**12, 10**6, 3), ("relu", None): Work(0, 5, 1)},
        )
    ],
    host=4,
    optimizer=2,
    trained=1,
)


@pytest.fixture
def config(compose, tmp_path):
    """config("lora.rank=4", ...): a configuration with a cache of this test alone."""
    return lambda *overrides: compose("model=2b", f"data.cache_dir='{tmp_path}'", *overrides)


@pytest.fixture
def traced(monkeypatch):
    """The phases and layers that were really traced."""
    done = []

    def trace_now(config, phases, layers):
        done.append((phases, layers))
        return FOUND

    monkeypatch.setattr(traces, "traced_now", trace_now)
    return done


def place(config):
    return remembered.place(config, ["train"], 2)


def test_a_trace_is_remembered(config, traced):
    job = (config(), ["train"], 2)
    assert traces.trace(job) == traces.trace(job) == FOUND and traced == [(["train"], 2)]
    assert traces.traces([job]) == [FOUND], "a pool would trace it for real"
    traces.trace((config(), ["train"], 3))
    assert len(traced) == 2
    [*files] = place(config()).parent.iterdir()
    assert len(files) == 2 and {path.suffix for path in files} == {".json"}


def test_a_damaged_file_is_traced_again(config, traced):
    job = (config(), ["train"], 2)
    path = place(job[0])
    for damage in (
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("1000000000000", "1000000000001"),
        lambda text: "{}",
        lambda text: json.dumps({**json.loads(text), "found": None}),
    ):
        traces.trace(job)
        traced.clear()
        write_text(path, damage(path.read_text()))
        assert traces.trace(job) == FOUND and len(traced) == 1
    assert read_json(path)["found"] == FOUND.to_json()


def test_a_disk_that_cannot_be_written_only_costs_the_time(config, traced, tmp_path):
    (tmp_path / "traces").write_text("no folder")
    job = (config(), ["train"], 2)
    assert traces.trace(job) == traces.trace(job) == FOUND and len(traced) == 2


@pytest.mark.slow
def test_what_a_trace_depends_on_is_in_its_name(config, monkeypatch):
    usual = place(config())
    assert usual == place(config())
    for same in (
        ["task=plan", "task.card=rtx3060_12gb"],
        ["seed=7", "optimizer.learning_rate=1e-5", "train.max_train_steps=7"],
        ["tracking=tensorboard", "scheduler=linear"],
    ):
        assert place(config(*same)) == usual, same
    changes = [
        ["lora.rank=8"],
        ["lora=null"],
        ["memory=low"],
        ["optimizer=adam"],  # the fields of another option may be the same
        ["train.mixed_precision=bf16"],
        ["train.gradient_accumulation_steps=2"],
        ["data.max_num_frames=25"],
        ["parallel=ddp"],
        ["model=5b"],
    ]
    places = {place(config(*change)) for change in changes}
    assert len(places | {usual}) == len(changes) + 1
    for changed in (["torch 3"], ["other code"]):
        monkeypatch.setattr(remembered, "versions", lambda changed=changed: changed)
        places.add(place(config()))
    assert len(places | {usual}) == len(changes) + 3


def test_the_versions_name_the_libraries_and_this_code():
    python, *libraries, code = remembered.versions()
    assert python == ".".join(map(str, sys.version_info[:3])) and len(code) == 64
    assert len(libraries) == 5 and all(version[0].isdigit() for version in libraries)


def test_the_expected_time_of_a_step_uses_what_is_remembered(config, traced):
    for card in ("rtx4090_24gb", "a100_80gb", "rtx4090_24gb"):
        assert traces.step_seconds(config(), CARDS[card]) > 0
    assert traced == [(["train"], 2), (["train"], 3)]


@pytest.mark.slow
def test_a_second_plan_traces_nothing_and_says_the_same(launch, nano_folder, tmp_path):
    small = ["data.max_num_frames=9", "data.height=64", "data.width=64", "data.fps=8"]
    asked = ["task=plan", "model=2b", f"model.path='{nano_folder}'", *small]
    first = launch(*asked, f"data.cache_dir='{tmp_path}'", f"output_dir='{tmp_path / 'a'}'")
    again = launch(*asked, f"data.cache_dir='{tmp_path}'", f"output_dir='{tmp_path / 'b'}'")
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert first.stdout.count("        planned ") == 4 and "        planned " not in again.stdout
    plans = [read_json(tmp_path / name / "plan.json") for name in "ab"]
    assert plans[0] == plans[1] and plans[0]["phases"]
