"""A stand-in for the hub, and this process pointed at it."""

import os

import pytest
from stand_in import StandIn, reread_environment


@pytest.fixture(scope="session")
def server():
    """The stand-in of the session. Tests give their repositories names of their own."""
    found = StandIn()
    yield found
    found.stop()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The stand-in, without faults. This process uses it, with an empty cache and no token."""
    server.requests.clear()
    server.ranges.clear()
    server.faults.clear()
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    for name, text in server.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, text)
    reread_environment()
    yield server
    monkeypatch.undo()
    reread_environment()


@pytest.fixture
def set_up(monkeypatch):
    """set_up(HF_TOKEN="..."): as if this process had started with it."""

    def change(**variables: str) -> None:
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        reread_environment()

    return change


@pytest.fixture
def waited(monkeypatch):
    """Nobody waits. The seconds that would have been waited."""
    import time

    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found
