"""Ends a process at once when its work is done.

Python takes two or three seconds to take apart what torch and diffusers have put into its memory.
Nothing needs that: the operating system frees it in milliseconds. So the last hook that runs at
exit ends the process. Hooks run in reverse order. Import this file before all others.
"""

from __future__ import annotations

import atexit
import io
import os
import re
import signal
import sys
from typing import NoReturn

codes: list[int] = []
# What a terminal does not show but obeys: C0 and C1 control characters, without line break and tab.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Colours, which rich writes.
COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def leave(code: int) -> NoReturn:
    """sys.exit(code): threads are waited for, hooks run, and then the process is gone."""
    codes.append(code)
    sys.exit(code)


def outlast_signals() -> None:
    """For a process that ends when the one that started it has ended.

    Requests to stop are for that one. Slurm sends them to all processes of a job.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class Outlasting(io.FileIO):
    """A stream whose reader may leave, as `| head` does: the rest then goes nowhere."""

    def write(self, content) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(content)


def printable(text: str) -> str:
    """The text with every control character as \\x1b, for a terminal."""
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class Plain(io.TextIOWrapper):
    """A stream on which a terminal gets text and colours, and no other commands.

    A caption or the name of a file may hold them.
    """

    def write(self, text: str) -> int:
        parts = COLOUR.split(text) if "\x1b" in text else [text]
        plain = [part if COLOUR.fullmatch(part) else printable(part) for part in parts]
        return super().write("".join(plain))


def outlast_readers() -> None:
    """From here on, a run does not end because nobody reads what it prints."""
    for name, kind in (("stdout", Plain), ("stderr", io.TextIOWrapper)):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            continue
        raw = Outlasting(stream.fileno(), "w", closefd=False)
        how = {"encoding": stream.encoding, "errors": stream.errors}
        setattr(sys, name, kind(io.BufferedWriter(raw), line_buffering=True, **how))


@atexit.register
def end_at_once() -> None:
    """Only after leave(): an error that nobody caught ends Python in its own way."""
    if not codes:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # Python tells of it
        return
    os._exit(codes[-1])
