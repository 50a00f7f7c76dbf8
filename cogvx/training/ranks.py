"""The processes of a run, and which of them does what is done only once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from cogvx.config import Config
from cogvx.errors import UserError
from cogvx.options.train import FP16_WITHOUT_GPU, Precision
from cogvx.progress import PULSE, counted
from cogvx.training.peaks import MemoryPeaks

Made = TypeVar("Made")

# Of a message between processes that is late because one of them downloads, encodes or makes
# videos.
LONGEST_WAIT = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """With DistributedDataParallel every process holds the whole model, so one can act for all."""

    accelerator: Accelerator
    # The group for numbers that are on the hosts; None: the default group. See host_group().
    hosts: dist.ProcessGroup | None = None
    # Of this process's memory.
    peaks: MemoryPeaks = field(default_factory=MemoryPeaks)

    @property
    def saves(self) -> bool:
        """Whether this process writes checkpoints and the result."""
        return self.accelerator.is_main_process

    @property
    def logs(self) -> bool:
        """Whether this process writes metrics, reports and progress."""
        return self.accelerator.is_main_process

    @property
    def makes_videos(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def about(self) -> Callable[[], tuple[list[str], dict]] | None:
        """For records/present.py, of the process that logs: the phases and the memory so far."""
        return self.peaks.present_state if self.logs else None

    @property
    def say(self) -> Callable[..., None]:
        """Prints once, whatever the number of processes."""
        return self.accelerator.print

    @property
    def index(self) -> int:
        return self.accelerator.process_index

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    def wait(self) -> None:
        """Returns when every process has come here."""
        with PULSE.waiting():
            self.accelerator.wait_for_everyone()

    def of_first(self, value: object) -> object:
        """The first process's value, in every process."""
        if self.count == 1:
            return value
        with PULSE.waiting():
            return broadcast_object_list([value])[0]

    def done_by_first(self, make: Callable[[], Made]) -> Made:
        """What make() returns in the first process, in every process. So with its UserError."""
        made = error = None
        if self.index == 0:
            try:
                made = make()
            except UserError as raised:
                error = str(raised)
        made, error = self.of_first((made, error))
        if error is not None:
            raise UserError(error)
        return made

    def highest(self, number: int) -> int:
        """The highest of all processes' numbers. The hosts wait for each other, not for a GPU."""
        if self.count == 1:
            return number
        shared = torch.tensor([number], device="cpu")
        with PULSE.waiting():
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.hosts)
        return shared.tolist()[0]


def host_group() -> dist.ProcessGroup | None:
    """A group of all processes whose messages do not pass through the device.

    NCCL, the default group's backend on GPUs, knows no memory but the device's. To read an answer
    from there is to wait until the device has done all that it was given before.
    None where the default group will do, or for a single process.
    """
    if not dist.is_initialized() or dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


def start_processes(config: Config) -> Ranks:
    """Accelerate on the devices present. UserError if they cannot do what is asked for."""
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    precision, processes = config.train.mixed_precision, config.parallel.num_processes
    require_precision(precision, gpu=gpu)
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise UserError(
            f"parallel.num_processes={processes}: torch sees "
            f"{counted(torch.cuda.device_count(), 'GPU')}, and each process needs its own"
        )
    # Buffers never change. Sending them would wait for processes that have no held-out clip.
    settings = [
        DistributedDataParallelKwargs(broadcast_buffers=False),
        InitProcessGroupKwargs(timeout=LONGEST_WAIT),
    ]
    accelerator = Accelerator(mixed_precision=precision.name, cpu=not gpu, kwargs_handlers=settings)
    # Accelerate falls back to one process silently, in several ways.
    if accelerator.num_processes != processes:
        raise UserError(
            f"parallel.num_processes={processes}, but accelerate runs "
            f"{accelerator.num_processes}: start it with python launch.py, "
            f"without torchrun or accelerate launch"
        )
    return Ranks(accelerator, host_group())


def require_precision(precision: Precision, *, gpu: bool) -> None:
    if precision is Precision.fp16 and not gpu:
        raise UserError(FP16_WITHOUT_GPU)
    cuda = torch.cuda.is_available()
    if precision is Precision.bf16 and cuda:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return
        raise UserError(
            f"train.mixed_precision=bf16: {torch.cuda.get_device_name()} does not have it; "
            f"2B trains in fp16, 5B needs a newer GPU"
        )
