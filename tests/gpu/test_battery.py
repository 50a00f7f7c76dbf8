"""The battery itself, on any machine; and with `-m gpu` its entries, small, on this one's GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import battery  # noqa: E402
import entries  # noqa: E402
import table  # noqa: E402
from table import Row  # noqa: E402

PLANTED = ["--rehearse", "--entries", str(HERE / "planted.py"), "--beside", "2"]


def started(out: Path, *arguments: str, source: list[str] = PLANTED) -> subprocess.Popen:
    command = [sys.executable, str(HERE / "battery.py"), *source, "--out", str(out), *arguments]
    # A battery that is killed leaves its scratch folder.
    scratch = os.environ | {"TMPDIR": str(out)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=scratch)


def found_in(out: Path) -> dict:
    return json.loads((out / "battery.json").read_text(encoding="utf-8"))


def rows_of(found: dict, entry: str) -> list[dict]:
    return [row for row in found["rows"] if row["entry"] == entry and row["status"] != "time"]


def has_ended(number: int) -> bool:
    """Also if nobody has asked how it ended: then /proc still has it, in state Z."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("battery")
    assert started(out).wait(120) == 1, "something is to be mended"
    return out


def test_an_entry_that_fails_costs_its_own_lines_only(whole):
    found = found_in(whole)
    assert set(found["states"].values()) == {"done"} and len(found["states"]) == 8
    [before, error] = rows_of(found, "raises")
    assert before["value"] == 1
    assert error["note"].startswith(
        "RuntimeError: CUDA error: out of memory ... Compile with TORCH_USE_CUDA_DSA"
    )
    [crash] = rows_of(found, "crashes")
    assert crash["note"] == "ended by SIGSEGV; its last line: the last words"
    child, hang = rows_of(found, "hangs")
    line = 1 + (HERE / "planted.py").read_text().splitlines().index("    time.sleep(600)")
    assert hang["note"] == f"stopped after 6 s, its limit, at tests/gpu/planted.py:{line}"
    assert has_ended(child["value"]), "what it started is ended too"
    assert rows_of(found, "last")[0]["verdict"] == "ok"


def test_entries_that_measure_no_time_run_beside_each_other(whole):
    found = found_in(whole)
    assert rows_of(found, "beside_1")[0]["value"] == "beside_2"
    assert rows_of(found, "beside_2")[0]["value"] == "beside_1"


def test_the_table_says_what_to_mend(whole):
    page = (whole / "battery.md").read_text(encoding="utf-8")
    mend = page.partition("## To mend")[2].partition("\n## ")[0]
    assert "`good`: good: peak of another phase  13 GiB  expected at most 12  off" in mend
    assert "Look at cogvx/model/blocks.py" in mend
    assert mend.count("\n- ") == 4
    assert "there is no such card" in page and "there is no such card" not in mend
    assert "8 entries: 3 as expected, 4 with something to mend, 1 skipped, 0 not reached." in page
    assert "the last words" in (whole / "battery.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_cut_off_keeps_every_line_that_is_written(tmp_path, number):
    with started(tmp_path, "--only", "good", "hangs", "last") as process:
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            time.sleep(0.05)
            if (tmp_path / "battery.json").exists() and rows_of(found_in(tmp_path), "hangs"):
                break
        process.send_signal(number)
        process.wait(30)
    found = found_in(tmp_path)
    assert [row["value"] for row in rows_of(found, "good")] == [11.0, 13.0]
    assert found["states"]["last"] == "not reached"
    page = (tmp_path / "battery.md").read_text(encoding="utf-8")
    assert "| peak | 11 GiB | at most 12 |" in page
    if number == signal.SIGKILL:
        # Nobody is left who could end the entry and what it started.
        child = rows_of(found, "hangs")[0]["value"]
        entry = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1]
        for left in (int(entry), child):
            os.kill(left, signal.SIGKILL)
    else:
        assert found["states"]["hangs"] == "cut off"


def test_what_the_time_is_too_short_for_is_not_reached(tmp_path):
    started(tmp_path, "--budget", "20", "--only", "hangs", "good", "last").wait(60)
    states = found_in(tmp_path)["states"]
    assert states["good"] == "done"
    started(tmp_path, "--budget", str(battery.SMALLEST_REST - 1), "--only", "good").wait(60)
    assert found_in(tmp_path)["states"] == {"good": "not reached"}
    assert "*not reached*" in (tmp_path / "battery.md").read_text(encoding="utf-8")


def test_a_line_is_judged_by_its_plan_and_its_limit():
    plans = {"5b low": {"phases": {"train": {"reserved_gib": 10.0}}, "seconds_per_step": 2.0}}
    place = ["5b low", "phases", "train", "reserved_gib"]
    row = Row("mode", "train", 10.4, "GiB", plan=place, bound=0.05)
    assert table.verdict(row, plans) == "ok"
    assert table.expectation(row, plans) == ("10", "+4.0%")
    assert table.verdict(Row("mode", "train", 9.4, "GiB", plan=place, bound=0.05), plans) == "off"
    assert (
        table.verdict(Row("mode", "train", 10.4, plan=place, bound=0.05, most=10), plans) == "off"
    )
    unplanned = Row("mode", "train", 10.4, "GiB", plan=["2b low", "x"], bound=0.05)
    assert table.verdict(unplanned, plans) == "info"
    assert table.expectation(unplanned, plans)[0] == "no plan"


