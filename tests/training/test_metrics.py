"""metrics.jsonl keeps what can be read, and tells of the rest."""

import json

from cogvx.options.tracking import Tracking
from cogvx.training.metrics import Metrics


def resumed(folder, at: int, logged_until: int = 0) -> list[int]:
    Metrics(folder, Tracking(), {}, resumed_at=at, logged_until=logged_until)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def lines(*steps: int) -> list[bytes]:
    return [json.dumps({"step": step, "loss": 0.5}).encode() for step in steps]


def test_half_a_line_at_the_end_is_what_a_kill_leaves(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines(1, 2, 3)) + b'\n{"step": 4, "lo')
    assert resumed(tmp_path, 3) == [1, 2, 3] and "warning" not in capsys.readouterr().out


def test_a_broken_line_costs_only_itself_and_is_said(tmp_path, capsys):
    broken = [*lines(1, 2), b"\0\0\xff\xfe", b"[1, 2]", *lines(4, 5, 6)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(broken) + b"\n")
    assert resumed(tmp_path, 5) == [1, 2, 4, 5]
    printed = "".join(capsys.readouterr())
    assert "warning 2 lines of metrics.jsonl cannot be read" in printed


def test_lines_that_are_lost_at_the_end_are_said(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines(2, 4)) + b"\n")
    assert resumed(tmp_path, 5, logged_until=4) == [2, 4]
    assert "warning" not in "".join(capsys.readouterr())
    assert resumed(tmp_path, 8, logged_until=8) == [2, 4]
    printed = "".join(capsys.readouterr())
    assert "warning metrics.jsonl ends at step 4, and the checkpoint is of step 8" in printed
