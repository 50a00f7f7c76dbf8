"""Runs at the same time share the work: nothing is made twice, nobody waits for a killed run."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import warm

from cogvx.data.cache import claimed
from cogvx.data.filled import filled
from cogvx.data.sharing import READ_AHEAD

PROJECT = Path(__file__).parent.parent.parent


def started(*command: object) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return warm.python(*command, cwd=PROJECT, **pipes)


CLAIMS = """
import sys, time
from pathlib import Path
from cogvx.data.cache import claimed
with claimed(Path(sys.argv[1]), wait=False) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_a_claim_is_one_processs_and_ends_with_it(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", CLAIMS, tmp_path / "file"],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "True\n"
    with (
        claimed(tmp_path / "file", wait=False) as mine,
        claimed(tmp_path / "other", wait=False) as other,
    ):
        assert (mine, other) == (False, True)
    holder.kill()
    with claimed(tmp_path / "file", wait=True) as mine:
        assert mine
    assert list(tmp_path.iterdir()) == [], "nothing is left of it"


@pytest.mark.parametrize("refusal", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_lets_everybody_work(tmp_path, monkeypatch, refusal):
    def no_locks(*arguments):
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for wait in (False, True):
        with claimed(tmp_path / "file", wait=wait) as mine:
            assert mine
    made = filled(tmp_path / "folder", lambda folder: (folder / "made").touch())
    assert (made / "made").is_file() and not list(tmp_path.glob("*.partial"))


FORKS = """
import os, sys, time
from pathlib import Path
from cogvx.data.cache import claimed
with claimed(Path(sys.argv[1]), wait=False) as mine:
    if os.fork() == 0:
        print(mine, os.getpid(), flush=True)
    time.sleep(300)
"""


def test_a_claim_does_not_live_on_in_a_forked_process(tmp_path):
    """Otherwise a worker that outlives its run would keep all others waiting."""
    holder = started("-c", FORKS, tmp_path / "file")
    mine, worker = holder.stdout.readline().split()
    assert mine == "True"
    try:
        holder.kill()
        holder.wait()
        with claimed(tmp_path / "file", wait=False) as claim:
            assert claim
    finally:
        os.kill(int(worker), signal.SIGKILL)


FILLS = """
import sys, time
from pathlib import Path
from cogvx.data.filled import filled
def fill(folder):
    print("fills", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.02)
    (folder / "made").touch()
print((filled(Path(sys.argv[1]), fill) / "made").is_file(), flush=True)
"""


def test_a_folder_is_filled_once(tmp_path):
    go_on = tmp_path / "go on"
    first = started("-c", FILLS, tmp_path / "folder", go_on)
    assert first.stdout.readline() == "fills\n"
    second = started("-c", FILLS, tmp_path / "folder", go_on)
    assert second.stdout.readline() == f"waiting for another run to make {tmp_path / 'folder'}\n"
    go_on.touch()
    assert (first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]) == (
        "True\n",
        "True\n",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "go on"]


@pytest.fixture
def encoding(clips, nano_folder, tmp_path):
    """encoding("stuck") starts a process that encodes the six clips. See tmp_path/notes."""
    (tmp_path / "notes").mkdir()
    script, notes = Path(__file__).with_name("one_of_several.py"), tmp_path / "notes"
    return lambda *more: started(script, tmp_path / "cache", clips, nano_folder, notes, *more)


def noted(folder: Path, what: str) -> Counter:
    """How many processes have begun, or done, each clip."""
    return Counter(path.name.partition(".")[0] for path in folder.glob(f"*.{what}"))


@pytest.mark.slow
def test_two_runs_at_once_encode_every_clip_once(encoding, tmp_path):
    both = [encoding(), encoding()]
    said = [process.communicate(timeout=400)[0] for process in both]
    assert all("has 6" in text for text in said), said
    once = Counter(dict.fromkeys("012345", 1))
    assert noted(tmp_path / "notes", "begun") == noted(tmp_path / "notes", "done") == once
    by = Counter(path.suffixes[-2] for path in (tmp_path / "notes").glob("*.done"))
    assert len(by) == 2, "each encoded what the other had not begun"
    assert not list((tmp_path / "cache").rglob("*.lock"))


@pytest.mark.slow
def test_what_a_killed_run_was_encoding_is_encoded_by_the_one_that_waits(encoding, tmp_path):
    killed = encoding("stuck")
    deadline = time.monotonic() + 300
    while len(noted(tmp_path / "notes", "begun")) < READ_AHEAD and time.monotonic() < deadline:
        time.sleep(0.05)
    left = noted(tmp_path / "notes", "begun")
    assert len(left) == READ_AHEAD, "a run claims no more than it reads"
    waiting = encoding()
    said = iter(waiting.stdout.readline, "")
    assert f"encode  waiting for another run to finish {READ_AHEAD} clips\n" in said
    assert not left.keys() & noted(tmp_path / "notes", "done").keys()
    killed.kill()
    assert "has 6\n" in said
    assert noted(tmp_path / "notes", "done") == Counter(dict.fromkeys("012345", 1))
    begun = noted(tmp_path / "notes", "begun")
    assert [begun[clip] for clip in left] == [2] * READ_AHEAD
