"""Traces phases in processes of their own, and says what each phase takes.   [no torch until then]

What was traced once is remembered.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from cogvx.config import Config
from cogvx.data.cache import claimed
from cogvx.errors import UserError
from cogvx.leaving import outlast_signals
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


def traces(jobs: list[Asked], done: Callable[[Asked, int], None] = lambda job, left: None) -> list:
    """The outcome of each job. done(job, left) is called when one is; `left` are not done yet.

    What is not remembered is traced in two processes, which see no GPU. UserError if one of them
    is killed.
    """
    found = [remembered.recall(remembered.place(*job)) for job in jobs]
    missing = [number for number, outcome in enumerate(found) if outcome is None]
    left = len(missing)
    if not missing:
        return found
    with pool_of_two() as pool:
        asked = {pool.submit(trace, jobs[number]): number for number in missing}
        for traced in as_completed(asked):
            number = asked[traced]
            found[number] = traced.result()
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
    how = {"mp_context": multiprocessing.get_context(method), "initializer": begin_worker}
    with no_visible_gpu(), ProcessPoolExecutor(2, **how) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise UserError(
                "a process that plans was killed, by someone or because the machine's memory ran "
                "out. Type the same command again: what was planned is remembered"
            ) from error
        except BaseException:
            # The pool would wait for them.
            for process in multiprocessing.active_children():
                process.kill()
            raise


def begin_worker() -> None:
    """A forked process has the handlers of the run, which is told of signals itself."""
    outlast_signals()
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
