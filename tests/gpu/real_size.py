"""Entries that run the phases of a run on models of real size, with random weights."""

from __future__ import annotations

import contextlib
import functools
import gc
import platform
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from battery import Here
from entries import GIB, Skipped, settings

from cogvx.compose import compose_config
from cogvx.config import Config
from cogvx.plan import phases
from cogvx.plan.allocator import replay
from cogvx.plan.found import PHASES
from cogvx.plan.phases import run_phases
from cogvx.plan.trace import Meter, initialized_by, patched
from cogvx.training.deterministic import deterministic_kernels, require_workspace
from cogvx.training.trainer import Trainer

MEMORY_BOUND, TIME_BOUND = 0.05, 0.35
# Goals of the project: 5b, LoRA, batch 1, 49 frames of 720x480 on an H100.
SECONDS_GOAL, IDLE_GOAL = 2.0, 3.0  # seconds; per cent
RESERVED_GOALS = {"low": 12e9 / GIB, "minimal": 8e9 / GIB}  # GiB
OPTIONAL = {
    "bitsandbytes": "8-bit optimizers, base_storage=nf4",
    "datasets": "data=dataset",
    "optuna": "searches",
    "wandb": "tracking=wandb",
    "torchao": "optimizer=adamw8bit_torchao",
    "prodigyopt": "optimizer=prodigy",
    "schedulefree": "optimizer=schedule_free",
    "matplotlib": "curves of the pages",
    "tensorboard": "tracking=tensorboard",
    "scipy": "scores of the demo's videos",
}


