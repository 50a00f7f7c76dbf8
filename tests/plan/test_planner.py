"""The planner runs the trainer's own code.

On a CPU its count of bytes is exact. For GPUs it agrees with what others have measured.
"""

import contextlib
import json
import os
import signal
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cogvx.errors import UserError
from cogvx.files import read_json
from cogvx.plan import phases, planner, remembered, traces
from cogvx.plan.allocator import GIB, replay
from cogvx.plan.configs import configs_of
from cogvx.plan.found import PHASES

PROJECT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(PROJECT / "tests" / "benchmarks"))

import calibration  # noqa: E402

SMALL = ["data.max_num_frames=9", "data.height=64", "data.width=64", "data.fps=8"]
CASES = [
    [],
    ["lora=null"],
    ["memory.gradient_checkpointing=true"],
    ["memory=balanced"],
    ["memory=low"],
    ["memory=minimal"],
    ["train.mixed_precision=bf16"],
    ["lora=null", "memory=balanced"],
    ["lora=null", "memory=balanced", "memory.offload_optimizer=true"],
    ["optimizer=schedule_free"],
]


@pytest.fixture(autouse=True)
def another_run():
    """Lets a test choose its precision, as a new process could."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def sizes(recorder) -> list[tuple]:
    """Allocations by size, and releases, in order.

    Without those at the end, where Python decides the order of releases.
    """
    events = recorder.events[: recorder.events.index(("phase", "end"))]
    return [event[0::2] for event in events]


def recorded(compose, nano_folder, overrides, wanted, **how):
    config = compose(
        "model=2b", f"model.path='{nano_folder}'", "train.mixed_precision=no", *SMALL, *overrides
    )
    return phases.run_phases(config, wanted, **how)


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
@pytest.mark.slow
def test_without_contents_as_with(compose, nano_folder, overrides):
    """Tensors without contents make every allocation and release that real tensors make.

    In order and in bytes. The operations that are counted are the same too.
    """
    fake = recorded(compose, nano_folder, overrides, ["held-out loss", "train"], as_cuda=False)
    real = recorded(
        compose, nano_folder, overrides, ["held-out loss", "train"], as_cuda=False, fake=False
    )
    assert len(fake.events) > 1000
    assert sizes(fake) == sizes(real)
    assert dict(fake.most) == dict(real.most)
    assert {k: w.flops for k, w in fake.work.items() if w.flops} == {
        k: w.flops for k, w in real.work.items() if w.flops
    }


def test_the_count_is_the_profilers(compose, nano_folder, tmp_path):
    """Against what PyTorch's profiler says that its CPU allocator gave out during a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        real = recorded(compose, nano_folder, ["lora=null"], ["train"], as_cuda=False, fake=False)
    measured.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    totals = [
        event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"
    ]
    assert len(totals) > 1000
    assert 0.98 < real.most[None] / (max(totals) - totals[0]) < 1.02


@pytest.mark.slow
def test_attention_is_planned_as_cuda_runs_it(compose):
    """The math path would hold 17,776 x 17,776 scores: 59 GiB for this step."""
    config = compose("model=2b", "memory.gradient_checkpointing=true", "train.mixed_precision=bf16")
    recorder = phases.run_phases(config, ["train"], layers=2)
    assert replay(recorder.events)["train"].allocated < 6 * GIB


@pytest.mark.slow
def test_what_a_mode_promises_holds_in_order(compose):
    """At full size with few layers: each mode takes less memory than the one before."""
    peaks = []
    for memory in ("fast", "balanced", "low", "minimal"):
        config = compose("model=5b", f"memory={memory}")
        recorder = phases.run_phases(config, ["train"], layers=4)
        peaks.append(replay(recorder.events)["train"].allocated)
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4


@pytest.mark.slow
def test_published_figures_are_met():
    """Four rows of the table, computed again: near the published figures, and as in the table."""
    rows = [row for row in calibration.ROWS if row.rank == 64 and row.optimizer == "adamw"]
    found = calibration.predictions(rows)
    assert len(rows) == 4 and max(calibration.errors_of(rows, found)) <= 0.05
    table = calibration.TABLE.read_text(encoding="utf-8")
    for line in calibration.lines_of(rows, found)[2:]:
        assert line in table, (
            "tests/golden/calibration.md is of another version: run tests/benchmarks/calibration.py"
        )


