"""A run as one Slurm job, told three times to make room: the script of docs/more_machines.md.

tests/slurm_loopback.sh starts a Slurm on this machine, with a partition whose jobs preempt others.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from settings import QUICK

from cogvx.files import read_json_lines
from cogvx.records.heartbeats import beats_of
from cogvx.records.sweep import is_locked

PROJECT = Path(__file__).parent.parent.parent
WITHIN = 30  # seconds from the signal to the end of the run: what Slurm's KillWait allows
SETTINGS = [
    *QUICK,
    "data=world",
    "data.clips=48",
    "train.max_train_steps=60",
    "train.logging_steps=1",
    "train.checkpointing_steps=30",
    "validation.num_validation_videos=2",
    "validation.num_inference_steps=50",
    "validation.validation_steps=20",
    "validation.validation_prompt='a circle'",
]


def partitions() -> str:
    if shutil.which("sinfo") is None:
        return ""
    return subprocess.run(["sinfo", "--format=%R"], capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(
    "urgent" not in partitions(), reason="no Slurm answers here: tests/slurm_loopback.sh starts one"
)
def test_a_job_that_makes_room_is_queued_again_and_goes_on(tmp_path):
    """While clips are encoded, in a validation video, and in a training step."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    script = script_of_the_docs()
    settings = [*SETTINGS, f"output_dir={run}", f"data.cache_dir={tmp_path}/cache"]
    command = " ".join([sys.executable, str(PROJECT / "launch.py"), *settings])
    script = re.sub("^srun .*$", f"srun {command}", script, flags=re.MULTILINE)
    (tmp_path / "job.sh").write_text(script)
    where = [f"--output={log}", f"--chdir={PROJECT}", "--cpus-per-task=1"]
    job = slurm("sbatch", "--parsable", "--partition=main", *where, str(tmp_path / "job.sh"))

    def within(phase: str, ask: list[str]) -> float:
        """Seconds that the run takes to end."""
        wait_for(lambda: phase in phases(run) and is_locked(run), job, log)
        asked = time.monotonic()
        slurm(*ask)
        wait_for(lambda: not is_locked(run), job, log)
        took = time.monotonic() - asked
        assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
        wait_for(lambda: "PENDING" in state(job), job, log)
        return took

    took = {"encode clips": within("encode clips", ["scancel", "--signal=USR1", job])}
    start_now(job)
    wait_for(lambda: (run / "metrics.jsonl").is_file(), job, log)
    in_loop = lambda: any("loss" in n for n in read_json_lines(run / "metrics.jsonl"))  # noqa: E731
    wait_for(in_loop, job, log)
    took["video"] = within("video", ["scancel", "--signal=USR2", job])
    start_now(job)
    everything = f"--cpus-per-task={subprocess.os.cpu_count()}"
    urgent = ["sbatch", "--parsable", "--partition=urgent", everything, "--wrap=sleep 1"]
    took["train"] = within("train", urgent)
    wait_for(lambda: "urgent" not in slurm("squeue", "--noheader", "--format=%P"), job, log)
    start_now(job)
    wait_for(lambda: "COMPLETED" in slurm("scontrol", "show", "job", job), job, log)
    print("seconds from the signal to the end of the run:", took)
    assert json.loads((run / "summary.json").read_text())["status"] == "done", log.read_text()
    assert max(took.values()) < WITHIN
    steps = [n["step"] for n in read_json_lines(run / "metrics.jsonl") if "loss" in n]
    assert steps == list(range(1, 61)), "every step once"
    assert len([*run.glob("validation/step_*/*_before_after.mp4")]) == 6


def script_of_the_docs() -> str:
    page = (PROJECT / "docs" / "more_machines.md").read_text(encoding="utf-8")
    return re.search(r"```bash\n(#!/bin/bash\n.*?)```", page, re.DOTALL)[1]


def phases(run: Path) -> list[str | None]:
    return [beat.phase for beat in beats_of(run)]


def state(job: str) -> str:
    return slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T")


def start_now(job: str) -> None:
    """Slurm would wait two minutes before it starts a job again.

    It refuses one in the second in which it put it back: "Job credential revoked".
    """
    time.sleep(3)
    slurm("scontrol", "update", f"jobid={job}", "starttime=now")


def wait_for(holds, job: str, log: Path) -> None:
    deadline = time.monotonic() + 240
    while not holds():
        if time.monotonic() > deadline:
            said = log.read_text() if log.is_file() else "nothing"
            pytest.fail(f"{slurm('scontrol', 'show', 'job', job)}\n{said}")
        time.sleep(0.02)


def slurm(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True)
    # A job that has ended is soon forgotten.
    assert ran.returncode == 0 or "Invalid job id" in ran.stderr, (command, ran.stderr)
    return ran.stdout.strip()
