"""Signs of life: a line when nothing else is printed for long."""

import threading

import pytest

from cogvx import progress
from cogvx.progress import SignsOfLife, bar, heartbeat


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds): lets this time pass, and one look of every heartbeat at the clock."""
    seconds = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(progress.time, "time", lambda: seconds[0])
    # The threads do nothing: the test looks in their place.
    monkeypatch.setattr(SignsOfLife, "give", lambda self, ended: None)

    def let_pass(passed: int) -> None:
        for _ in range(passed):
            seconds[0] += 1
            for signs in SignsOfLife.running:
                signs.speak_if_due()

    return let_pass


def test_a_line_after_ten_seconds_and_then_every_thirty(clock, capsys):
    with heartbeat("load    still reading the transformer"):
        clock(9)
        assert capsys.readouterr().out == ""
        clock(1)
        assert capsys.readouterr().out == "load    still reading the transformer, 10 s\n"
        clock(65)
        assert capsys.readouterr().out.splitlines() == [
            "load    still reading the transformer, 40 s",
            "load    still reading the transformer, 70 s",
        ]
    clock(60)
    assert capsys.readouterr() == ("", "")


def test_of_two_the_inner_one_speaks(clock, capsys):
    with heartbeat("outer"):
        clock(5)
        with heartbeat("inner"):
            clock(12)
        assert capsys.readouterr().out == "inner, 10 s\n"
        clock(30)
        assert capsys.readouterr().out == "outer, 40 s\n"


def test_errors_pass_through_and_end_it(clock, capsys):
    with pytest.raises(KeyError), heartbeat("outer"):
        raise KeyError
    clock(60)
    assert SignsOfLife.running == [] and capsys.readouterr().out == ""


def test_nothing_is_printed_while_a_bar_moves(clock, capsys, monkeypatch):
    import tqdm.std

    monkeypatch.setattr(tqdm.std, "time", progress.time.time)
    monkeypatch.setattr(progress, "BAR_IN_LOG", 0)
    with heartbeat("load"), bar(total=100) as steps:
        for _ in range(30):
            clock(1)
            steps.update()
        assert capsys.readouterr().out == ""
        clock(progress.STANDS_STILL + 1)
        assert capsys.readouterr().out == "load, 55 s\n"


def test_a_real_thread_looks_at_the_clock_and_ends(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_SIGN", 0)
    threads = threading.active_count()
    spoke = threading.Event()
    monkeypatch.setattr("tqdm.tqdm.write", lambda line: spoke.set())
    with heartbeat("load"):
        assert spoke.wait(10)
    for thread in threading.enumerate():
        if thread.name.startswith("heartbeat"):
            thread.join(3)
    assert threading.active_count() == threads


@pytest.fixture
def slow_file(monkeypatch, clock):
    """Hashing a file takes twelve seconds."""
    import hashlib

    digest = hashlib.file_digest

    def read_slowly(*given):
        clock(12)
        return digest(*given)

    monkeypatch.setattr(hashlib, "file_digest", read_slowly)


def test_hashing_a_large_file_is_said(slow_file, tmp_path, capsys):
    from cogvx.data.cache import Cache

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    Cache(tmp_path / "cache").fingerprint(tmp_path / "model.safetensors")
    assert capsys.readouterr().out == "hash    still reading model.safetensors, 10 s\n"
