"""The command line in this process: a second instead of a fresh Python for each command."""

import subprocess

import pytest

import launch as launcher


@pytest.fixture
def door(capfd, monkeypatch):
    """door("lora.rank=x"): what `python launch.py lora.rank=x` prints and returns.

    It is for commands that are refused or only show settings. No run can start.
    """

    def refuse(*arguments: object) -> None:
        raise AssertionError("the command was not refused")

    def call(*arguments: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr("sys.argv", ["launch.py"])
        monkeypatch.setattr(launcher, "run", refuse)
        capfd.readouterr()
        code = launcher.entry(list(arguments))
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return call
