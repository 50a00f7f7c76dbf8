"""What tells that something runs: bars, signs of life, a pulse. And silence from the libraries."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from tqdm import tqdm

# When diffusers looks for these packages, they warn of missing parts that cogvx does not use.
NOISY = ("bitsandbytes", "diffusers.quantizers", "torch.utils._pytree", "torchao")
# Seconds before the first sign of life, and between two of them.
FIRST_SIGN, NEXT_SIGN = 10, 30
# Seconds. In a log file a bar prints a line every 20 s: one silent for longer stands still.
BAR_IN_LOG, STANDS_STILL = 20, 25


def bar(iterable=None, **settings):
    """A tqdm progress bar. In a log file only long work prints one line every 20 seconds."""
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    seconds = (
        {"mininterval": 0.2} if on_terminal else {"mininterval": BAR_IN_LOG, "delay": BAR_IN_LOG}
    )
    return tqdm(iterable, dynamic_ncols=True, **seconds, **settings)


@contextlib.contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Prints `what` and the seconds so far, every now and then, while the block runs.

    heartbeat("load    still reading the transformer") prints, after FIRST_SIGN seconds,
    "load    still reading the transformer, 10 s". Quick work prints nothing. While a bar moves
    nothing is printed. Of two blocks, one within the other, the inner one speaks.
    """
    signs = SignsOfLife(what)
    SignsOfLife.running.append(signs)
    ended = threading.Event()
    threading.Thread(target=signs.give, args=(ended,), daemon=True, name="heartbeat").start()
    try:
        yield
    finally:
        ended.set()
        SignsOfLife.running.remove(signs)


class SignsOfLife:
    """What one heartbeat() prints, and when."""

    running: ClassVar[list[SignsOfLife]] = []

    def __init__(self, what: str):
        self.what, self.started = what, time.monotonic()
        self.due = self.started + FIRST_SIGN

    def give(self, ended: threading.Event) -> None:
        while not ended.wait(1):
            self.speak_if_due()

    def speak_if_due(self) -> None:
        now = time.monotonic()
        if now < self.due or a_bar_moves():
            return
        self.due = now + NEXT_SIGN
        if self.running[-1] is self:
            from tqdm import tqdm

            # It prints above a bar that stands still, not into it.
            tqdm.write(f"{self.what}, {now - self.started:.0f} s")
            sys.stdout.flush()


def bars_now() -> list[tqdm]:
    """The progress bars of this process that are not at their end."""
    if "tqdm" not in sys.modules:
        return []
    from tqdm import tqdm

    with tqdm.get_lock():
        return [bar for bar in tqdm._instances if hasattr(bar, "last_print_t")]


def a_bar_moves() -> bool:
    return any(time.time() - bar.last_print_t < STANDS_STILL for bar in bars_now())


class Pulse:
    """Where this process is in its work, and when it last went on. There is one.

    The work sets it, which takes a microsecond; records/heartbeats.py writes it to a file.
    """

    def __init__(self):
        self.changed = threading.Event()  # the phase
        self.begin()

    def begin(self) -> None:
        self.phases: list[str] = []  # the phase, after those that it interrupts
        self.left: str | None = None  # the phase before
        self.step: int | None = None
        self.steps: int | None = None
        self.waits = False  # for the other processes of the run
        self.bars: list[tuple[str, float]] = []
        self.beat()

    def beat(self) -> None:
        """Called when a part of the work is done."""
        self.moved_at = time.time()

    def at_step(self, step: int, steps: int) -> None:
        self.step, self.steps = step, steps
        self.beat()

    def in_phases(self, phases: list[str]) -> None:
        # A run that ends in an error leaves every phase. The last one is of interest then.
        self.left = self.phases[-1] if self.phases else self.left
        self.phases = list(phases)
        self.beat()
        self.changed.set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within this context the process waits for the other processes of its run."""
        before, self.waits = self.waits, True
        try:
            yield
        finally:
            self.waits = before
            self.beat()

    def doing(self) -> str | None:
        if self.phases:
            return self.phases[-1]
        signs = SignsOfLife.running[-1:]
        return signs[0].what.partition(" ")[2].strip() if signs else self.left

    def look_at_bars(self) -> None:
        """A bar that has moved is work that goes on."""
        now = [(str(bar.desc), bar.n) for bar in bars_now()]
        if now != self.bars:
            self.bars = now
            self.beat()


PULSE = Pulse()


def counted(number: int, thing: str, things: str | None = None) -> str:
    """counted(1, "prompt") is "1 prompt", counted(2, "prompt") is "2 prompts".

    `things` is the plural, where it is not `thing` with an s.
    """
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def quiet_libraries() -> None:
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def library_bars(*, shown: bool):
    """Shows or hides the bars that diffusers and transformers draw while they load and save."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        (library.enable_progress_bar if shown else library.disable_progress_bar)()
    try:
        yield
    finally:
        for library in (diffusers_logging, transformers_logging):
            library.enable_progress_bar()
