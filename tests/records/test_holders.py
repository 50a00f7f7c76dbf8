"""Who works in a run's folder, and what becomes of those whose command was killed."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cogvx.errors import UserError
from cogvx.files import runs_here
from cogvx.records import holders, record
from cogvx.records.holders import orphans

PROJECT = str(Path(__file__).parent.parent.parent)
LOCKING = """
import os, signal, subprocess, sys, time
from pathlib import Path
from cogvx.records import record
with record.locked(Path(sys.argv[1])) as lock:
    code = sys.argv[2]
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[lock], stdin=subprocess.PIPE)
    print(child.pid, flush=True)
    time.sleep(600)
"""
# As a rank does: it stops when its parent has ended, once the file `go` is there. Or it hangs.
STOPS = """
import pathlib, sys, time
sys.stdin.read()
while not pathlib.Path("go").exists():
    time.sleep(0.01)
"""
HANGS = "import time; time.sleep(600)"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")


@pytest.fixture
def killed(tmp_path):
    """killed(code): the process that a killed one has started."""
    started = []

    def start(code: str) -> int:
        command = [sys.executable, "-c", LOCKING, str(tmp_path), code]
        environment = {**os.environ, "PYTHONPATH": PROJECT}
        pipe = {"stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipe)
        started.append(int(process.stdout.readline()))
        pids = [process.pid, started[-1]]
        assert holders.holders(tmp_path / record.LOCK) == dict.fromkeys(pids, process.pid)
        process.kill()
        process.wait()
        return started[-1]

    yield start
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@linux
def test_a_run_restarted_at_once_waits_for_the_ranks_of_a_killed_command(
    killed, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(record, "LOCK_TRIES", ())
    rank = killed(STOPS)
    monkeypatch.setattr(holders, "pause", lambda: (tmp_path / "go").touch())
    with record.locked(tmp_path):
        assert str(os.getpid()) in record.user_of(tmp_path)
    assert f"stop with a checkpoint: process {rank}\n" in capsys.readouterr().out


@linux
def test_a_rank_that_does_not_stop_is_killed(killed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(holders, "ORPHANS_STOP_WITHIN", 0.3)
    rank = killed(HANGS)
    assert orphans(tmp_path / record.LOCK) == [rank]
    with record.locked(tmp_path):
        pass
    assert f"warning killed process {rank}: no end within 0 s" in capsys.readouterr().out
    assert not runs_here(rank)


@linux
def test_a_process_that_lives_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(holders, "ORPHANS_STOP_WITHIN", 0)
    with (
        record.locked(tmp_path),
        pytest.raises(UserError, match=rf"in use by another process \(process {os.getpid()}"),
        record.locked(tmp_path),
    ):
        pytest.fail("two have the lock")
