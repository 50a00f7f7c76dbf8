"""What a run's process tells of errors."""

import errno
import os
import shutil
import subprocess
import sys
import time

import pytest
from settings import QUICK

from cogvx.errors import UserError
from cogvx.files import read_json, read_json_lines
from cogvx.records import record
from cogvx.records.heartbeats import beats_of
from cogvx.runs import processes


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: out of memory"), "the GPU's memory is too small"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "the GPU's memory"),
        (RuntimeError("CUDA driver error: out of memory"), "the GPU's memory is too small"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the GPU's memory is too small"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), "the GPU's memory"),
        (MemoryError(), "this machine's memory (RAM) is too small"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "(RAM)"),
        (RuntimeError("pin_memory: CUDA error: out of memory"), "(RAM)"),
    ],
)
def test_every_lack_of_memory_is_said_with_what_helps(error, said):
    message, code = processes.explained(error)
    assert code == processes.FAILED and said in message


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), TypeError("out of memory")])
def test_other_errors_keep_their_traceback(error):
    assert processes.explained(error)[1] == 1


def test_a_disk_that_fails_is_said():
    message, code = processes.explained(OSError(errno.EIO, "Input/output error", "/cache/x"))
    assert code == processes.FAILED and "a disk cannot be read or written: " in message
    assert "/cache/x" in message and "Checkpoints" in message


def test_a_folder_that_was_removed_is_said_and_not_made_again(
    compose, tmp_path, monkeypatch, capfd
):
    folder = record.open_folder(compose(f"output_dir='{tmp_path / 'run'}'"))

    def remove_it(config, place):
        (place / "progress.json").write_text("{}")
        shutil.rmtree(place)
        (place / "validation" / "none").open()

    monkeypatch.setattr(processes, "start_task", remove_it)
    assert processes.run_here(folder) == processes.FAILED
    said = capfd.readouterr().err
    assert f"error: the run's folder {folder} is gone" in said and "train.resume=NEW_PLACE" in said
    assert "Traceback" not in said and list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="is gone: it was removed or moved"):
        record.require_there(folder)


# -- torch's allocator ---------------------------------------------------------------------------


@pytest.fixture
def start_here(monkeypatch, tmp_path):
    """start_here(SETTING="..."): what PYTORCH_ALLOC_CONF is when a run's task starts."""

    def start(platform: str = "linux", release: str = "6.8.0", **environment: str) -> str | None:
        found = []
        for name in processes.ALLOCATOR_SETTINGS:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(processes.sys, "platform", platform)
        monkeypatch.setattr(processes.platform, "release", lambda: release)
        monkeypatch.setattr(processes.configuration, "read", lambda path: None)

        def start_task(config, folder):
            found.append(os.environ.get("PYTORCH_ALLOC_CONF"))
            return {"status": "done"}

        monkeypatch.setattr(processes, "start_task", start_task)
        monkeypatch.setattr(processes, "conclude_run", lambda *given: None)
        assert processes.run_here(tmp_path) == 0
        return found[0]

    yield start
    monkeypatch.undo()


def test_a_runs_memory_segments_grow_unless_the_user_says_otherwise(
    start_here, monkeypatch, tmp_path
):
    assert start_here() == "expandable_segments:True"
    recorded = read_json(tmp_path / "environment.json")["allocator"]
    assert recorded == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert start_here(PYTORCH_ALLOC_CONF="max_split_size_mb:64") == "max_split_size_mb:64"
    assert start_here(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64") is None
    assert start_here(platform="win32") is None
    assert start_here(release="5.15.167.4-microsoft-standard-WSL2") is None
    (tmp_path / "nv_tegra_release").touch()
    monkeypatch.setattr(processes, "TEGRA", tmp_path / "nv_tegra_release")
    assert start_here() is None


def test_a_driver_without_virtual_memory_is_said_with_what_helps():
    error = RuntimeError("CUDA driver error: operation not supported")
    message, code = processes.explained(error)
    assert code == processes.FAILED
    assert "PYTORCH_ALLOC_CONF=expandable_segments:False in front of the command" in message


def test_a_run_of_several_processes_is_out_of_memory_whichever_it_was(
    start_here, monkeypatch, tmp_path
):
    """The first process waits for this one until it is killed, and writes no summary."""
    monkeypatch.setenv("RANK", "1")
    no_memory = MemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    start_here()
    monkeypatch.setattr(processes, "start_task", lambda *given: (_ for _ in ()).throw(no_memory))
    assert processes.run_here(tmp_path) == processes.FAILED
    assert read_json(tmp_path / "summary.json")["status"] == "out_of_memory"


def test_a_rank_that_failed_is_seen_while_the_first_one_runs(monkeypatch, tmp_path):
    """The others may wait for it for ever."""
    monkeypatch.setattr(processes, "GRACE", 0.2)
    ranks = [
        subprocess.Popen([sys.executable, "-c", code])
        for code in ("import time; time.sleep(60)", "raise SystemExit(3)")
    ]
    started = time.monotonic()
    assert processes.wait_for_ranks(ranks, tmp_path) == [1, 3]
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_two_processes_whose_command_was_killed_are_waited_for_by_the_next_start(
    launching, launch, cache, tmp_path
):
    folder = tmp_path / "run"
    small = ["data.height=32", "data.width=32", "data.max_num_frames=5"]
    steps = ["train.max_train_steps=80", "train.logging_steps=1", "train.checkpointing_steps=80"]
    ddp = ["parallel=ddp", "parallel.num_processes=2"]
    command = [f"output_dir={folder}", f"data.cache_dir={cache}", *QUICK, *small, *steps, *ddp]
    process = launching(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(read_json_lines(folder / "metrics.jsonl")) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert [beat.rank for beat in beats_of(folder)] == [0, 1]
    # It waits for them, or they have ended meanwhile: see tests/records/test_holders.py.
    again = launch(*command)
    assert again.returncode == 0, again.stderr
    assert "resume  " in again.stdout and "is in use by another process" not in again.stderr
    steps = [n["step"] for n in read_json_lines(folder / "metrics.jsonl") if "loss" in n]
    assert steps == list(range(1, 81))
    assert not (folder / "heartbeats").exists(), "nothing stays of a run that is done"