@pytest.mark.slow
def test_a_plan_prints_what_is_asked_and_leaves_it_in_the_folder(run, nano_folder, capfd):
    folder = run(
        "a",
        "task=plan",
        "model=2b",
        f"model.path='{nano_folder}'",
        *SMALL,
        "task.card=rtx3060_12gb",
    )
    said = capfd.readouterr().out
    assert said.index("runs the code of every phase") < said.index("allocated")
    for phase in PHASES:
        assert said.count(f"\n{phase}") == 1
    assert "rtx3060_12gb has 11.1 GiB free: it fits" in said and "TFLOP a step" in said
    result = json.loads((folder / "plan.json").read_text())
    assert result["fits"] and result["phases"]["train"]["reserved_gib"] > 0
    assert (folder / "plan.png").is_file() and not (folder / "checkpoints").exists()


@pytest.mark.slow
def test_what_does_not_fit_comes_with_what_would(run, capfd):
    small = ["data.max_num_frames=9", "data.height=160", "data.width=240"]
    run("a", "task=plan", "model=2b", "task.card=rtx4060_8gb", "lora.rank=64", *small)
    said = capfd.readouterr().out
    assert "rtx4060_8gb has 7.1 GiB free: it does NOT fit" in said
    assert "try     add one of these to the command" in said and "\n        memory=" in said


def test_an_unknown_card_and_an_unknown_model_are_named(run, compose, capfd):
    with pytest.raises(Exception, match=r"task.card=rtx4091 is not known; did you mean"):
        compose("task=plan", "task.card=rtx4091")
    run("a", "task=plan", "model=2b", "model.path=nobody/nothing", expect=2)
    assert "neither a folder here nor one of the released checkpoints" in capfd.readouterr().err


def test_eight_bit_moments_are_counted_as_bitsandbytes_holds_them():
    parameter = torch.nn.Parameter(torch.zeros(100, 256))
    optimizer = phases.Adam8bitMemory([parameter])
    optimizer.step()
    held = sum(t.numel() * t.element_size() for t in phases.states_of(optimizer))
    assert held == 2 * (25600 + 4 * 100)


@pytest.mark.slow
def test_what_is_planned_is_measured_where_it_can_be_counted(run, nano_folder, capfd):
    folder = run(
        "a",
        "task=plan",
        "model=2b",
        f"model.path='{nano_folder}'",
        *SMALL,
        "train.mixed_precision=no",
        "task.measure=true",
    )
    rows = json.loads((folder / "plan.json").read_text())["measured"]["phases"]
    assert list(rows) == PHASES and "this CPU (and planned for it)" in capfd.readouterr().out
    for name in ("held-out loss", "train", "video"):
        assert rows[name]["planned_gib"] == rows[name]["measured_gib"] > 0, name


@pytest.mark.slow
def test_with_steps_in_the_backward_pass_one_gradient_exists_at_a_time(compose, nano_folder):
    settings = ["lora=null", "train.max_grad_norm=null", "memory.gradient_checkpointing=true"]
    at_peak = []
    for in_backward in ("false", "true"):
        more = [*settings, f"memory.step_in_backward={in_backward}"]
        recorder = recorded(compose, nano_folder, more, ["train"], as_cuda=False)
        at_peak.append(sum(s.size for s in recorder.at_peak["train"] if s.what == "gradients"))
    weights = 4 * 1_700_000
    assert at_peak[0] > 0.5 * weights and at_peak[1] < 0.1 * weights


@pytest.mark.slow
def test_several_processes_are_planned_with_their_buckets(compose, nano_folder):
    one, two = (
        recorded(compose, nano_folder, settings, ["train"], as_cuda=False)
        for settings in (["lora=null"], ["lora=null", "parallel=ddp"])
    )
    configs = configs_of(compose(f"model.path='{nano_folder}'"))
    planned = phases.PlannedModel(Path(), phases.CPU, torch.float32, configs).transformer()
    trained = 4 * sum(parameter.numel() for parameter in planned.parameters())
    assert abs(two.most[False] - one.most[False] - trained) < 0.02 * trained


