"""Folders that are made once: a damaged one is made again. What a killed process left goes."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from cogvx.data import filled as filling
from cogvx.data.cache import Cache, claimed, content_key
from cogvx.data.filled import DIGESTS, filled
from cogvx.data.left_behind import tidy_cache
from cogvx.files import remove_left_over, this_machine, unfinished

GONE = 99999999  # no process has this number


def fill(folder):
    (folder / "vae").mkdir()
    (folder / "vae" / "weights").write_bytes(b"0123456789")
    (folder / "index.json").write_text("{}")


def flip(folder):
    (folder / "vae" / "weights").write_bytes(b"0123456780")


DAMAGES = {
    "flipped": flip,
    "truncated": lambda folder: (folder / "vae" / "weights").write_bytes(b"01234"),
    "missing": lambda folder: (folder / "index.json").unlink(),
    "digests": lambda folder: (folder / DIGESTS).write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_made_again_and_said(tmp_path, capsys, damage):
    folder = filled(tmp_path / "nano", fill)
    DAMAGES[damage](folder)
    assert filled(folder, fill) == folder
    assert (folder / "vae" / "weights").read_bytes() == b"0123456789"
    assert (folder / "index.json").is_file() and os.listdir(tmp_path) == ["nano"]
    said = capsys.readouterr().out
    assert said.startswith(f"warning {folder} is damaged, and made again: ") and "\n" in said
    filled(folder, fill)
    assert capsys.readouterr().out == ""


def test_a_whole_folder_is_not_read_again(tmp_path, monkeypatch, capsys):
    folder = filled(tmp_path / "nano", fill)
    read, really = [], filling.sha256_of
    monkeypatch.setattr(filling, "sha256_of", lambda path: read.append(path) or really(path))
    filled(folder, fill)
    assert read == []
    copied = shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copyfile)
    for _ in range(2):
        filled(copied, fill)
    assert len(read) == 2, "a copy has other times; what was read is remembered"
    (folder / "of a user").write_text("stays")
    filled(folder, fill)
    assert (folder / "of a user").is_file() and capsys.readouterr().out == ""


def test_a_folder_of_an_earlier_version_is_used_as_it_is(tmp_path):
    (tmp_path / "nano").mkdir()
    fill(tmp_path / "nano")
    flip(tmp_path / "nano")
    filled(tmp_path / "nano", fill)
    assert (tmp_path / "nano" / "vae" / "weights").read_bytes() == b"0123456780"


def of_process(path, number: int, machine: str | None = None):
    """The unfinished file of another process."""
    name = unfinished(path).name.replace(f".{os.getpid()}.", f".{number}.")
    left = path.with_name(name if machine is None else name.replace(this_machine(), machine))
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text("half")
    return left


def test_what_killed_processes_left_goes_and_work_in_progress_stays(tmp_path):
    cache = Cache(tmp_path / "cache")
    file = cache.path("latents", content_key("a clip"))
    killed, mine = of_process(file, GONE), of_process(file, os.getpid())
    elsewhere, long_ago = (of_process(file, number, "0a1b2c3d") for number in (GONE, 1))
    os.utime(long_ago, (time.time() - 90_000,) * 2)
    folder = unfinished(cache.folder / "models" / "nano")
    folder = folder.with_name(folder.name.replace(f".{os.getpid()}.", f".{GONE}."))
    folder.mkdir(parents=True)
    (folder / "weights").write_text("half")
    left = cache.path("prompts", content_key("a prompt")).with_suffix(".safetensors.lock")
    left.parent.mkdir(parents=True)
    left.touch()
    beside = [tmp_path / "cache" / name for name in ("demo_3.lock", "notes.lock", "x.partial")]
    for path in beside:
        path.touch()
    HELD = "import sys; from pathlib import Path; from cogvx.data.cache import claimed\n"
    HELD += "with claimed(Path(sys.argv[1]), wait=True): print('held', flush=True); input()"
    held = cache.path("images", content_key("an image"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HELD, held], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        assert tidy_cache(cache.folder) == 5
        assert mine.exists() and elsewhere.exists()
        assert not any(path.exists() for path in (killed, long_ago, folder, left, beside[0]))
        assert all(path.exists() for path in beside[1:]), "of another program"
        assert held.with_suffix(".safetensors.lock").exists()
        with claimed(held, wait=False) as claim:
            assert not claim
        holder.communicate("\n")
    assert tidy_cache(tmp_path / "none") == 0


def test_a_start_in_a_runs_folder_removes_what_a_killed_one_left(tmp_path):
    killed = of_process(tmp_path / "validation" / "video.mp4", GONE)
    mine, step = of_process(tmp_path / "report.html", os.getpid()), tmp_path / "step_000500.partial"
    step.mkdir()
    assert remove_left_over(tmp_path) == 1
    assert not killed.exists() and mine.exists() and step.exists()
