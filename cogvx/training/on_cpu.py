"""Full fine-tuning with the fp32 weights, gradients, moments and optimizer step on the CPU.

The device holds the weights in the run's precision, and one gradient at a time. The optimizer
updates the fp32 weights, so small updates are not lost (Ren et al. 2021, ZeRO-Offload).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from cogvx.model import transfer


class Fp32Weights:
    """The trained weights on the CPU. The model's parameters become copies on the device."""

    def __init__(self, transformer: torch.nn.Module, device: torch.device, dtype: torch.dtype):
        self.places = trained_places(transformer)
        self.weights = [owner._parameters[name] for owner, name in self.places]
        self.copies = [
            torch.nn.Parameter(transfer.to_device(weight.detach().to(dtype), device))
            for weight in self.weights
        ]
        self.put(self.copies)
        copies = transfer.CopyStream(device)
        self.gradients = Gradients(self.weights, copies)
        for index, copy in enumerate(self.copies):
            hook = functools.partial(self.gradients.fetch, index)
            copy.register_post_accumulate_grad_hook(hook)
        self.staging = Staging(max(map(transfer.aligned_size, self.copies)), copies)

    def put(self, weights: list[torch.nn.Parameter]) -> None:
        for (owner, name), weight in zip(self.places, weights, strict=True):
            owner._parameters[name] = weight

    @torch.no_grad()
    def update_copies(self, *_) -> None:
        for copy, weight in zip(self.copies, self.weights, strict=True):
            self.staging.send(copy, weight)

    @contextlib.contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Within this context the model holds the fp32 weights, to be saved or loaded."""
        self.put(self.weights)
        try:
            yield
        finally:
            self.put(self.copies)
            self.update_copies()


def trained_places(module: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """The module and name of every trained weight, in the order of module.parameters()."""
    return [
        (owner, name)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]


class Gradients:
    """The gradients of all weights in fp32, in the CPU's memory, where the device copies them.

    The CPU waits for none of these copies before wait() is called.
    """

    def __init__(self, weights: list[torch.nn.Parameter], copies: transfer.CopyStream):
        self.weights, self.copies = weights, copies
        memory = transfer.host_memory(transfer.packed_size(weights), copies.device)
        self.places = transfer.packed_views(memory, weights)
        # The gradient that was sent last, and the event that it has arrived.
        self.leaving: tuple[Tensor, torch.cuda.Event | None] | None = None

    @torch.no_grad()
    def fetch(self, index: int, copy: torch.nn.Parameter) -> None:
        """Sends the gradient of a copy to its weight. It is added to one that is there already."""
        gradient, place, weight = copy.grad.float(), self.places[index], self.weights[index]
        copy.grad = None
        if weight.grad is not None:
            gradient = gradient + self.earlier(place, gradient)
        # From here on the memory of the gradient before may be used anew: its copy must be done.
        if self.leaving is not None:
            self.copies.wait(self.leaving[1])
        # mark(): the gradient may not be computed yet.
        sent = self.copies.copy([(place, gradient)], after=self.copies.mark())
        self.leaving, weight.grad = (gradient, sent), place

    def earlier(self, place: Tensor, gradient: Tensor) -> Tensor:
        """The sum of the earlier micro-batches, on the device."""
        found = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
        # On the stream that has sent it, so it has arrived by then. mark(): the memory of `found`
        # may have been used before, by work that is issued but not done.
        self.copies.wait(self.copies.copy([(found, place)], after=self.copies.mark()))
        return found

    def wait(self) -> None:
        """Waits until the CPU may read the gradients."""
        if self.leaving is not None and self.leaving[1] is not None:
            # All copies are on one stream: the last one is done last.
            self.leaving[1].synchronize()
        self.leaving = None


class Staging:
    """Two memories of the CPU from which the device copies weights, while the next is rounded."""

    def __init__(self, size: int, copies: transfer.CopyStream):
        self.copies = copies
        self.memories = [transfer.host_memory(size, copies.device) for _ in range(2)]
        # The event that the device has read it.
        self.read: list[torch.cuda.Event | None] = [None, None]

    def send(self, copy: Tensor, weight: Tensor) -> None:
        """Rounds a weight to the dtype of its copy, and sends it there."""
        self.memories.reverse()
        self.read.reverse()
        if self.read[0] is not None:
            self.read[0].synchronize()
        [rounded] = transfer.packed_views(self.memories[0], [copy])
        rounded.copy_(weight)
        # On the computing stream: what was issued before may still read the old weight.
        copy.copy_(rounded, non_blocking=True)
        self.read[0] = self.copies.mark()