def machine(here: Here) -> None:
    def say(what: str, value: object) -> None:
        here.line(what, value, status="info")

    if here.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        free = torch.cuda.mem_get_info()[0]
        say("card", f"{about.name}, {about.total_memory / GIB:.1f} GiB, {free / GIB:.1f} free")
        product = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
        here.line("a matrix product", float((product @ product)[0, 0]), status="ok")
    say("python", platform.python_version())
    say("torch", f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    for name in ("diffusers", "transformers", "accelerate", "peft", "hydra-core", "safetensors"):
        say(name, metadata.version(name))
    memory = meminfo()
    say("RAM", f"{memory['MemTotal'] / GIB:.0f} GiB, {memory['MemAvailable'] / GIB:.0f} available")
    say("threads of torch", torch.get_num_threads())
    for name, used_for in OPTIONAL.items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            say(name, metadata.version(name))
            continue
        here.line(name, "missing", status="skipped", note=f"not tried here: {used_for}")


def first_2b(here: Here) -> None:
    first_contact(here, "2b")


def first_5b(here: Here) -> None:
    first_contact(here, "5b")


def first_contact(here: Here, model: str) -> None:
    config = configuration(here, model, "balanced")
    laps = measure(here, config, ["load", "train"], steps=2, plan=f"{model} balanced")
    if laps:
        here.line("second step", round(laps[-1], 2), "s")


def mode(here: Here, model: str, memory: str) -> None:
    """Every phase, in the order of a run."""
    if here.device == "cuda" and memory == "fast" and model == "5b":
        total = torch.cuda.get_device_properties(0).total_memory
        if total < 120e9 and not here.small:
            raise Skipped("5b under fast needs about 107 GB")
    plan, config = f"{model} {memory}", configuration(here, model, memory)
    with watching_ram() as fallen:
        laps = measure(here, config, PHASES, steps=4, plan=plan, goal=reserved_goal(here, plan))
    if laps:
        # The first steps choose kernels and fill the allocator.
        goal = SECONDS_GOAL if plan == "5b balanced" and is_hopper(here) else None
        here.line(
            "seconds per step",
            statistics.median(laps[1:]),
            "s",
            plan=[plan, "seconds_per_step"],
            bound=None if here.small else TIME_BOUND,
            most=goal,
            note=f"first step {laps[0]:.2f}; then {', '.join(f'{lap:.2f}' for lap in laps[1:])}",
        )
    tell_ram(here, plan, max(fallen))


def configuration(here: Here, model: str, memory: str, *more: str) -> Config:
    overrides = settings(model, memory, small=here.small, scratch=here.scratch)
    config = compose_config([*overrides, *more])
    if config.model.is_built_in:
        config.model.local_folder()
    return config


def is_hopper(here: Here) -> bool:
    return here.device == "cuda" and not here.small and torch.cuda.get_device_capability()[0] == 9


def reserved_goal(here: Here, plan: str) -> float | None:
    model, memory = plan.split()
    return RESERVED_GOALS.get(memory) if model == "5b" and not here.small else None


# -- measuring ------------------------------------------------------------------------------------


def measure(
    here: Here,
    config: Config,
    names: list[str],
    *,
    plan: str,
    steps: int = 1,
    goal: float | None = None,
) -> list[float]:
    """Runs these phases. A line for each, as soon as it has ended. Returns the steps' seconds.

    On a CPU it counts what tensors really take.
    """
    tell = functools.partial(tell_peak, here, plan, goal)
    if here.device == "cpu":
        # A streamed text encoder takes many prompts at once: minutes, where each call is recorded.
        if config.memory.stream_text_encoder:
            names = [name for name in names if name != "encode prompts"]
        recorder = run_phases(config, names, steps=steps, as_cuda=False, fake=False)
        for name, peak in replay(recorder.events).items():
            tell(name, peak)
        return []
    with telling(tell), patched(phases, metering=random_metering):
        return run_phases(config, names, steps=steps, device=torch.device("cuda")).laps


def tell_peak(here: Here, plan: str, goal: float | None, name: str, peak) -> None:
    if name not in PHASES:
        return
    here.line(
        f"{name}: reserved",
        round(peak.reserved / GIB, 3),
        "GiB",
        plan=[plan, "phases", name, "reserved_gib"],
        # A plan for a card says nothing of a CPU. At tiny sizes a segment more is many per cent.
        bound=MEMORY_BOUND if here.device == "cuda" and not here.small else None,
        most=goal,
        note=f"allocated {peak.allocated / GIB:.3f}",
    )


@contextlib.contextmanager
def telling(tell) -> Iterator[None]:
    """Calls tell(phase, its peak) when a phase has ended, or has failed."""
    begin, current = Meter.begin, []

    def begin_and_tell(self: Meter, phase: str) -> None:
        ended, current[:] = self.phase, [phase]
        begin(self, phase)
        if ended:
            tell(ended, self.peaks[ended])

    with patched(Meter, begin=begin_and_tell):
        try:
            yield
        except Exception as error:
            reserved = torch.cuda.max_memory_reserved() / GIB
            error.args = (
                f"{error} ... in phase '{[*current, ''][0]}', with {reserved:.2f} GiB reserved",
            )
            raise


@contextlib.contextmanager
def random_metering(device: torch.device) -> Iterator[Meter]:
    """As plan/trace.py's metering(), with random weights.

    A card multiplies equal numbers faster than random ones.
    """
    with initialized_by(fill):
        yield Meter(device)


def fill(tensor: torch.Tensor, *others: object, **more: object) -> torch.Tensor:
    """Random numbers that repeat every million weights: as fast as a copy."""
    if tensor.device.type != "meta" and tensor.is_floating_point():
        flat = tensor.data.view(-1)
        numbers = tile(tensor.device, tensor.dtype)
        for start in range(0, len(flat), len(numbers)):
            part = flat[start : start + len(numbers)]
            part.copy_(numbers[: len(part)])
    return tensor


@functools.cache
def tile(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    numbers = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    return numbers.to(device, dtype)


@contextlib.contextmanager
def watching_ram() -> Iterator[list[float]]:
    """GiB by which the machine's available memory has fallen, five times a second."""
    before, fallen, done = meminfo()["MemAvailable"], [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            fallen.append((before - meminfo()["MemAvailable"]) / GIB)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield fallen
    finally:
        done.set()
        watcher.join()


def tell_ram(here: Here, plan: str, fallen: float) -> None:
    """What this process really took of the machine's memory, pinned memory by itself.

    Pinned memory is not in every count: torch knows what its own allocator pinned, the kernel may
    leave it out of the process's size, and the machine's available memory has all in it, but that
    of the plans beside this too.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    highest = int(status["VmHWM"].split()[0]) * 1024 / GIB
    pinned = pinned_gib()
    pinned = "not counted by this torch" if pinned is None else f"at most {pinned:.2f}"
    here.line(
        "RAM of the process, at most",
        round(highest, 2),
        "GiB",
        plan=[plan, "host_gib"] if here.device == "cuda" else None,
        note=f"pinned by torch {pinned}; available memory of the machine fell by {fallen:.2f}; "
        "the plan leaves out about 2 GiB for Python and CUDA",
    )


def pinned_gib() -> float | None:
    """None: this torch does not count it."""
    stats = getattr(torch.cuda, "host_memory_stats", dict)()
    peaks = [stats.get(f"{kind}_bytes.peak") for kind in ("allocated", "reserved", "active")]
    found = [peak for peak in peaks if peak is not None]
    return max(found) / GIB if found else None


def meminfo() -> dict[str, int]:
    """/proc/meminfo, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


# -- where the time goes ---------------------------------------------------------------------------


def profile_5b(here: Here) -> None:
    """A profile of the third step: the share of time without a kernel, and the longest kernels."""
    config, steps = configuration(here, "5b", "balanced"), []
    step = Trainer.optimizer_step

    def profiled(self: Trainer) -> float:
        steps.append(None)
        if len(steps) != 3:
            return step(self)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if here.device == "cuda" else []
        with torch.profiler.profile(activities=kinds) as found:
            rate = step(self)
            if here.device == "cuda":
                torch.cuda.synchronize()
        tell_profile(here, found)
        return rate

    with patched(Trainer, optimizer_step=profiled):
        measure(here, config, ["train"], steps=3, plan="5b balanced")


def tell_profile(here: Here, found: torch.profiler.profile) -> None:
    kind = torch.autograd.DeviceType.CUDA if here.device == "cuda" else None
    events = [
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in found.profiler.kineto_results.events()
        if kind is None or event.device_type() == kind
    ]
    copies = [event for event in events if event[2].startswith(("Memcpy", "Memset"))]
    kernels = [event for event in events if event not in set(copies)]
    if not kernels:
        raise RuntimeError("the profiler saw no kernel on the device")
    whole = max(end for _, end, _ in events) - min(start for start, _, _ in events)
    idle = 100 * (1 - covered(kernels) / whole)
    goal = IDLE_GOAL if is_hopper(here) else None
    note = f"a step of {whole / 1e9:.2f} s; {len(kernels)} kernels; {len(copies)} copies of "
    note += f"{covered(copies) / 1e9:.2f} s"
    here.line("time without a kernel", round(idle, 2), "%", most=goal, note=note, status=None)
    times, calls = Counter(), Counter(name for *_, name in kernels)
    for start, end, name in kernels:
        times[name] += end - start
    for name, nanoseconds in times.most_common(10):
        share = 100 * nanoseconds / whole
        here.line(f"`{name[:90]}`", round(share, 1), "%", note=f"{calls[name]} calls")


def covered(events: list[tuple[int, int, str]]) -> int:
    """Nanoseconds in which at least one of them runs."""
    total, last = 0, 0
    for start, end, _ in sorted(events):
        total += max(0, end - max(start, last))
        last = max(last, end)
    return total


def compiled(here: Here) -> None:
    """With and without: seconds per step, and how long the first step takes."""
    measured = {}
    for compile in ("false", "true"):
        config = configuration(
            here, "2b", "balanced", f"train.compile={compile}", "memory.recompute=full"
        )
        began = time.monotonic()
        laps = measure(here, config, ["load", "train"], steps=4, plan="2b balanced")
        seconds = time.monotonic() - began
        laps = laps or [seconds / 4] * 4  # a CPU: no step is measured by itself
        measured[compile] = statistics.median(laps[2:])
        here.line(
            f"train.compile={compile}: seconds per step",
            round(measured[compile], 3),
            "s",
            note=f"first step {laps[0]:.1f} s",
        )
        gc.collect()
        if here.device == "cuda":
            torch.cuda.empty_cache()
    here.line("without / with", round(measured["false"] / measured["true"], 3), "times")


def deterministic_cost(here: Here) -> None:
    """Seconds per step and memory with and without. Both with flash, as the mode has it."""
    require_workspace()  # before CUDA starts
    on_a_card, measured = here.device == "cuda", {}
    for strict in (False, True):
        config = configuration(here, "2b", "balanced", "train.attention=flash")
        began = time.monotonic()
        with deterministic_kernels(compiled=False) if strict else contextlib.nullcontext():
            found = steps_of(config, here.device)
        # A CPU: no step is measured by itself.
        laps = found.laps if on_a_card else [(time.monotonic() - began) / 4] * 4
        measured[strict] = statistics.median(laps[1:])
        named = f"train.deterministic={str(strict).lower()}"
        here.line(f"{named}: seconds per step", round(measured[strict], 3), "s")
        if on_a_card:
            here.line(f"{named}: reserved", round(found.peaks["train"].reserved / GIB, 3), "GiB")
        gc.collect()
        if on_a_card:
            torch.cuda.empty_cache()
    here.line("with / without", round(measured[True] / measured[False], 3), "times")


def steps_of(config: Config, device: str):
    """Four steps of training: a Meter on a card, else a Recorder."""
    if device == "cpu":
        return run_phases(config, ["load", "train"], steps=4, as_cuda=False, fake=False)
    with patched(phases, metering=random_metering):
        return run_phases(config, ["load", "train"], steps=4, device=torch.device("cuda"))


if __name__ == "__main__":
    sys.exit("python tests/gpu/battery.py")
