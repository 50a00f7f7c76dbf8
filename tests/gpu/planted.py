"""Entries that go wrong in every way, for the tests of the battery itself."""

import os
import signal
import subprocess
import sys
import time

from battery import Entry

ENTRIES = [
    Entry("good", "measures something", "nowhere", imports_torch=False),
    Entry("raises", "raises an error", "cogvx/model/blocks.py", imports_torch=False),
    Entry("crashes", "ends by a signal", "nowhere", imports_torch=False),
    Entry("hangs", "never ends, and neither does its child", "nowhere", 6, imports_torch=False),
    Entry("lacks", "cannot run here", "nowhere", imports_torch=False),
    Entry("beside_1", "waits for the other", "nowhere", 20, alone=False, imports_torch=False),
    Entry("beside_2", "waits for the other", "nowhere", 20, alone=False, imports_torch=False),
    Entry("last", "measures something again", "nowhere", imports_torch=False),
]


class Skipped(Exception):
    pass


def plans(entries, card, *, small, scratch):
    return {}


def function(name):
    return globals()[name]


def good(here):
    here.line("peak", 11.0, "GiB", most=12.0)
    here.line("peak of another phase", 13.0, "GiB", most=12.0)


def raises(here):
    here.line("before", 1)
    raise RuntimeError("CUDA error: out of memory\n\nCompile with TORCH_USE_CUDA_DSA")


def crashes(here):
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(here):
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(command, start_new_session=True)
    here.line("child", child.pid)
    time.sleep(600)


def lacks(here):
    raise Skipped("there is no such card")


def beside_1(here):
    meet(here, "beside_2")


def beside_2(here):
    meet(here, "beside_1")


def meet(here, other):
    """Both run at the same time, or neither ends."""
    (here.scratch / here.entry).touch()
    while not (here.scratch / other).exists():
        time.sleep(0.02)
    here.line("met", other)


def last(here):
    here.line("done", True, status="ok")
