"""The start and the end of a process: what is imported, and what still runs at exit."""

import subprocess
import sys
from pathlib import Path

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


def test_training_imports_no_package_that_it_does_not_need():
    done = python(IMPORTS)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_library_that_cannot_be_imported_is_left_to_who_needs_it(monkeypatch):
    from cogvx import libraries

    monkeypatch.setattr(libraries, "LIBRARIES", ("json", "no_such_library"))
    monkeypatch.setattr(libraries, "NOT_NEEDED", ("no_such_package",))
    libraries.load_libraries()
    assert "no_such_package" not in sys.modules
