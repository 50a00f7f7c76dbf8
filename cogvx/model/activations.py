"""The inputs of checkpointed blocks, kept in the CPU's memory for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from cogvx.model import transfer


class SavedInputs:
    """The inputs of one block."""

    def __init__(self, memory: Tensor, inputs: list[Tensor], preceding: weakref.ref | None):
        # On the CPU. None: on the way back to the device, or there.
        self.memory: Tensor | None = memory
        self.places = transfer.packed_views(memory, inputs)
        # Must not be freed while they are copied to the CPU.
        self.on_device: list[Tensor] | None = inputs
        self.sent: torch.cuda.Event | None = None  # they are on the CPU
        self.fetched: list[Tensor] | None = None
        self.arrived: torch.cuda.Event | None = None  # they are back on the device
        # Those of the block before. The graph holds them, not this.
        self.preceding = preceding


class InputStore:
    """Copies inputs to the CPU while their block runs, and back one block ahead.

    All copies are on one stream, so they run in the order of their calls. The memory on the CPU is
    used again by later blocks and steps.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.copies = transfer.CopyStream(device)
        self.free: list[Tensor] = []  # memory of the CPU
        self.latest: weakref.ref | None = None

    def save(self, inputs: Iterable[Tensor]) -> SavedInputs:
        """Starts copying to the CPU. let_go() must follow once the block is issued."""
        inputs = [each.detach().contiguous() for each in inputs]
        saved = SavedInputs(self.memory(transfer.packed_size(inputs)), inputs, self.latest)
        # mark(): the inputs are what was issued last, and may not be computed yet.
        pairs = zip(saved.places, inputs, strict=True)
        saved.sent = self.copies.copy(pairs, after=self.copies.mark())
        self.latest = weakref.ref(saved)
        return saved

    def let_go(self, saved: SavedInputs) -> None:
        """Lets the inputs be freed on the device.

        What is issued from now on waits for the copy, so it can have their memory.
        """
        self.copies.wait(saved.sent)
        saved.on_device = None

    def fetch(self, saved: SavedInputs) -> list[Tensor]:
        """The inputs on the device. Starts copying those of the block before."""
        if saved.memory is not None:
            self.send_back(saved)
        self.copies.wait(saved.arrived)
        inputs, saved.fetched = saved.fetched, None
        preceding = None if saved.preceding is None else saved.preceding()
        if preceding is not None and preceding.memory is not None:
            self.send_back(preceding)
        return inputs

    def send_back(self, saved: SavedInputs) -> None:
        saved.fetched = [
            torch.empty(each.shape, dtype=each.dtype, device=self.device) for each in saved.places
        ]
        # mark(): this memory may have been used before, by work that is issued but not done.
        pairs = zip(saved.fetched, saved.places, strict=True)
        saved.arrived = self.copies.copy(pairs, after=self.copies.mark())
        # The next copy into this memory is on the same stream, so it comes after this one.
        self.free.append(saved.memory)
        saved.memory = saved.places = None

    def memory(self, size: int) -> Tensor:
        """At least `size` bytes on the CPU. A free memory that is too small gives way."""
        for number, memory in enumerate(self.free):
            if memory.numel() >= size:
                return self.free.pop(number)
        if self.free:
            self.free.pop()
        return transfer.host_memory(size, self.device)