def test_every_entry_has_something_to_run():
    names = [entry.name for entry in entries.ENTRIES]
    assert len(names) == len({*names}) >= 25
    assert all(callable(entries.function(name)) for name in names)


@pytest.mark.parametrize("changed", [None, "pytorch_lora_weights.safetensors", "metrics.jsonl"])
def test_a_run_that_differs_in_one_bit_is_off(tmp_path, changed):
    import launched

    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_lora_weights.safetensors").write_bytes(b"\0" * 64)
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 0.25}\n')
    if changed is not None:
        content = bytearray((tmp_path / "again" / changed).read_bytes())
        # The last digit of the loss, or any bit of the weights.
        content[-3 if changed.endswith(".jsonl") else 10] ^= 1
        (tmp_path / "again" / changed).write_bytes(content)
    here = battery.Here("deterministic", tmp_path / "rows.jsonl", tmp_path, "cpu", small=True)
    launched.tell_same_bits(here, tmp_path / "whole", tmp_path / "again")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    expected = {None: ["ok", "ok"], "metrics.jsonl": ["ok", "off"]}.get(changed, ["off", "ok"])
    assert [row["status"] for row in rows] == expected


def test_a_step_without_memory_is_rehearsed(tmp_path, monkeypatch):
    """Its runs are not made here: what is said of the one that fails is judged."""
    import launched

    reason = (
        "a run ended with exit code 2: the GPU's memory is too small for this: it ended while "
        "training (forward pass of step 1).\n       The error: CUDA out of memory."
    )
    tries = iter([None, RuntimeError(reason), None])

    def run_here(folder, *settings):
        error = next(tries)
        if error is not None:
            raise error
        folder.mkdir(exist_ok=True)
        (folder / "summary.json").write_text('{"status": "done", "memory_by_phase": {}}')
        return folder

    monkeypatch.setattr(launched, "run_here", run_here)
    here = battery.Here("out_of_memory", tmp_path / "rows.jsonl", tmp_path, "cpu", small=True)
    launched.out_of_memory(here)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["ok", "ok"]


def test_what_is_planned_is_what_the_chosen_entries_run(tmp_path):
    chosen = [entry for entry in entries.ENTRIES if entry.name in ("mode_5b_low", "compiled")]
    card = ("NVIDIA H100 80GB HBM3", 79.6)
    found = entries.plans(chosen, card, small=False, scratch=tmp_path)
    assert [*found] == ["5b low", "2b balanced"]
    assert "task.card=h100_80gb" in found["5b low"] and "model=5b" in found["5b low"]


def test_idle_time_is_what_no_kernel_covers():
    import real_size

    assert real_size.covered([(0, 10, "a"), (5, 12, "b"), (20, 30, "a")]) == 22
    assert real_size.covered([]) == 0


def test_weights_are_random_and_the_same_for_both_libraries():
    import real_size
    import torch
    from transformers import T5Config, T5EncoderModel

    from cogvx.plan.trace import initialized_by, metering

    settings = T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, vocab_size=40)
    with initialized_by(real_size.fill):
        weights = [T5EncoderModel(settings).shared.weight for _ in range(2)]
        layer = torch.nn.Linear(16, 40, bias=False)
    assert torch.equal(*weights) and torch.equal(weights[0], layer.weight)
    assert 0.01 < float(layer.weight.detach().std()) < 0.03
    assert not torch.equal(T5EncoderModel(settings).shared.weight, weights[0])
    with metering(torch.device("cpu")):
        assert {
            float(weight) for weight in T5EncoderModel(settings).shared.weight.detach().view(-1)
        } == {float(torch.tensor(0.01))}


def test_an_error_of_a_command_is_its_first_and_its_last_line():
    import launched

    lines = ["run  outputs/x", "Traceback (most recent call last):", "ValueError: no", "the end"]
    assert launched.complaint(lines, 1) == "exit code 1: ValueError: no\nthe end"


def test_a_checkpoint_is_written_in_files_that_load(tmp_path, monkeypatch):
    import checkpoint_files
    import torch
    from safetensors.torch import load_file

    monkeypatch.setattr(checkpoint_files, "SHARD", 2 * 64 * 64 + 200)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    size = checkpoint_files.write_part(tmp_path, "model", layers)
    assert size == 2 * 2 * (64 * 64 + 64)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) == 2
    loaded = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        loaded |= load_file(path)
    assert {name: weight.shape for name, weight in loaded.items()} == {
        name: weight.shape for name, weight in layers.state_dict().items()
    }
    assert all(weight.dtype is torch.float16 for weight in loaded.values())
    assert 0.015 < float(loaded["0.weight"].float().std()) < 0.025


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", [entry.name for entry in entries.ENTRIES])
def test_an_entry_runs_small_on_this_gpu(name, tmp_path):
    if battery.gpu() is None:
        pytest.skip("no GPU here")
    assert battery.main(["--small", "--only", name, "--out", str(tmp_path)]) == 0, (
        tmp_path / "battery.md"
    ).read_text(encoding="utf-8")
