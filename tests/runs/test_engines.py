"""Sweeps through Hydra's launchers. Launchers that are not installed are skipped.

tests/slurm_loopback.sh starts a Slurm on this machine.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cogvx.errors import UserError
from cogvx.files import read_json_lines
from cogvx.records import record
from cogvx.records.sweep import State, Sweep
from cogvx.runs import engines, grid

PROJECT = Path(__file__).parent.parent.parent
QUICK = [
    "validation.num_validation_videos=0",
    "validation.scored_prompts=0",
    "validation.heldout_steps=1000",
    "validation.heldout_timesteps=2",
    "scheduler.lr_warmup_steps=0",
]
# Long enough to be killed between the first checkpoint and the last step.
STEPS = 80
LONG = [f"train.max_train_steps={STEPS}", "train.checkpointing_steps=10", *QUICK]


def is_installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:
        return False


def slurm_is_up() -> bool:
    return (
        shutil.which("sinfo") is not None
        and subprocess.run(["sinfo"], capture_output=True).returncode == 0
    )


SUBMITIT, RAY = is_installed("hydra_submitit_launcher"), is_installed("hydra_ray_launcher")
with_submitit = pytest.mark.skipif(
    not SUBMITIT, reason="pip install -r sweeps/requirements-slurm.txt"
)
with_ray = pytest.mark.skipif(not RAY, reason="pip install -r sweeps/requirements-ray.txt")
with_slurm = pytest.mark.skipif(
    not slurm_is_up(), reason="no Slurm answers here: tests/slurm_loopback.sh starts one"
)


@pytest.fixture
def frozen(tmp_path):
    """A sweep of two ranks, frozen and not started."""
    made, jobs, _ = grid.sweep_of(
        ["lora.rank=4,8", f"output_dir={tmp_path / 'sweep'}"], grid.Composer()
    )
    made.freeze(jobs, ["launch.py"])
    return made


@pytest.fixture
def start(launching, cache, tmp_path):
    """start("lora.rank=1,2", ...): a sweep that takes long enough to be disturbed."""
    settings = ["-m", *LONG, f"data.cache_dir={cache}", f"output_dir={tmp_path}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return lambda *more: launching(*settings, *more, **pipes)


class Launcher:
    """In the place of one of Hydra's."""

    def __init__(self, launch: Callable):
        self.given, self.outcome = [], launch

    def launch(self, job_overrides: list[list[str]], initial_job_idx: int) -> list:
        self.given += job_overrides
        return self.outcome()


def test_an_engine_is_told_the_folders_of_the_jobs_that_are_not_over(frozen):
    record.finish(frozen.folder / "rank-4", {"status": "done"})
    launcher = Launcher(lambda: [None])
    engines.run_with_launcher(frozen, frozen.jobs(), launcher)
    assert launcher.given == [[f"output_dir={frozen.folder / 'rank-8'}"]]


def test_an_engine_that_gives_up_and_a_job_that_it_lost_end_in_words(frozen, capsys):
    def lose() -> list:
        record.note(frozen.folder / "rank-8", steps=9)
        raise RuntimeError("no machine is left\nand more")

    assert engines.run_with_launcher(frozen, frozen.jobs(), Launcher(lose)) == 1
    rank_4, rank_8 = (frozen.progress(job) for job in frozen.jobs())
    assert (rank_4.state, rank_8.state) == (State.pending, State.killed)
    assert json.loads((frozen.folder / "rank-8" / "summary.json").read_text())["reason"].startswith(
        "RuntimeError: no machine is left and more;"
    )
    assert (
        "rank-4 was not started: RuntimeError: no machine is left and more;"
        in capsys.readouterr().err
    )


def test_nothing_but_its_folder_is_composed_for_a_job_again():
    base = grid.Composer().compose(["lora.rank=4"])
    composed = engines.Frozen().load_sweep_config(base, ["output_dir=/a b/c=d, e"])
    assert composed.output_dir == "/a b/c=d, e" and base.output_dir is None
    assert composed.lora.rank == 4


@pytest.mark.parametrize("option", ["ray", "submitit_slurm", "submitit_local"])
def test_a_plugin_that_is_missing_is_named_with_what_installs_it(option):
    with pytest.raises(
        UserError, match=rf"hydra/launcher={option} needs .* pip install -r sweeps/requirements-"
    ):
        engines.require_plugin(f"hydra/launcher/{option}")
    assert all((PROJECT / file).is_file() for file in engines.PLUGINS.values())


