"""How long a step takes, and how much of that it waits for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tqdm import tqdm

# The planner's step times are accurate to about 35 %.
SLOW = 2.0


class Lap(NamedTuple):
    seconds: float  # per step
    waited: float  # how many of them waited for data
    tokens: float  # per second, of this process; buckets have steps of unlike length


class StepTimer:
    """Times the steps since the last lap. Evaluation, videos and checkpoints are left out.

    expected() returns the planned seconds per step, or None while they are not known.
    """

    def __init__(self, expected: Callable[[], float | None], *, first_step: int):
        self.expected = expected
        self.since = first_step  # the last step before this lap
        self.started = time.monotonic()
        self.waited = 0.0  # seconds
        self.tokens = 0  # of this process
        self.progress: tqdm | None = None
        self.warned = False

    def start(self, progress: tqdm) -> None:
        """The first step begins now. The progress bar's forecast leaves out the pauses too."""
        self.started, self.progress = time.monotonic(), progress

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self.started += seconds
        if self.progress is not None and not self.progress.disable:
            self.progress.start_t += seconds
            self.progress.last_print_t += seconds

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.waited += time.monotonic() - started

    def lap(self, step: int) -> Lap:
        """Means since the last lap."""
        steps, passed = step - self.since, time.monotonic() - self.started
        lap = Lap(passed / steps, self.waited / steps, self.tokens / passed)
        self.started, self.since, self.waited, self.tokens = time.monotonic(), step, 0.0, 0
        return lap

    def warn_if_slow(self, seconds: float, waited: float) -> None:
        """Once per run."""
        warning = None if self.warned else slow_step_warning(seconds, waited, self.expected())
        if warning is not None:
            self.warned = True
            tqdm.write(f"warning {warning}")


def slow_step_warning(seconds: float, waited: float, expected: float | None) -> str | None:
    """A warning with the likely causes, if a step takes more than twice the planned time."""
    if expected is None or seconds <= SLOW * expected:
        return None
    if waited > 0.5 * seconds:
        cause = f"{waited:.1f} s of it wait for data: put data.cache_dir on a local disk"
    else:
        cause = (
            "usual causes: another process on the same GPU; a hot or power-limited card "
            "(nvidia-smi shows both); GPU memory that spills over into RAM (Windows; choose a "
            "lower memory mode); a slow bus with memory=minimal or low_full; train.attention=math"
        )
    planned = f"the plan for this card says {expected:.1f} s +-35 %"
    return f"a step takes {seconds:.1f} s where {planned}; {cause}"
