"""A decoder that hangs, crashes or needs too much memory costs one clip, and is replaced."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cogvx.data import decoder_process, decoders
from cogvx.data.decoders import decoded_frames, surveyed
from cogvx.data.footage import BadClip, survey
from cogvx.training.stop import REQUESTS, Stopped

BROKEN = [sys.executable, str(Path(__file__).parent / "broken_decoder.py")]


@pytest.fixture
def broken(monkeypatch):
    """Decoders of this test are those of broken_decoder.py."""
    monkeypatch.setattr(decoders, "COMMAND", BROKEN)
    monkeypatch.setattr(decoders, "IDLE", [])


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("hangs", r"was not read in 0.3 s: .* \(a longer time: data.decode_seconds\)"),
        ("crashes", r"makes the decoder crash \(SIGSEGV\)"),
        ("leaves", r"makes the decoder crash \(exit code 0\)"),
        ("takes_too_much_memory", "needs too much memory"),
        ("raises", "cannot be read: ValueError: a library's own words$"),
    ],
)
def test_a_decoder_that_fails_costs_one_clip(make_clip, tmp_path, broken, what, said):
    whole = make_clip(tmp_path / "whole.mp4")
    footage, seconds = survey(whole), 0.3 if what == "hangs" else 60
    for name in (f"{what}.mp4", f"{what}_survey.mp4"):
        bad = make_clip(tmp_path / name)
        with pytest.raises(BadClip, match=said):
            found = surveyed(bad, 60 if "survey" not in name else seconds)
            decoded_frames(found, [0, 1, 2], seconds)
        # Another one takes its place.
        assert len(decoded_frames(footage, [0, 4], 60)) == 2
    assert len(decoders.IDLE) == 1


def test_frames_are_the_same_in_another_process_in_any_order(make_clip, tmp_path):
    footage = surveyed(make_clip(tmp_path / "clip.mp4"), 60)
    assert footage == survey(tmp_path / "clip.mp4")
    frames = decoded_frames(footage, [3, 0, 3, 9], 60)
    levels = frames[:, 64, 64, 0].tolist()
    assert levels[0] == levels[2] and levels[1] < levels[0] < levels[3]
    assert frames.shape == (4, 128, 128, 3)


def test_a_decoder_without_work_ends_and_another_one_takes_its_place(
    make_clip, tmp_path, monkeypatch
):
    path = make_clip(tmp_path / "clip.mp4")
    idle = decoder_process.ENDED_IDLE
    at_once = f"import os, pickle; pickle.load(open(0, 'rb')); os._exit({idle})"
    ended = decoders.Decoder.__new__(decoders.Decoder)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    ended.process = subprocess.Popen([sys.executable, "-c", at_once], **pipes)
    monkeypatch.setattr(decoders, "IDLE", [ended])
    assert len(surveyed(path, 60).times) == 16
    assert ended.process.returncode == idle and [ended] != decoders.IDLE


def test_a_decoder_that_someone_killed_costs_no_clip(make_clip, tmp_path, monkeypatch):
    killed = decoders.Decoder()
    killed.process.kill()
    monkeypatch.setattr(decoders, "IDLE", [killed])
    assert len(surveyed(make_clip(tmp_path / "clip.mp4"), 60).times) == 16


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_job_is_not_for_its_decoders(
    make_clip, tmp_path, monkeypatch, number
):
    decoder = decoders.Decoder()
    monkeypatch.setattr(decoders, "IDLE", [decoder])
    path = make_clip(tmp_path / "clip.mp4")
    surveyed(path, 60)
    decoder.process.send_signal(number)
    assert len(surveyed(path, 60).times) == 16 and [decoder] == decoders.IDLE


def test_a_run_that_is_stopped_waits_for_no_file(make_clip, tmp_path, broken):
    """Its decoder hangs, and data.decode_seconds is long."""
    path = make_clip(tmp_path / "hangs_survey.mp4")
    with pytest.raises(Stopped), REQUESTS.listening(None), ThreadPoolExecutor(1) as pool:
        found = pool.submit(surveyed, path, 600)
        while not decoders.BUSY:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
    assert "was asked to stop" in str(found.exception())
    with REQUESTS.listening(None):
        assert len(surveyed(make_clip(tmp_path / "next.mp4"), 60).times) == 16


def test_a_decoder_imports_no_torch():
    code = "import sys, cogvx.data.decoder_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=decoders.IMPORTED_FROM).returncode == 0
