"""Traces phases in processes of their own, and says what each phase takes.   [no torch until then]

What was traced once is remembered.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cogvx.config import Config
from cogvx.data.cache import claimed
from cogvx.libraries import load_libraries
from cogvx.options.cards import Card
from cogvx.plan import remembered
from cogvx.plan.allocator import replay
from cogvx.plan.configs import layers_of
from cogvx.plan.found import MEMORY_PARTS, PHASES, VIDEO_PHASES, Outcome, Phase
from cogvx.plan.times import times_on
from cogvx.progress import quiet_libraries

if TYPE_CHECKING:
    from cogvx.plan.trace import Recorder

# What to trace: the settings, the phases, and how many layers of the transformer. None: all.
Asked = tuple[Config, list[str], int | None]


def outcome_of(recorder: Recorder) -> Outcome:
    peaks, work = replay(recorder.events, expandable=True), defaultdict(dict)
    for (phase, op, dtype), done in recorder.work.items():
        kind = (op, None if dtype is None else str(dtype).removeprefix("torch."))
        work[phase][kind] = done
    found = [
        Phase(
            name,
            peaks[name],
            parts_of(recorder.at_peak.get(name, [])),
            work[name],
            recorder.moved[name],
        )
        for name in dict.fromkeys([*PHASES, *VIDEO_PHASES])
        if name in peaks
    ]
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


def trace(job: Asked) -> Outcome:
    """What is remembered of it, or traced now. Several processes do not trace the same."""
    path = remembered.place(*job)
    with claimed(path, wait=True):
        found = remembered.recall(path)
        if found is None:
            found = traced_now(*job)
            remembered.keep(path, found)
    return found


def traced_now(config: Config, phases: list[str], layers: int | None) -> Outcome:
    load_libraries()
    import torch

    from cogvx.plan.phases import run_phases

    torch.set_num_threads(1)
    return outcome_of(run_phases(config, phases, layers=layers))


def numbered_trace(numbered: tuple[int, Asked]) -> tuple[int, Outcome]:
    number, job = numbered
    return number, trace(job)


def traces(jobs: list[Asked], done: Callable[[Asked, int], None] = lambda job, left: None) -> list:
    """The outcome of each job. done(job, left) is called when one is; `left` are not done yet.

    What is not remembered is traced in two processes, which see no GPU.
    """
    found = [remembered.recall(remembered.place(*job)) for job in jobs]
    missing = [(number, job) for number, job in enumerate(jobs) if found[number] is None]
    left = len(missing)
    with pool_of_two() if missing else contextlib.nullcontext() as pool:
        for number, outcome in pool.imap_unordered(numbered_trace, missing) if missing else ():
            found[number] = outcome
            left -= 1
            done(jobs[number], left)
    return found


@contextlib.contextmanager
def pool_of_two() -> Iterator:
    """Forked processes have everything imported already. With a GPU they must not be forked: the
    libraries have asked for the GPU, and CUDA cannot be used in a fork after that."""
    load_libraries()
    import torch

    method = "spawn" if torch.cuda.is_available() else "fork"
    if method == "fork":
        import cogvx.plan.phases  # noqa: F401
    start_pool = multiprocessing.get_context(method).Pool
    with no_visible_gpu(), start_pool(2, initializer=begin_worker) as pool:
        yield pool


def begin_worker() -> None:
    """A forked process has the run's handler of SIGTERM, with which the pool ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    quiet_libraries()


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
    phases = [trace((config, ["train"], n)).phase("train") for n in (2, 3)]
    two, three = (times_on(card, phase, config.train.attention) for phase in phases)
    return two.at_layers(layers_of(config), three).total