def test_a_plan_beside_a_gpu_is_not_forked_and_sees_none(compose, monkeypatch):
    started = []

    def start_pool(count, mp_context, initializer):
        started.extend([mp_context.get_start_method(), os.environ["CUDA_VISIBLE_DEVICES"]])
        found = Future()
        found.set_result("found")
        return contextlib.nullcontext(SimpleNamespace(submit=lambda function, job: found))

    monkeypatch.setattr(traces, "ProcessPoolExecutor", start_pool)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(remembered, "recall", lambda path: None)
    assert traces.traces([(compose("model=2b"), ["train"], 2)]) == ["found"]
    assert started == ["spawn", ""] and os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_killed_process_of_a_plan_is_said_in_one_line(compose, monkeypatch):
    """A multiprocessing.Pool would wait for its answer for ever."""
    monkeypatch.setattr(traces, "trace", kill_this_process)
    monkeypatch.setattr(remembered, "recall", lambda path: None)
    with pytest.raises(UserError, match="a process that plans was killed"):
        traces.traces([(compose("model=2b"), ["train"], 2)])


def kill_this_process(job):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_new_process_plans_what_a_forked_one_plans(compose, nano_folder, monkeypatch):
    config = compose("model=2b", f"model.path='{nano_folder}'", *SMALL)
    monkeypatch.setattr(remembered, "recall", lambda path: None)
    forked = traces.traces([(config, ["train"], 2)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert traces.traces([(config, ["train"], 2)]) == forked


@pytest.mark.slow
def test_the_plan_is_written_before_anything_is_measured(run, nano_folder, monkeypatch, tmp_path):
    def measure(config, found):
        assert read_json(tmp_path / "a" / "plan.json")["status"] == "done"
        raise UserError("measuring failed")

    monkeypatch.setattr(planner, "measure_phases", measure)
    small = ["model=2b", f"model.path='{nano_folder}'", *SMALL]
    run("a", "task=plan", *small, "task.measure=true", expect=2)
    assert (tmp_path / "a" / "plan.png").is_file()


def test_ram_is_said_by_process_and_together(compose):
    result = {"host_gib": 15.0}
    assert planner.ram_line(compose(), result).startswith("RAM     at most 15.0 GiB")
    several = compose("parallel=ddp", "parallel.num_processes=4")
    said = planner.ram_line(several, result)
    assert said.startswith("RAM     by process at most 15.0 GiB") and "4 processes: 68 GiB" in said


@pytest.mark.slow
def test_t5_in_fp16_has_the_layers_in_fp32_that_transformers_leaves_there(compose):
    """Half of the feed-forward's second matrices: 10.75 GiB instead of 8.87."""
    sizes = []
    for precision in ("bf16", "fp16"):
        config = compose("model=2b", f"train.mixed_precision={precision}")
        recorder = phases.run_phases(config, ["encode prompts"])
        sizes.append(recorder.peak_of_phase["encode prompts"] / GIB)
    assert 8.8 < sizes[0] < 9.0 and 10.7 < sizes[1] < 10.9


def test_the_largest_bucket_is_planned_and_videos_at_the_given_size(compose, capsys):
    from cogvx.plan.configs import at_largest_bucket
    from cogvx.plan.planner import jobs_of_phases, print_headline
    from cogvx.plan.smaller import changes_of

    given = ["task=plan", "model=2b", "data.instance_data_root=/clips"]
    auto = compose(*given, "data.buckets=auto")
    largest, plain = at_largest_bucket(auto), compose(*given)
    assert largest.data == plain.data
    assert jobs_of_phases(auto, largest) == jobs_of_phases(plain, plain)
    listed = compose(*given, "data.buckets=[49x240x368,81x720x480,25x720x480]")
    largest = at_largest_bucket(listed)
    assert (largest.data.max_num_frames, largest.data.height, largest.data.width) == (81, 720, 480)
    *encoded, (videos, phases_of_videos, _) = jobs_of_phases(listed, largest)
    assert videos.data == plain.data and phases_of_videos == ["video"]
    assert all(config.data == largest.data for config, _, _ in encoded)
    print_headline(listed)
    assert "its largest bucket, 81 frames of 480x720" in capsys.readouterr().out
    # Fewer frames would not change these buckets.
    assert "data." in str(changes_of(auto)) and "data." not in str(changes_of(listed))
