"""Where each process of a run was last seen."""

import dataclasses
import os
import subprocess
import time

import pytest

from cogvx.files import read_json, this_machine, write_json
from cogvx.progress import PULSE
from cogvx.records import heartbeats
from cogvx.records.heartbeats import Beat, beats_of, silent
from cogvx.runs import processes

LONG = heartbeats.SILENT_AFTER + 60


@pytest.fixture
def beat(tmp_path):
    """beat(rank=1, moved=-700, ...): writes a heartbeat; times from now on."""
    usual = {"pid": os.getpid(), "host": "box", "machine": this_machine(), "phase": "train"}
    usual |= {"step": 40, "steps": 960, "waits": False, "moved": 0, "seen": 0}

    def write(rank: int = 0, **facts: object) -> Beat:
        facts = usual | facts
        facts |= {name: time.time() + facts[name] for name in ("moved", "seen")}
        made = Beat(rank=rank, **facts)
        write_json(heartbeats.file_of(tmp_path, rank), dataclasses.asdict(made))
        return made

    return write


def test_a_process_tells_where_it_is_and_leaves_that_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeats, "BEAT_EVERY", 60)
    monkeypatch.setattr(heartbeats, "SOONEST", 0.01)
    file = heartbeats.file_of(tmp_path, 1)
    with heartbeats.beating(tmp_path, 1):
        PULSE.at_step(7, 20)
        # A new phase is written soon.
        PULSE.in_phases(["train", "held-out loss"])
        deadline = time.monotonic() + 30
        while read_json(file).get("phase") != "held-out loss":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        PULSE.at_step(8, 20)
        # As when an error ends the run.
        PULSE.in_phases(["train"])
        PULSE.in_phases([])
    [left] = beats_of(tmp_path)
    assert (left.rank, left.pid, left.step, left.steps) == (1, os.getpid(), 8, 20)
    assert left.where == "rank 1: train, step 8 of 20" and silent(tmp_path) == []
    heartbeats.forget_beat(tmp_path, 1)
    assert not file.parent.exists()


def test_a_silent_process_is_named_and_one_that_waits_for_it_is_not(beat, tmp_path):
    beat(0, waits=True, moved=-LONG)
    hung = beat(1, moved=-LONG)
    assert [each.rank for each in silent(tmp_path)] == [1]
    assert "no work for 11 min: hung, or a very long task (process" in hung.words(time.time())
    beat(1, waits=True, moved=-LONG)
    assert [each.rank for each in silent(tmp_path)] == [0, 1], "each waits for the other"
    beat(0)
    assert silent(tmp_path) == []
    assert beat(0).words(time.time()).startswith("rank 0: train, step 40 of 960; seen 0 s ago")


def test_a_process_that_ended_and_one_of_a_lost_machine_are_named(beat, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert beat(0, pid=ended.pid).words(time.time()).endswith(f"process {ended.pid} has ended")
    lost = beat(1, pid=1, host="elsewhere", machine="1234", moved=-LONG, seen=-LONG)
    assert "not seen for 11 min: hung or killed (process 1 on elsewhere)" in lost.words(time.time())
    assert [each.rank for each in silent(tmp_path)] == [0, 1]


def test_a_beat_that_cannot_be_read_is_none(tmp_path):
    file = heartbeats.file_of(tmp_path, 0)
    for content in ("", "{", "[]", '{"rank": 0}'):
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
        assert beats_of(tmp_path) == []


def test_the_process_above_names_a_rank_that_hangs_once(beat, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "LOOK_AT_BEATS", 0)
    watch = processes.Silence(tmp_path)
    beat(1, moved=-LONG)
    watch.look()
    watch.look()
    said = capsys.readouterr().err
    assert said.count("warning rank 1: train, step 40 of 960; no work for 11 min") == 1
    assert f"task=doctor task.run={tmp_path}" in said
