"""train.profile_steps: a record of where the time of some steps goes."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import torch
from tqdm import tqdm

from cogvx.files import shown, write_text
from cogvx.options.train import PROFILE_AFTER
from cogvx.progress import counted


class NoProfiler:
    """Takes the profiler's place when nothing is recorded."""

    def step(self) -> None:
        pass


def profiler(steps: int, folder: Path, device: torch.device):
    """A context whose value has step(). It records `steps` steps, after the slower first ones."""
    if not steps:
        return contextlib.nullcontext(NoProfiler())
    schedule = torch.profiler.schedule(wait=PROFILE_AFTER - 1, warmup=1, active=steps, repeat=1)
    return torch.profiler.profile(
        schedule=schedule,
        on_trace_ready=functools.partial(write_profile, folder / "profile", device.type, steps),
        record_shapes=True,
    )


def write_profile(place: Path, device: str, steps: int, recorded: torch.profiler.profile) -> None:
    place.mkdir(exist_ok=True)
    table = recorded.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=40)
    write_text(place / "operations.txt", table)
    recorded.export_chrome_trace(str(place / "trace.json"))
    tqdm.write(
        f"profile {shown(place / 'operations.txt')} lists where the time of "
        f"{counted(steps, 'step')} went; trace.json beside it shows it (chrome://tracing, Perfetto)"
    )
