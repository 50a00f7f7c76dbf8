"""Shared by all tests: a nano checkpoint, small clips, runs here and runs by launch.py."""

import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests run beside each other. Threads that wait for each other would spin.
os.environ["OMP_NUM_THREADS"] = "1"
# torch's compiler would start processes that each import torch.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# A shell lets what it starts in the background ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import warm  # noqa: E402
from settings import LONG_FILES, QUICK  # noqa: E402

# torch and diffusers are imported where they are needed: pytest-xdist's first process, which runs
# no test, starts the others only after it has read this file.


def pytest_collection_modifyitems(items) -> None:
    """Puts the long files first; the others stay in the order of their folders."""

    def place(item) -> int:
        path = item.path.relative_to(PROJECT / "tests").as_posix()
        return LONG_FILES.index(path) if path in LONG_FILES else len(LONG_FILES)

    items.sort(key=place)


def pytest_collection_finish(session) -> None:
    """Before the first test, in every process that runs tests which run something."""
    running = {"launch", "launching", "run_in", "warm"}
    asked = any(running & {*item.fixturenames, *vars(item.module)} for item in session.items)
    if asked and not session.config.option.collectonly:
        warm.serve()


# Packages of single settings. Without one of them, the tests that need it are skipped.
MISSING = re.compile(r"needs the package (\w+), which is not|No module named '(\w+)")
MAY_BE_MISSING = {
    *("bitsandbytes", "datasets", "optuna", "prodigyopt", "schedulefree", "torchao", "wandb"),
    *("matplotlib", "tensorboard", "trackio"),
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from skipping())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from skipping())


def skipping():
    """Skips a test that fails because a package of a single setting is not installed."""
    try:
        return (yield)
    except Exception as error:
        found = MISSING.search(str(error))
        name = found and (found[1] or found[2])
        if name not in MAY_BE_MISSING or importlib.util.find_spec(name) is not None:
            raise
        pytest.skip(f"needs {name}")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache for all processes of a session, as users have one."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def nano_folder(cache) -> Path:
    from cogvx.model import nano

    return nano.write_nano(cache / "models" / "nano")


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """family_folder("5b_i2v"): a tiny checkpoint with that released family's flags."""
    import families

    folder = tmp_path_factory.mktemp("families")
    return functools.cache(lambda family: families.write(folder / family, family))


@pytest.fixture(scope="session")
def compose(cache):
    """compose("lora.rank=4", ...): a checked configuration that uses the session's cache."""
    from cogvx.compose import compose_config

    return lambda *overrides: compose_config([f"data.cache_dir='{cache}'", *overrides])


@pytest.fixture(scope="session")
def run_in(compose):
    """run_in(folder, "lora.rank=4", ...): a run in this process; without videos unless asked."""

    def start(folder: Path, *overrides: str, expect: int = 0) -> Path:
        from accelerate.state import AcceleratorState

        from cogvx.records import record
        from cogvx.runs import processes

        AcceleratorState._reset_state(reset_partial_state=True)
        folder = record.open_folder(compose(*QUICK, f"output_dir='{folder}'", *overrides))
        assert processes.run_here(folder) == expect
        return folder

    return start


@pytest.fixture
def run(run_in, tmp_path):
    """run("name", "lora.rank=4", ...): a run of this test alone; its folder."""

    def start(name: str, *overrides: str, expect: int = 0) -> Path:
        return run_in(tmp_path / name, *overrides, expect=expect)

    return start


@pytest.fixture(scope="session")
def trained(run_in, tmp_path_factory):
    """trained("lora.rank=4", ...): a finished run that tests share. They read it, or copy it."""
    base = tmp_path_factory.mktemp("trained")
    numbers = iter(range(1000))
    return functools.cache(lambda *overrides: run_in(base / str(next(numbers)), *overrides))


@pytest.fixture
def stopped(tmp_path):
    """stopped("name", whole, 4): a copy of a finished run, as a kill after step 4 leaves it."""
    from cogvx.records import record

    def copy(name: str, whole: Path, step: int) -> Path:
        folder = Path(shutil.copytree(whole, tmp_path / name))
        for checkpoint in folder.glob("checkpoints/step_*"):
            if checkpoint.name > f"step_{step:06}":
                shutil.rmtree(checkpoint)
        (folder / record.SUMMARY).unlink()
        return folder

    return copy


@pytest.fixture(scope="session")
def launch():
    """launch("lora.rank=4", ...): `python launch.py ...` as a user types it, to its end."""
    return warm.run


@pytest.fixture
def launching():
    """launching("lora.rank=4", ..., stdout=...): its Popen. What still runs later is killed."""
    started: list[subprocess.Popen] = []

    def start(*arguments: object, **settings) -> subprocess.Popen:
        started.append(warm.start(*arguments, **settings))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="session")
def make_clip():
    """make_clip(path, frames=16, ...): an mp4 whose frame i has brightness 10 i."""
    import numpy

    from cogvx.data.mp4 import write_video

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
