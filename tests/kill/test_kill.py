"""The short form: some kills and injections of those that long.py makes by the hundred."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

import same
from injected import INJECTIONS, Injecting
from kinds import INTERVAL, KINDS
from struck import phase_of
from trials import Place, run_trial

import launch as script
from cogvx.files import unfinished
from cogvx.records import heartbeats, record
from cogvx.runs import processes


def kill(phase: str, nth: int, role: str = "launcher", *, torn=False, group=True) -> dict:
    return {"role": role, "phase": phase, "nth": nth, "torn": torn, "group": group}


# One kill in each start of the command.
KILLS = {
    "LoRA, videos": [kill("encoding", 60), kill("checkpoint", 25, torn=True), kill("videos", 8)],
    "full": [kill("rehearsal", 5), kill("steps", 14, torn=True), kill("result", 3)],
    "task=encode": [kill("model files", 5), kill("dataset report", 30)],
    "task=export": [kill("export", 5)],
    "two processes": [kill("checkpoint", 20, "rank 0", group=False), kill("steps", 8, "rank 0")],
}
INJECTED = ["Newest checkpoint: a flipped byte", "metrics.jsonl: truncated"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, launch) -> Place:
    return Place(tmp_path_factory.mktemp("kills"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLS)
def test_a_killed_run_ends_as_an_undisturbed_one(place, kind):
    trial = run_trial(place, kind, 0, KILLS[kind])
    assert trial.recovered and trial.fault is None, trial
    assert trial.kills == [kill["phase"] for kill in KILLS[kind]], "each kill must meet"
    assert trial.differences == [] and trial.strays == [] and trial.again <= INTERVAL, trial


@pytest.mark.slow
def test_trouble_is_named_and_costs_nothing_that_was_whole(place):
    injecting = Injecting(place)
    chosen = [injection for injection in INJECTIONS if injection.what in INJECTED]
    assert len(chosen) == len(INJECTED)
    found = {each.what: injecting.outcome(each) for each in chosen}
    assert set(found.values()) == {"as it must be"}, found


def test_a_finished_run_is_tidied_when_it_is_started_again(tmp_path, capsys):
    """As after a kill between its summary and its end."""
    left = unfinished(tmp_path / "report.html")
    left = left.with_name(left.name.replace(f".{script.os.getpid()}.", ".4194305."))
    for path in (left, tmp_path / heartbeats.HEARTBEATS / "rank_0.json", tmp_path / "summary.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    (tmp_path / "report.html").write_text("")
    assert script.nothing_to_do(tmp_path, {"objective": 0.5}) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "summary.json"]


def test_a_kill_after_the_summary_leaves_no_heartbeat(tmp_path, compose, monkeypatch):
    folder, beats = record.open_folder(compose(f"output_dir='{tmp_path / 'run'}'")), []
    monkeypatch.setattr(processes, "start_task", lambda *given: {"status": "done"})
    monkeypatch.setattr(processes, "conclude_run", lambda *given: beats.append(left_in(folder)))
    assert processes.run_here(folder) == 0
    assert beats == [[]]


def left_in(folder: Path) -> list[str]:
    return [path.name for path in (folder / heartbeats.HEARTBEATS).glob("*")]


def test_the_comparison_sees_what_differs_is_missing_or_lies_about(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for place in (one, other):
        (place / "run" / "checkpoints" / "step_000002").mkdir(parents=True)
        (place / "run" / "checkpoints" / "step_000002" / "optimizer.pt").write_bytes(b"1")
        manifest = {"files": {"optimizer.pt": 1}}
        (place / "run/checkpoints/step_000002/manifest.json").write_text(json.dumps(manifest))
        (place / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "seconds": 1}\n')
        summary = {"objective": 0.5, "seconds": len(place.name)}
        (place / "run" / "summary.json").write_text(json.dumps(summary))
        (place / "run" / "config.yaml").write_text(f"output_dir: {place}/run\n")
    assert same.differences(one, other) == [] == same.strays(one, other)
    (one / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.25}\n')
    (one / "run" / "summary.json").unlink()
    (one / "run" / "checkpoints" / "step_000002" / "optimizer.pt").write_bytes(b"2")
    (one / "run" / "a.json.7.partial").touch()
    (one / "run" / "checkpoints" / "step_000001").mkdir()
    assert same.strays(one, other) == ["run/a.json.7.partial", "run/checkpoints/step_000001"]
    assert same.differences(one, other) == [
        "run/checkpoints/step_000002/optimizer.pt differs",
        "run/metrics.jsonl differs",
        "run/summary.json is missing",
    ]


def test_the_page_has_every_injection():
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [f"| {each.what} | {each.seen} |" for each in INJECTIONS]
    assert len(rows) == 18 and [row for row in rows if row not in page] == []


def test_every_kind_of_the_harness_has_a_name_and_phases_have_theirs():
    assert len(KINDS) == 16
    assert phase_of("run/checkpoints/step_000002.partial/optimizer.pt") == "checkpoint"
    assert phase_of("run/checkpoints/rehearsal.partial/manifest.json") == "rehearsal"
    assert phase_of("cache/latents/7e/7e.safetensors.lock") == "encoding"
    assert phase_of("export.7.0000000a.partial/vae/config.json") == "export"
    assert phase_of("run/config.yaml") == "start"
