"""The start and the end of a process: what is imported, and what still runs at exit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parent.parent
ENDING = """
from cogvx import leaving
import atexit, sys, tempfile, threading, time

class Left:
    def __del__(self):
        print("taken apart")

left, scratch = Left(), tempfile.TemporaryDirectory()
atexit.register(print, "hook")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print(scratch.name)
{last_line}
"""
IMPORTS = """
import gc, sys
from cogvx.libraries import load_libraries
load_libraries()
import cogvx.training.run
from cogvx.compose import compose_config
from diffusers import CogVideoXTransformer3DModel

tiny = CogVideoXTransformer3DModel(num_attention_heads=1, num_layers=1)
compose_config(["lora.rank=2"]).lora.attach(tiny, seed=0)
frozen = gc.get_freeze_count()
assert gc.isenabled() and frozen > 100_000
load_libraries()
assert gc.get_freeze_count() == frozen, "what a second run has made is collected"
assert "torch" in sys.modules and None not in sys.modules.values()
late = ("bitsandbytes", "scipy", "torchao", "matplotlib", "imageio", "av", "wandb")
print([name for name in late if name in sys.modules])
import bitsandbytes, scipy.special, torchao
"""


def python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240)


def test_a_process_that_leaves_waits_for_its_threads_and_runs_its_hooks():
    done = python(ENDING.format(last_line="leaving.leave(3)"))
    folder, *said = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (3, "")
    assert said == ["thread", "hook"] and not Path(folder).exists()


def test_an_error_that_nobody_caught_ends_python_in_its_own_way():
    done = python(ENDING.format(last_line="raise KeyError('x')"))
    assert done.returncode == 1 and done.stderr.endswith("KeyError: 'x'\n")
    assert done.stdout.splitlines()[1:] == ["thread", "hook", "taken apart"]


@pytest.mark.slow
def test_training_imports_no_package_that_it_does_not_need():
    done = python(IMPORTS)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_library_that_cannot_be_imported_is_left_to_who_needs_it(monkeypatch):
    from cogvx import libraries

    monkeypatch.setattr(libraries, "LIBRARIES", ("json", "no_such_library"))
    monkeypatch.setattr(libraries, "NOT_NEEDED", ("no_such_package",))
    libraries.load_libraries()
    assert "no_such_package" not in sys.modules


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model=2b"], "model=2b needs your clips: data.instance_data_root=/clips"),
        (
            ["model.path=/nowhere/CogVideoX-5b"],
            "that model comes with cogvx and has no path. Say which model lies there: model=5b",
        ),
        (["data.instance_data_root=/nowhere"], "data.instance_data_root=/nowhere does not exist"),
        (["data=table", "data.instance_data_root=."], "data=table reads metadata.csv"),
        (["data=text_files", "data.instance_data_root=."], "prompts.txt and videos.txt not found"),
        (
            ["model=5b", "model.path=/nowhere/5b", "data=world", "data.clips=2"],
            "model.path=/nowhere/5b does not exist here, and is not a hub id",
        ),
        (
            ["-m", "data.instance_data_root=/nowhere", "lora.rank=4,8"],
            "data.instance_data_root=/nowhere does not exist",
        ),
    ],
)
def test_what_can_be_known_is_said_before_torch_and_leaves_nothing(tmp_path, arguments, said):
    command = [sys.executable, "-X", "importtime", PROJECT / "launch.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and said in " ".join(x for x in lines if "import time:" not in x)
    assert not any(line.endswith("| torch") for line in lines), "torch was imported"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fp16_without_a_gpu_is_refused_before_torch(tmp_path):
    command = [sys.executable, PROJECT / "launch.py", "model=2b", "data=world", "data.clips=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "needs a GPU, and none was found" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nobody_has_to_read_what_a_run_prints():
    code = (
        "import sys; from cogvx import leaving; leaving.outlast_readers()\n"
        "for number in range(3000): print('a line of a run', number)\n"
        "print('end', file=sys.stderr); leaving.leave(0)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, **pipes)
    assert process.stdout.readline() == "a line of a run 0\n"
    process.stdout.close()
    assert process.stderr.read() == "end\n" and process.wait(60) == 0