@pytest.mark.parametrize(
    ("option", "plugin", "there"),
    [("slurm", "submitit_slurm", SUBMITIT), ("ray_cluster", "ray", RAY)],
)
def test_our_own_options_compose_or_say_what_is_missing(launch, tmp_path, option, plugin, there):
    if there:
        _, _, base = grid.sweep_of(["lora.rank=4,8", f"hydra/launcher={option}"], grid.Composer())
        assert (
            engines.are_asked(base)
            and engines.launcher(Sweep(tmp_path, None, []), base) is not None
        )
    else:
        ran = launch("-m", "lora.rank=4,8", f"hydra/launcher={option}", cwd=tmp_path)
        assert ran.returncode == 2 and f"hydra/launcher={plugin} needs a plugin" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_that_is_none_is_refused_before_there_is_a_folder(launch, tmp_path):
    ran = launch("-m", "lora.rank=4,8", "hydra.launcher._target_=os.getcwd", cwd=tmp_path)
    assert (
        ran.returncode == 2
        and "os.getcwd cannot be used" in ran.stderr
        and "Traceback" not in ran.stderr
    )
    assert list(tmp_path.iterdir()) == []


@with_submitit
def test_a_sweep_in_processes_of_submitit(launch, cache, tmp_path):
    settings = [
        "lora.rank=1,2",
        "train.max_train_steps=4",
        *QUICK,
        f"data.cache_dir={cache}",
        f"output_dir={tmp_path}",
    ]
    ran = launch("-m", *settings, "hydra/launcher=submitit_local")
    assert ran.returncode == 0, ran.stderr
    assert states(tmp_path) == {"rank-1": "done", "rank-2": "done"}
    assert (
        "report  " in (tmp_path / "rank-1" / "log.txt").read_text() and "report  " not in ran.stdout
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        "basic",
        pytest.param("submitit_local", marks=with_submitit),
        pytest.param("ray", marks=with_ray),
    ],
)
def test_a_killed_job_costs_the_others_nothing_and_the_same_command_completes_it(
    start, tmp_path, engine
):
    sweep = start("lora.rank=1,2", f"hydra/launcher={engine}")
    os.kill(process_of(tmp_path / "rank-1", sweep), signal.SIGKILL)
    said, complaints = sweep.communicate(timeout=240)
    assert sweep.returncode == 1, complaints
    assert states(tmp_path) == {"rank-1": "killed", "rank-2": "done"}
    assert "killed  rank-1: killed, by someone" in said and (tmp_path / "leaderboard.csv").is_file()
    again = start("lora.rank=1,2", f"hydra/launcher={engine}")
    assert again.wait(timeout=240) == 0
    assert states(tmp_path) == {"rank-1": "done", "rank-2": "done"}
    assert_resumed(tmp_path / "rank-1")


@pytest.mark.slow
@with_submitit
@with_slurm
def test_slurm_puts_a_job_back_into_the_queue_and_it_goes_on_from_its_checkpoint(start, tmp_path):
    """One job is told that its time is up, one is killed, one cancelled.

    Then the same command completes the last two.
    """
    settings = [
        "lora.rank=1,2,4",
        "hydra/launcher=slurm",
        "hydra.launcher.gpus_per_node=null",
        "hydra.launcher.timeout_min=20",
    ]
    sweep = start(*settings)
    process_of(tmp_path / "rank-1", sweep)
    array = slurm("squeue", "--noheader", f"--name={tmp_path.name}", "--format=%F").split()[0]
    slurm("scancel", "--signal=USR2", f"{array}_0")
    os.kill(process_of(tmp_path / "rank-2", sweep), signal.SIGKILL)
    process_of(tmp_path / "rank-4", sweep)
    slurm("scancel", f"{array}_2")
    wait_until(
        lambda: "PENDING" in slurm("squeue", "--noheader", f"--jobs={array}_0", "--format=%T"),
        sweep,
    )
    slurm("scontrol", "update", f"jobid={array}_0", "starttime=now")  # Slurm would wait two minutes
    _, complaints = sweep.communicate(timeout=400)
    assert sweep.returncode == 1, complaints
    assert states(tmp_path) == {"rank-1": "done", "rank-2": "killed", "rank-4": "interrupted"}
    assert_resumed(tmp_path / "rank-1")

    again = start(*settings)
    _, complaints = again.communicate(timeout=400)
    assert again.returncode == 0, complaints
    assert set(states(tmp_path).values()) == {"done"}
    for name in ("rank-2", "rank-4"):
        assert_resumed(tmp_path / name)


def process_of(job: Path, sweep: subprocess.Popen) -> int:
    """The process that trains, once it has written a checkpoint."""
    wait_until(lambda: list((job / "checkpoints").glob("step_*0")), sweep)
    return int((job / ".lock").read_text().split()[1])


def wait_until(true: Callable, sweep: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not true():
        if sweep.poll() is not None or time.monotonic() > deadline:
            sweep.kill()
            pytest.fail("\n".join(sweep.communicate()))
        time.sleep(0.05)


def states(folder: Path) -> dict[str, str]:
    return {
        p.parent.name: json.loads(p.read_text())["status"]
        for p in sorted(folder.glob("rank-*/summary.json"))
    }


def assert_resumed(job: Path) -> None:
    assert (job / "log.txt").read_text().count("resume  ") == 1
    steps = [line["step"] for line in read_json_lines(job / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(10, STEPS + 1, 10)), "every step once"


def slurm(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, (command, ran.stderr)
    return ran.stdout
