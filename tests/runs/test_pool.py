"""The processes of a sweep's jobs, with and without a GPU in the machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from cogvx.errors import UserError
from cogvx.files import read_json
from cogvx.records.sweep import SWEEP, Sweep
from cogvx.runs import pool
from cogvx.runs.jobs import SERVER_ENDED, record_end

PROJECT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(("visible", "method"), [("0", "spawn"), ("", "forkserver")])
def test_jobs_are_forked_only_where_no_gpu_is_visible(monkeypatch, tmp_path, visible, method):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    started = pool.JobProcesses(Sweep(tmp_path, None, []), [])
    assert started.context.get_start_method() == method


def test_a_sweeps_own_process_never_asks_for_a_gpu():
    """It imports no torch, so a job can choose its GPU before anything looks at the driver."""
    code = "import sys, launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


class Server:
    """In the place of a forkserver that is killed while it starts the first `times` jobs."""

    def __init__(self, times: int):
        self.left = times

    def Process(self, **given):
        return self

    def start(self):
        self.left -= 1
        if self.left >= 0:
            raise EOFError("unexpected EOF")


def test_a_killed_server_of_jobs_is_said_in_one_line_and_starts_again(tmp_path, capsys):
    started = pool.JobProcesses(Sweep(tmp_path, None, []), [])
    started.context = Server(1)
    assert started.started(()) is started.context
    said = capsys.readouterr().err
    assert (
        said.startswith("warning the server that starts jobs was killed") and said.count("\n") == 1
    )
    started.context = Server(99)
    with pytest.raises(UserError, match="was killed 3 times"):
        started.started(())


def test_a_job_whose_server_was_killed_too_is_started_again_by_the_same_command(tmp_path):
    (tmp_path / "config.yaml").touch()
    record_end(tmp_path, SERVER_ENDED)
    assert read_json(tmp_path / "summary.json")["status"] == "killed"


@pytest.mark.slow
def test_the_preload_never_asks_for_a_gpu():
    """It used to, so that CUDA could not be used in a fork of it. Jobs beside a GPU are still new
    processes: forks of this preload have not been tried on one."""
    code = (
        "import torch; asked = []; torch.cuda.is_available = lambda: bool(asked.append(1)); "
        "import cogvx.runs.preloaded; print(len(asked))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert int(ran.stdout.split()[-1]) == 0


@pytest.mark.slow
def test_a_sweep_on_a_machine_with_a_gpu_runs_its_jobs(launch, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    ran = launch(
        "-m",
        "lora.rank=1,2",
        "train.max_train_steps=2",
        "validation.num_validation_videos=0",
        "validation.scored_prompts=0",
        "validation.heldout_timesteps=1",
        f"data.cache_dir={cache}",
        f"output_dir={tmp_path / 'sweep'}",
    )
    assert ran.returncode == 0, ran.stderr
    jobs = read_json(tmp_path / "sweep" / SWEEP)["jobs"]
    states = [read_json(tmp_path / "sweep" / job / "summary.json")["status"] for job in jobs]
    assert states == ["done", "done"]
