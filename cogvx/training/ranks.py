"""The processes of a run, and which of them does what is done only once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator


@dataclass(frozen=True)
class Ranks:
    """With DistributedDataParallel every process holds the whole model, so one can act for all."""

    accelerator: Accelerator

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
        self.accelerator.wait_for_everyone()

    def highest(self, number: int) -> int:
        """The highest of all processes' numbers."""
        if self.count == 1:
            return number
        mine = torch.tensor([number], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())
