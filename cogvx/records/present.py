"""What a run is doing now: RUN/progress.json, there while the run goes on.   [no torch]"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cogvx.files import read_json, write_json
from cogvx.progress import SignsOfLife, bars_now
from cogvx.records.heartbeats import silent

PROGRESS = "progress.json"
TELL_EVERY = 2  # seconds
# What is said of each phase of training/peaks.py: alone, and of the base model.
PHASE_WORDS = {
    "encode clips": "encoding clips",
    "encode prompts": "encoding prompts",
    "load": "loading the model",
    "train": "training",
    "held-out loss": "computing the held-out loss",
    "video": "making videos",
    "preview": "making a preview",
}
OF_THE_BASE_MODEL = ("held-out loss", "video")
TRAIN_BAR = "train"


# -- written by the run --------------------------------------------------------------------------


@contextlib.contextmanager
def telling(folder: Path, about: Callable[[], tuple[list[str], dict]] | None) -> Iterator[None]:
    """Writes what the run is doing every TELL_EVERY seconds, in a thread of its own.

    about(): the phase after those that it interrupts, and the memory by phase so far. None: another
    process of the run tells. The file is removed at the end; a killed run leaves it.
    """
    if about is None:
        yield
        return
    ended = threading.Event()
    told = (Teller(folder, about), ended)
    thread = threading.Thread(target=tell_until, args=told, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            (folder / PROGRESS).unlink(missing_ok=True)


def tell_until(teller: Teller, ended: threading.Event) -> None:
    while not ended.is_set():
        # A full disk or a folder that is away for a moment is the run's own business.
        with contextlib.suppress(OSError):
            write_json(teller.folder / PROGRESS, teller.facts(), make_folder=False)
        ended.wait(TELL_EVERY)


@dataclass
class Teller:
    """What the bars and the phases of a run say, and how long the rest will take."""

    folder: Path
    about: Callable[[], tuple[list[str], dict]]
    first: tuple[float, int] | None = None  # when the first step was seen, and which it was
    base_videos: float = 0.0  # seconds that the base model's videos took
    last: float | None = None  # when facts() was called last

    def facts(self) -> dict:
        phases, memory = self.about()
        now, training, inner = time.monotonic(), None, None
        for bar in bars_now():
            if str(bar.desc).strip() == TRAIN_BAR:
                training = bar
            else:
                inner = bar
        if phases == ["video"] and self.first is None and self.last is not None:
            self.base_videos += now - self.last
        self.last = now
        facts = {"written": time.time(), "phases": phases, "memory_by_phase": memory}
        if training is not None:
            self.first = self.first or (now, training.n)
            facts |= {"step": training.n, "steps": training.total}
            facts["seconds_left"] = self.seconds_left(now, training.n, training.total)
        elif self.first is not None:
            facts["trained"] = True
        if inner is not None and inner.total:
            facts["counted"] = [inner.n, inner.total]
        if not phases and SignsOfLife.running:
            facts["sign"] = SignsOfLife.running[-1].what
        return facts

    def seconds_left(self, now: float, step: int, steps: int) -> float | None:
        """At the mean pace of this start, pauses included, and the videos at the end."""
        began, first = self.first
        if step <= first:
            return None
        return (steps - step) * (now - began) / (step - first) + self.base_videos


# -- read by the pages ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Doing:
    """What a running run is doing."""

    words: str
    step: int | None
    steps: int | None
    seconds_left: float | None
    memory_by_phase: dict[str, dict[str, float]]

    @classmethod
    def read(cls, folder: Path, logged: int = 0) -> Doing:
        """logged: the last step in metrics.jsonl, which may have been written later."""
        facts, now = read_json(folder / PROGRESS), time.time()
        if "step" in facts:
            facts["step"] = max(facts["step"], logged)
        return cls(
            in_words(facts) + "".join(f". {beat.words(now)}" for beat in silent(folder)),
            facts.get("step"),
            facts.get("steps"),
            facts.get("seconds_left"),
            facts.get("memory_by_phase", {}),
        )


def in_words(facts: dict) -> str:
    """`Step 300 of 960: making videos`. Empty if the task does not tell what it is doing."""
    if not facts:
        return ""
    phases, step = facts.get("phases", []), facts.get("step")
    phase = phases[-1] if phases else None
    words = PHASE_WORDS.get(phase, phase)
    if phase is None:
        words = facts.get("sign", "").partition(" ")[2].strip() or "preparing"
    elif "counted" in facts:
        words += ": {} of {}".format(*facts["counted"])
    if step is not None:
        return f"Step {step} of {facts['steps']}: {words}"
    if facts.get("trained"):
        return f"All steps are done: {'writing the result' if phase is None else words}"
    if phase in OF_THE_BASE_MODEL:
        words += ", of the base model"
    return words[:1].upper() + words[1:]
