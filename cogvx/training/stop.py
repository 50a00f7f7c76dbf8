"""How a run is asked to stop or to save: by signals, and by files in its folder.   [no torch]

Within the step loop the present step is finished, and a checkpoint is written. Held-out loss,
previews and videos of that step are cut short; they are made when the run is resumed. In every
other phase the work ends at once: what is in the cache and the checkpoints stays.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from cogvx.progress import PULSE

if TYPE_CHECKING:
    from cogvx.training.ranks import Ranks

# Ctrl-C; kill and Slurm's end; a closed terminal; Slurm's notices, as --signal=USR1 asks for.
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Exit codes of a run that was asked to stop.
STOP_CODES = {128 + number for number in ASKING}
# Files in the run's folder that do the same as signals: touch outputs/RUN/stop
STOP_FILE, SAVE_FILE = "stop", "save"
LOOK_FOR_FILES = 1.0  # seconds
# Slurm and the process that started this one may both pass on one signal. Later it is a second one.
SAME_WITHIN = 3.0  # seconds
ASK_AGAIN_AFTER = 0.1  # seconds
SAVE = 1000  # a number above those of all signals


class Stopped(KeyboardInterrupt):
    """Raised where the run is, when it is asked to stop."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class CutShort(Stopped):
    """Raised in the step loop between two parts of what the checkpoint can do without."""


class StopRequests:
    """What this process was asked for. There is one: signals are for the whole process."""

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        self.received: int | None = None  # the first signal's number
        self.received_at = 0.0
        self.save = False
        self.deferred = False  # within the step loop
        self.lost = False  # Stopped was raised, and Python has dropped it

    @contextlib.contextmanager
    def listening(self, folder: Path | None) -> Iterator[None]:
        """folder: the run's, where the files `stop` and `save` are looked for; None: nowhere."""
        self.forget()
        let_decode(True)
        before = {number: signal.signal(number, self.receive) for number in signals_heard()}
        hook = sys.unraisablehook
        sys.unraisablehook = functools.partial(self.ask_again, hook)
        ended = threading.Event()
        if folder is not None:
            threading.Thread(target=self.look_for_files, args=(folder, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: object) -> None:
        """The first signal asks. A second one ends the run where it is."""
        if number == signal.SIGHUP:
            forget_terminal()
        second = self.received is not None
        if not second:
            self.received, self.received_at = number, time.monotonic()
        elif self.lost:
            self.lost = False
        elif number != signal.SIGINT and time.monotonic() - self.received_at < SAME_WITHIN:
            return
        name = signal.Signals(number).name
        if self.deferred and not second:
            tqdm.write(
                f"stop    after this step, with a checkpoint ({name}). A second one stops at once",
                file=sys.stderr,
            )
            return
        let_decode(False)
        raise Stopped(number)

    def ask_again(self, hook: Callable, dropped) -> None:
        """Python drops an error that comes within a destructor. Stopped is then raised again.

        hook, dropped: as of sys.unraisablehook.
        """
        if not isinstance(dropped.exc_value, Stopped):
            hook(dropped)
            return
        # Within this function it would be dropped once more.
        self.lost = True
        number = dropped.exc_value.number
        threading.Timer(ASK_AGAIN_AFTER, os.kill, (os.getpid(), number)).start()

    def look_for_files(self, folder: Path, ended: threading.Event) -> None:
        while not ended.wait(LOOK_FOR_FILES):
            if asked_by(folder / SAVE_FILE):
                self.save = True
            if asked_by(folder / STOP_FILE):
                os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def after_the_step(self) -> Iterator[None]:
        """Within this context the first signal is only noted. asked() tells of it."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False

    def cut_short_if_asked(self) -> None:
        """CutShort in the step loop, once a signal has come. Elsewhere the signal itself ends all.

        Called between denoising steps, and between the clips of the held-out loss: work goes on.
        """
        PULSE.beat()
        if self.deferred and self.received is not None:
            raise CutShort(self.received)

    def asked(self, ranks: Ranks) -> int | None:
        """A signal's number, SAVE, or None; the same in all processes after the same step."""
        wanted = self.received or (SAVE if self.save else 0)
        found = ranks.highest(wanted) or None
        if found == SAVE:
            self.save = False
        elif found is not None:
            self.received = found
        return found


REQUESTS = StopRequests()


def let_decode(on: bool) -> None:
    """A thread that waits for a long video file would keep a stopped process from ending."""
    decoders = sys.modules.get("cogvx.data.decoders")
    if decoders is None:  # nothing was read so far
        return
    if on:
        decoders.DECODING_ENDED.clear()
    else:
        decoders.end_decoding()


def signals_heard() -> list[int]:
    """The signals that this process does not ignore, as nohup or a sweep lets it."""
    return [number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN]


def asked_by(file: Path) -> bool:
    """Whether the file is there. It is removed: one file asks once."""
    try:
        file.unlink()
    except OSError:
        return False
    return True


def forget_terminal() -> None:
    """Writing to a terminal that is gone would be an error in the middle of work."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if os.isatty(stream):
                os.dup2(nowhere, stream)
    os.close(nowhere)
