"""Frozen weights in a stored form, or on the CPU, until their block runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from cogvx.model import transfer
from cogvx.model.stored import StoredWeight
from cogvx.options.memory import Storage


class WeightOffloader:
    """Holds the frozen weights of all blocks. A block has its weights only while it runs.

    streamed: the weights are stored on the CPU. While a block runs, the next block's weights are
    copied to the device; the next one is the following or the preceding block, depending on the
    direction of the pass.
    """

    def __init__(
        self,
        blocks: Iterable[torch.nn.Module],
        storage: Storage,
        device: torch.device,
        *,
        streamed: bool,
    ):
        self.device, self.streamed = device, streamed
        cuda = streamed and device.type == "cuda"
        self.copy_stream = torch.cuda.Stream(device) if cuda else None
        # For each block the module and name of every frozen weight, and the weights.
        self.places = [frozen_places(block) for block in blocks]
        self.stored: list[list[StoredWeight]] = []
        self.arriving: tuple[int, list[StoredWeight]] | None = None  # a block's index and weights
        self.last = -1  # the block that ran last
        for index, block in enumerate(blocks):
            places = self.places[index]
            self.stored.append([self.take_away(owner, name, storage) for owner, name in places])
            block.register_forward_pre_hook(functools.partial(self.before, index))
            block.register_forward_hook(functools.partial(self.after, index), always_call=True)

    def take_away(self, owner: torch.nn.Module, name: str, storage: Storage) -> StoredWeight:
        """Stores the weight. The module keeps an empty parameter in its place."""
        parameter = owner._parameters[name]
        weight = StoredWeight.store(parameter, storage)
        if self.streamed:
            pinned = self.device.type == "cuda"
            weight = weight.moved(functools.partial(transfer.to_cpu, pinned=pinned))
        else:
            weight = weight.moved(functools.partial(transfer.to_device, device=self.device))
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.device)
        parameter.requires_grad_(False)
        return weight

    def before(self, index: int, block: torch.nn.Module, inputs: tuple) -> None:
        self.placeholders = [owner._parameters[name] for owner, name in self.places[index]]
        weights = self.on_device(index)
        for (owner, name), weight in zip(self.places[index], weights, strict=True):
            owner._parameters[name] = weight.restored()

    def after(self, index: int, block: torch.nn.Module, inputs: tuple, outputs: object) -> None:
        for (owner, name), placeholder in zip(self.places[index], self.placeholders, strict=True):
            owner._parameters[name] = placeholder

    def on_device(self, index: int) -> list[StoredWeight]:
        """The block's stored weights, on the device."""
        if not self.streamed:
            return self.stored[index]
        if self.arriving is None or self.arriving[0] != index:
            self.send(index)
        weights = self.arriving[1]
        if self.copy_stream is not None:
            self.wait_for(weights)
        following = index + (1 if index > self.last else -1)
        self.last, self.arriving = index, None
        if self.copy_stream is not None and 0 <= following < len(self.stored):
            self.send(following)
        return weights

    def wait_for(self, weights: list[StoredWeight]) -> None:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self.copy_stream)
        # Otherwise their memory could be reused while this stream still reads it.
        for weight in weights:
            weight.moved(lambda tensor: tensor.record_stream(stream))

    def send(self, index: int) -> None:
        """Starts copying a block's weights to the device."""
        to_device = functools.partial(transfer.to_device, device=self.device)
        beside = contextlib.nullcontext()
        if self.copy_stream is not None:
            beside = torch.cuda.stream(self.copy_stream)
        with beside:
            self.arriving = (index, [weight.moved(to_device) for weight in self.stored[index]])

    def move(self, move: Callable[[Tensor], Tensor]) -> None:
        for weights in self.stored:
            weights[:] = [weight.moved(move) for weight in weights]


def frozen_places(block: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """The module and name of every frozen weight."""
    return [
        (owner, name)
        for owner in block.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and not parameter.requires_grad
    ]


@contextlib.contextmanager
def offloaded(transformer: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Within this context, stored weights that are on the device are on the CPU."""
    offloader = getattr(transformer, "offloader", None)
    if offloader is None or offloader.streamed:
        yield
        return
    offloader.move(functools.partial(transfer.to_cpu, pinned=False))
    try:
        yield
    finally:
        offloader.move(functools.partial(transfer.to_device, device=device))
