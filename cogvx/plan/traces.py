"""Traces phases in processes of their own, and says what each phase takes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cogvx.config import Config
from cogvx.options.cards import Card
from cogvx.options.train import Attention
from cogvx.plan.allocator import Peak, replay
from cogvx.plan.phases import PHASES, configs_of, run_phases
from cogvx.plan.times import seconds_on
from cogvx.plan.trace import Recorder
from cogvx.progress import quiet_libraries

MEMORY_PARTS = ["weights", "gradients", "optimizer", "activations", "workspace"]


@dataclass(frozen=True)
class Phase:
    name: str
    peak: Peak  # bytes
    parts: dict[str, int]  # MEMORY_PARTS -> bytes, at the allocated peak
    flops: int
    seconds: float | None  # on the card that is planned for


@dataclass(frozen=True)
class Outcome:
    """What was found by tracing some phases. Sizes in bytes."""

    phases: list[Phase]
    host: int  # at most, in the CPU's memory
    optimizer: int  # the optimizer's states
    trained: int  # the trained weights

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def outcome_of(recorder: Recorder, card: Card | None, wanted: Attention) -> Outcome:
    """wanted: train.attention."""
    peaks = replay(recorder.events, expandable=True)
    found = []
    for name in PHASES:
        if name in peaks:
            work = {
                (op, dtype): w for (phase, op, dtype), w in recorder.work.items() if phase == name
            }
            flops = sum(w.flops for w in work.values())
            seconds = None if card is None else seconds_on(card, work, wanted)
            found.append(
                Phase(name, peaks[name], parts_of(recorder.at_peak.get(name, [])), flops, seconds)
            )
    sizes = Counter()
    for storage in recorder.storages.values():
        sizes[storage.what] += storage.size
    return Outcome(found, recorder.most[True], sizes["optimizer states"], sizes["trained weights"])


def parts_of(storages: list) -> dict[str, int]:
    """Bytes, by what they are used for."""
    sizes = dict.fromkeys(MEMORY_PARTS, 0)
    for storage in storages:
        sizes[part_of(storage.what)] += storage.size
    return sizes


def part_of(what: str) -> str:
    # Loading may turn the frozen weights into a smaller form.
    if what.endswith("weights") or what.startswith("load:"):
        return "weights"
    if "workspace" in what:
        return "workspace"
    return {"optimizer states": "optimizer", "gradients": "gradients"}.get(what, "activations")


def trace(arguments: tuple[Config, list[str], int | None, Card | None]) -> Outcome:
    config, phases, layers, card = arguments
    torch.set_num_threads(1)
    recorder = run_phases(config, phases, layers=layers)
    return outcome_of(recorder, card, config.train.attention)


def traces(jobs: list[tuple]) -> list[Outcome]:
    """Runs the jobs in two processes, which see no GPU.

    Forked processes have everything imported already. With a GPU they must not be forked: the
    libraries have asked for the GPU, and CUDA cannot be used in a fork after that.
    """
    method = "spawn" if torch.cuda.is_available() else "fork"
    start_pool = multiprocessing.get_context(method).Pool
    with no_visible_gpu(), start_pool(2, initializer=quiet_libraries) as pool:
        return pool.map(trace, jobs, chunksize=1)


@contextlib.contextmanager
def no_visible_gpu() -> Iterator[None]:
    """For the processes that are started within."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def step_seconds(config: Config, card: Card) -> float:
    """The time of an optimizer step, from two and from three layers: all layers are alike."""
    two, three = (trace((config, ["train"], n, card)).phase("train").seconds for n in (2, 3))
    return at_layers(layers_of(config), two, three)


def layers_of(config: Config) -> int:
    return configs_of(config)["transformer"]["num_layers"]


def at_layers(layers: int, two: float, three: float) -> float:
    """A quantity that grows equally with every layer, from its values at two and three layers."""
    return two + (layers - 2) * (three - two)
