"""Ctrl-C and termination: the run ends after the present step, with a checkpoint."""

from __future__ import annotations

import signal

from cogvx.training.ranks import Ranks


class StopSignals:
    """While this context is open, SIGINT and SIGTERM only note that the run should stop.

    A second Ctrl-C ends the run at once. A second SIGTERM does not: a job may get several, from
    Slurm and from the process that started it.
    """

    def __init__(self):
        self.received: int | None = None  # the signal's number
        self.handlers: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: object) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def requested(self, ranks: Ranks) -> bool:
        """Whether any process received a signal. All processes stop after the same step."""
        self.received = ranks.highest(self.received or 0) or None
        return self.received is not None
