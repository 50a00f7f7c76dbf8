"""task=plan task.of=generate runs what task=generate runs."""

import json
import sys
from pathlib import Path

import pytest
import torch

from cogvx.inference import generate
from cogvx.plan import making, phases, remembered
from cogvx.plan.allocator import replay
from cogvx.plan.found import VIDEO_PHASES
from cogvx.plan.times import Times
from cogvx.plan.traces import outcome_of
from cogvx.training import videos

PROJECT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(PROJECT / "tests" / "benchmarks"))

import inference  # noqa: E402

SMALL = ["data.max_num_frames=9", "data.height=64", "data.width=64", "data.fps=8"]
PLAN = ["task=plan", "task.of=generate"]
TRACED = making.TRACED[1]


@pytest.fixture(autouse=True)
def another_run():
    """Lets a test choose its precision, as a new process could."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def nano(compose, nano_folder):
    """nano("memory=low", ...): the settings of a plan for a small video of nano."""
    model = ["model=2b", f"model.path='{nano_folder}'", "train.mixed_precision=no"]
    return lambda *overrides: compose(*PLAN, *model, *SMALL, *overrides)


def sizes(recorder) -> list[tuple]:
    """Allocations by size, and releases, in order.

    Without those at the end, where Python decides the order of releases.
    """
    events = recorder.events[: recorder.events.index(("phase", "end"))]
    return [event[0::2] for event in events]


def slow(*case: str):
    return pytest.param(case, marks=pytest.mark.slow, id=" ".join(case) or "fast")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["memory=minimal"], id="memory=minimal"),
        slow(),
        slow("memory=low"),
        slow("memory=low", "lora=null"),
        slow("memory=balanced", "memory.frugal_videos=true", "lora=null"),
        slow("validation.scheduler=dpm", "validation.guidance_scale=1"),
    ],
)
def test_without_contents_as_with(nano, overrides):
    """Every allocation and release of a real video is planned, in order and in bytes."""
    fake, real = (
        phases.run_phases(nano(*overrides), TRACED, as_cuda=False, fake=each)
        for each in (True, False)
    )
    assert sizes(fake) == sizes(real)
    assert len(fake.events) > 1000 and dict(fake.most) == dict(real.most)


@pytest.mark.slow
def test_the_count_is_the_profilers(nano, tmp_path):
    """Against what PyTorch's profiler says that denoising took beside the weights.

    The VAE's convolutions have buffers of their own on a CPU, which are not planned.
    """
    from torch.profiler import ProfilerActivity, profile

    measured = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    make, decode = generate.generate, generate.vae_alone

    def started(*given, **named):
        measured.start()
        return make(*given, **named)

    def stopped(*given):
        measured.stop()
        return decode(*given)

    config = nano()
    with phases.patched(videos, generate=started), phases.patched(generate, vae_alone=stopped):
        phases.run_phases(config, TRACED, as_cuda=False, fake=False)
    measured.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    totals = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"]
    planned = replay(phases.run_phases(config, TRACED, as_cuda=False).events)
    most = planned["denoise"].allocated - planned["load"].allocated
    assert len(totals) > 1000
    assert 0.98 < most / (max(totals) - totals[0]) < 1.02


# -- on the second device ------------------------------------------------------------------------


def traced(compose, *overrides: str, layers: int = 2):
    settings = ["train.mixed_precision=bf16", "data.max_num_frames=9", *overrides]
    return phases.run_phases(compose(*PLAN, *settings), TRACED, layers=layers)


@pytest.mark.slow
def test_image_to_video_has_its_image_encoded_and_no_weights_beside_the_vae(compose):
    recorder = traced(compose, "model=5b_i2v", "memory=low")
    found = [phase.name for phase in outcome_of(recorder).phases]
    assert found == ["load", "encode image", "denoise", "decode"]

    def held(phase: str, what: str) -> int:
        return sum(about.size for about in recorder.at_peak[phase] if about.what == what)

    assert held("denoise", "frozen weights") > 2**20
    assert held("decode", "frozen weights") == 0 < held("decode", "VAE weights")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["model=2b", "memory=low_full"],
        ["model=5b_i2v", "memory=minimal", "lora=null"],
        ["model=1_5_5b", "memory=low", "lora=null"],
        ["model=1_5_5b_i2v", "memory=balanced", "data.height=384", "data.width=688"],
    ],
    ids=" ".join,
)
def test_a_video_leaves_nothing_on_the_cpu(compose, overrides):
    recorder = traced(compose, *overrides)
    wide = [op for (_, op, kind), w in recorder.work.items() if kind is torch.float32 and w.flops]
    assert recorder.work and not wide, f"in fp32: {wide}"


# -- what is said --------------------------------------------------------------------------------


def test_the_time_of_a_video(compose):
    times = {
        "denoise": Times(2.0, 0, 0, to_card=1.0, to_ram=0, waiting=0.5, in_ram=0),
        "decode": Times(0, 3.0, 0, to_card=0, to_ram=0, waiting=0, in_ram=0),
    }
    config = compose(*PLAN, "model=2b", "validation.num_inference_steps=10")
    assert making.seconds_by_part(config, times) == {"denoise": 25, "decode": 3}
    assert making.seconds_of_video(config, times) == 28


def test_a_trace_of_a_video_is_not_one_of_training(compose):
    config = compose(*PLAN, "model=2b")
    assert remembered.place(config, TRACED, 2) != remembered.place(config, ["load", "video"], 2)


def test_settings_of_training_do_not_stop_the_plan_of_a_video(compose):
    compose(*PLAN, "model=2b", "memory.stream_weights=true")
    compose(*PLAN, "model=2b", "lora=null", "memory=low")
    with pytest.raises(Exception, match="saves nothing"):
        compose("task=plan", "model=2b", "memory.stream_weights=true")


@pytest.mark.slow
def test_a_plan_prints_what_is_asked_and_measures_it(run, nano_folder, capfd):
    settings = ["model=2b", f"model.path='{nano_folder}'", "train.mixed_precision=no"]
    folder = run("a", *PLAN, *settings, *SMALL, "task.measure=true", "task.card=rtx3060_12gb")
    said = capfd.readouterr().out
    assert "a video with a LoRA rank" in said and "s a video on rtx3060_12gb" in said
    result = json.loads((folder / "plan.json").read_text())
    assert result["fits"] and result["seconds_per_video"] > 0 and result["of"] == "generate"
    rows = result["measured"]["phases"]
    assert list(rows) == [name for name in VIDEO_PHASES if name != "encode image"]
    for name in ("load", "denoise", "decode"):
        assert rows[name]["planned_gib"] == rows[name]["measured_gib"] > 0, name
    assert "Time of a video" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_does_not_fit_comes_with_what_would(run, capfd):
    small = ["data.max_num_frames=9", "data.height=160", "data.width=240"]
    run("a", *PLAN, "model=2b", "task.card=rtx4060_8gb", *small)
    said = capfd.readouterr().out
    assert "rtx4060_8gb has 7.1 GiB free: it does NOT fit" in said
    assert "\n        memory=" in said and "times as long a video" in said


def test_the_goals_are_met():
    """2B in fp16 in 4 GB and 5B in bf16 in 6 GB, by the table."""
    most = {}
    for row in inference.TABLE.read_text(encoding="utf-8").splitlines():
        if "memory=minimal |" in row:
            most[row.split()[1]] = float(row.partition("**")[2].partition("**")[0])
    assert most["model=2b"] <= 4 and most["model=5b"] <= 6


@pytest.mark.slow
def test_the_table_is_of_this_version():
    [row] = [r for r in inference.ROWS if "model=2b" in r.settings and "minimal" in r.settings]
    table = inference.TABLE.read_text(encoding="utf-8")
    assert inference.line(row, inference.planned(row)) in table, "run tests/benchmarks/inference.py"
