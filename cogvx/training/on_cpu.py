"""Full fine-tuning with the fp32 weights, gradients, moments and optimizer step on the CPU.

The device holds the weights in the run's precision, and one gradient at a time. The optimizer
updates the fp32 weights, so small updates are not lost (Ren et al. 2021, ZeRO-Offload).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from cogvx.model import transfer


class Fp32Weights:
    """The trained weights on the CPU. The model's parameters become copies on the device."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], device: torch.device, dtype: torch.dtype
    ):
        self.copies = parameters
        self.weights = [torch.nn.Parameter(parameter.data) for parameter in parameters]
        for copy, weight in zip(self.copies, self.weights, strict=True):
            copy.data = transfer.to_device(weight.data.to(dtype), device)
            hook = functools.partial(self.fetch_gradient, weight)
            copy.register_post_accumulate_grad_hook(hook)

    @staticmethod
    def fetch_gradient(weight: torch.nn.Parameter, copy: torch.nn.Parameter) -> None:
        gradient = transfer.to_cpu(copy.grad, pinned=False).float()
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        copy.grad = None

    @torch.no_grad()
    def update_copies(self, *_) -> None:
        for copy, weight in zip(self.copies, self.weights, strict=True):
            copy.copy_(transfer.to_device(weight.to(copy.dtype), copy.device))

    @contextlib.contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Within this context the model holds the fp32 weights, to be saved or loaded."""
        on_device = [copy.data for copy in self.copies]
        for copy, weight in zip(self.copies, self.weights, strict=True):
            copy.data = weight.data
        try:
            yield
        finally:
            for copy, data in zip(self.copies, on_device, strict=True):
                copy.data = data
            self.update_copies()
