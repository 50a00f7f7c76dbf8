"""Sweeps of real jobs, killed, crashed and stopped.

What they leave; and that the same command, given again, ends where an undisturbed sweep ends.
"""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import warm

from cogvx import compose as composing
from cogvx.records import record
from cogvx.records.sweep import State, Sweep, progress_of

PROJECT = Path(__file__).parent.parent.parent
ALPHAS = ["1", "2", "4", "8", "16", "32", "64"]
FEWER = ALPHAS[:6]
TOO_HIGH = "1e38"  # no gradient is finite
MEASURED_ANEW = ("seconds", "peak_memory_gib")
PATIENCE = 240  # seconds
pytestmark = pytest.mark.slow


def arguments(cache: Path, folder: Path, *overrides: str) -> list[str]:
    """Jobs of eight steps, two at a time.

    Each has one thread, so that it gives the same bits however the jobs share the machine.
    """
    settings = [
        "scheduler.lr_warmup_steps=1",
        "train.max_train_steps=8",
        "train.checkpointing_steps=2",
        "train.logging_steps=1",
        "train.max_skipped_steps=2",
        "validation.num_validation_videos=0",
        "validation.scored_prompts=0",
        "validation.heldout_draws=2",
        "validation.heldout_timesteps=1",
        "hydra.launcher.jobs=2",
        f"data.cache_dir='{cache}'",
        f"output_dir='{folder}'",
    ]
    return ["-m", *settings, *overrides]


def started(*arguments: str, project: Path = PROJECT) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    if project == PROJECT:
        return warm.start(*arguments, **pipes, start_new_session=True)
    command = [sys.executable, str(project / "launch.py"), *arguments]
    return subprocess.Popen(command, **pipes, start_new_session=True)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in said, said
    return process.returncode, said


def jobs_in(folder: Path, *states: State) -> list[Path]:
    return [job for job in sorted(folder.glob("*/")) if progress_of(job).state in states]


def training(folder: Path) -> list[Path]:
    """The running jobs that have a checkpoint and steps before them."""
    kept = {
        job: [path.name for path in job.glob("checkpoints/step_*")]
        for job in jobs_in(folder, State.running)
    }
    return [
        job for job, steps in kept.items() if "step_000002" in steps and "step_000006" not in steps
    ]


def wait_until(there: Callable[[], object]) -> object:
    deadline = time.monotonic() + PATIENCE
    while not (found := there()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)
    return found


def process_of(job: Path) -> int:
    said = wait_until(
        lambda: re.match(r"process (\d+)", record.user_of(job))
    )  # it has locked its folder, and writes its number
    return int(said[1])


def with_signal(number: int, folder: Path) -> Path:
    """A job that was training when it got this signal."""
    job = wait_until(lambda: training(folder))[0]
    os.kill(process_of(job), number)
    wait_until(lambda: job not in jobs_in(folder, State.running))
    return job


