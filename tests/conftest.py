"""Shared: a nano checkpoint, small clips, and runs in this process."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

PROJECT = Path(__file__).parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = (
    "1"  # tests run beside each other; threads that wait for each other spin
)

import families  # noqa: E402

from cogvx import compose as composing  # noqa: E402
from cogvx.data.mp4 import write_video  # noqa: E402
from cogvx.model import nano  # noqa: E402
from cogvx.records import record  # noqa: E402
from cogvx.runs import processes  # noqa: E402


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache for the whole session, as users have one."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def nano_folder(cache) -> Path:
    return nano.write(cache / "models" / "nano")


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """family_folder("5b_i2v"): a tiny checkpoint with that released family's flags."""
    folder = tmp_path_factory.mktemp("families")
    return functools.cache(lambda family: families.write(folder / family, family))


@pytest.fixture
def compose(cache):
    """compose("lora.rank=4", ...): a checked configuration that uses the session's cache."""
    return lambda *overrides: composing.compose_config([f"data.cache_dir='{cache}'", *overrides])


@pytest.fixture
def run(compose, tmp_path):
    """run("name", "lora.rank=4", ...): a run in this process, without videos unless asked for; its folder."""

    def start(name: str, *overrides: str, expect: int = 0) -> Path:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        quick = [
            "lora.rank=4",
            "lora.lora_alpha=2",
            "scheduler.lr_warmup_steps=2",
            "validation.num_validation_videos=0",
            "validation.scored_prompts=0",
            "validation.heldout_timesteps=2",
        ]
        folder = record.open_folder(compose(*quick, f"output_dir='{tmp_path / name}'", *overrides))
        assert processes.run_here(folder) == expect
        return folder

    return start


@pytest.fixture
def stopped(tmp_path):
    """stopped("name", whole, 4): a copy of a finished run's folder as a kill soon after its checkpoint of step 4 would leave it."""

    def copy(name: str, whole: Path, step: int) -> Path:
        folder = Path(shutil.copytree(whole, tmp_path / name))
        for checkpoint in folder.glob("checkpoints/step_*"):
            if checkpoint.name > f"step_{step:06}":
                shutil.rmtree(checkpoint)
        (folder / record.SUMMARY).unlink()
        return folder

    return copy


@pytest.fixture
def launch():
    """launch("lora.rank=4", ...): `python launch.py ...` as a user types it."""

    def start(*arguments: str, **settings) -> subprocess.CompletedProcess:
        command = [sys.executable, str(PROJECT / "launch.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, **settings)

    return start


@pytest.fixture(scope="session")
def make_clip():
    """make_clip(path, frames=16, fps=8, width=128, height=128): an mp4 whose frame i has brightness 10 i."""

    def make(
        path: Path, *, frames: int = 16, fps: float = 8, width: int = 128, height: int = 128
    ) -> Path:
        pictures = [
            numpy.full((height, width, 3), min(250, 10 * i), numpy.uint8) for i in range(frames)
        ]
        write_video(path, pictures, fps=fps)
        return path

    return make


@pytest.fixture
def clips(tmp_path, make_clip):
    """A folder in the small format: six clips of 16 frames."""
    root = tmp_path / "clips"
    for number in range(6):
        make_clip(root / "videos" / f"{number}.mp4", width=128 + 32 * number)
    (root / "prompts.txt").write_text(
        "".join(f"clip number {n}\n" for n in range(6)), encoding="utf-8"
    )
    (root / "videos.txt").write_text(
        "".join(f"videos/{n}.mp4\n" for n in range(6)), encoding="utf-8"
    )
    return root