def every_process() -> dict[int, int]:
    """Of every process that is not a zombie, its parent."""
    said = subprocess.run(
        ["ps", "-Ao", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
    ).stdout
    lines = map(str.split, said.splitlines())
    return {int(pid): int(parent) for pid, parent, state in lines if not state.startswith("Z")}


def descendants(process: int) -> list[int]:
    parent_of, found = every_process(), [process]
    for each in found:  # grows meanwhile
        found += [pid for pid, parent in parent_of.items() if parent == each]
    return found[1:]


def rows(folder: Path) -> dict[str, dict]:
    """The leaderboard by job, in its order, without what is measured anew in every run."""
    with (folder / "leaderboard.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return {
        row["folder"]: {name: row[name] for name in row if name not in MEASURED_ANEW}
        for row in found
    }


def states(folder: Path) -> dict[str, str]:
    return {job: row["state"] for job, row in rows(folder).items()}


@pytest.fixture(scope="module")
def swept() -> list[str]:
    return ["lora.rank=1", f"lora.lora_alpha={','.join([*ALPHAS, TOO_HIGH])}"]


@pytest.fixture(scope="module")
def undisturbed(cache, swept, tmp_path_factory) -> Path:
    """Eight jobs of which one fails by its settings."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, said = ended(started(*arguments(cache, folder, *swept)))
    assert code == 1, said
    found = rows(folder)
    assert Counter(row["state"] for row in found.values()) == {"done": 7, "failed": 1}
    for job, row in found.items():
        if row["state"] == "failed":
            assert "1e+38" in job and row["place"] == "" and "finite" in row["reason"]
    return folder


def test_a_sweep_killed_twice_with_crashing_jobs_ends_as_an_undisturbed_one(
    undisturbed, cache, swept, tmp_path
):
    command = arguments(cache, tmp_path, *swept)

    # Only the sweep is killed: its jobs stop by themselves. The same command goes on, even while
    # they are still stopping.
    process = started(*command)
    wait_until(lambda: training(tmp_path))
    process.kill()
    process = started(*command)
    in_the_middle = wait_until(
        lambda: len(jobs_in(tmp_path, State.done)) >= 3 and training(tmp_path)
    )[0]

    # The sweep and all its jobs are killed, and none has time to say anything.
    for each in (process_of(in_the_middle), process.pid):
        os.kill(each, signal.SIGSTOP)
    found = descendants(process.pid)
    assert process_of(in_the_middle) in found
    for each in (process.pid, *found):
        os.kill(each, signal.SIGKILL)
    wait_until(lambda: not jobs_in(tmp_path, State.running))
    assert in_the_middle in jobs_in(tmp_path, State.killed)

    # One job crashes and another one is killed: the others end.
    process = started(*command)
    crashed, killed = with_signal(signal.SIGSEGV, tmp_path), with_signal(signal.SIGKILL, tmp_path)
    code, said = ended(process)
    assert code == 1, said
    expected = states(undisturbed) | {crashed.name: "failed", killed.name: "killed"}
    assert states(tmp_path) == expected
    assert "crashed (SIGSEGV)" in rows(tmp_path)[crashed.name]["reason"]
    assert (
        "by someone or because the machine's memory ran out"
        in rows(tmp_path)[killed.name]["reason"]
    )
    assert f"failed  {crashed.name}" in said and f"killed  {killed.name}" in said

    code, said = ended(started(*command))
    assert code == 1, "some are failed"
    assert states(tmp_path) == states(undisturbed) | {crashed.name: "failed"}

    code, said = ended(started(*command, "hydra.launcher.retry_failed=true"))
    assert code == 1, "one fails again"
    assert list(rows(tmp_path).items()) == list(rows(undisturbed).items()), (
        "the same places, losses and states"
    )


def test_ctrl_c_stops_all_jobs_with_a_checkpoint_and_an_edited_yaml_changes_none(
    undisturbed, cache, tmp_path
):
    project, folder = tmp_path / "project", tmp_path / "sweep"
    for name in ("cogvx", "conf"):
        shutil.copytree(
            PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(PROJECT / "launch.py", project)
    edited = project / "conf/config.yaml"
    whole = edited.read_text(encoding="utf-8")
    command = arguments(cache, folder, "lora.rank=1", f"lora.lora_alpha={','.join(FEWER)}")

    process = started(*command, project=project)
    wait_until(lambda: training(folder))
    edited.write_text(re.sub(r"max_grad_norm: 1.0", "max_grad_norm: 1e-9", whole), encoding="utf-8")
    assert composing.composed_from([], project / "conf").train.max_grad_norm == 1e-9
    wait_until(lambda: jobs_in(folder, State.done) and training(folder))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    code, said = ended(process)
    assert code == 130, said
    stopped = jobs_in(folder, State.interrupted)
    assert stopped and {*states(folder).values()} == {"done", "interrupted", "pending"}
    assert any((job / "checkpoints").is_dir() for job in stopped)
    edited.write_text(whole, encoding="utf-8")

    code, said = ended(started(*command, project=project))
    assert code == 0, said
    assert len(Sweep.read(folder).jobs()) == len(FEWER)
    for job, row in rows(folder).items():
        beside = rows(undisturbed)[job]
        assert (row["state"], row["objective"]) == ("done", beside["objective"]), job


@pytest.fixture
def small_disk(tmp_path):
    """A disk that holds two jobs and a bit."""
    folder, mount = tmp_path / "disk", ["mount", "-t", "tmpfs", "-o", "size=2400k", "tmpfs"]
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run([*mount, str(folder)], capture_output=True).returncode != 0
    ):
        pytest.skip("to mount a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_fails_jobs_in_words_and_spares_the_done_ones(cache, small_disk):
    folder = small_disk / "sweep"
    command = arguments(cache, folder, "lora.rank=1", "lora.lora_alpha=1,2,4,8")
    code, said = ended(started(*command))
    assert code != 0 and "ree some" in said, said
    done = {job: (job / record.SUMMARY).read_bytes() for job in jobs_in(folder, State.done)}
    assert 1 <= len(done) < 4 and all(
        (job / "pytorch_lora_weights.safetensors").is_file() for job in done
    )

    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    code, said = ended(started(*command, "hydra.launcher.retry_failed=true"))
    assert code == 0, said
    assert [*states(folder).values()] == ["done"] * 4
    assert {job: (job / record.SUMMARY).read_bytes() for job in done} == done


def test_twenty_starts_at_once_have_twenty_folders(tmp_path):
    """Real starts, up to the task, which is left out."""
    start = "import runpy, sys; from cogvx.runs import processes; "
    start += "processes.run_recorded = lambda *given: 0; "
    start += "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", start, str(PROJECT / "launch.py"), "tracking=none"]
    there = {**os.environ, "PYTHONPATH": str(PROJECT)}
    starts = [
        subprocess.Popen(command, cwd=tmp_path, env=there, stdout=subprocess.DEVNULL)
        for _ in range(20)
    ]
    assert [each.wait(timeout=PATIENCE) for each in starts] == [0] * 20
    folders = list((tmp_path / "outputs").iterdir())
    assert len(folders) == 20 and all((folder / record.ENVIRONMENT).is_file() for folder in folders)


def test_two_processes_of_a_run_stop_with_a_checkpoint_when_what_started_them_is_killed(
    cache, tmp_path
):
    settings = arguments(
        cache, tmp_path, "parallel=ddp", "parallel.num_processes=2", "train.max_train_steps=20000"
    )
    process = started(*(setting for setting in settings[1:] if not setting.startswith("hydra.")))
    wait_until(lambda: (tmp_path / "checkpoints/step_000002").is_dir())
    ranks = descendants(process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: progress_of(tmp_path).state is not State.running)
    assert progress_of(tmp_path).state is State.interrupted, "the lock was theirs until the end"
    wait_until(lambda: not {*ranks} & {*every_process()})


def prints_into(pid: int, name: str) -> bool:
    """Whether the process writes its output into a file of this name."""
    try:
        return os.readlink(f"/proc/{pid}/fd/1").endswith(name)
    except OSError:  # it has ended
        return False


def test_a_run_whose_second_process_is_killed_counts_as_killed(cache, tmp_path):
    """Whatever the first one, left alone, fails of."""
    settings = arguments(
        cache, tmp_path, "parallel=ddp", "parallel.num_processes=2", "train.max_train_steps=20000"
    )
    process = started(*(setting for setting in settings[1:] if not setting.startswith("hydra.")))
    wait_until(lambda: (tmp_path / "checkpoints/step_000002").is_dir())
    # The process that writes the page and those that decode clips are among them.
    [second] = [pid for pid in descendants(process.pid) if prints_into(pid, "rank_1.log")]
    os.kill(second, signal.SIGKILL)
    said, _ = process.communicate(timeout=PATIENCE)
    assert "error: rank 1 was killed, by someone" in said
    found = progress_of(tmp_path)
    assert found.state is State.killed and found.reason.startswith("rank 1 was killed, by someone")
