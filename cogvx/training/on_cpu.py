"""Full fine-tuning with its fp32 weights, gradients, moments and the optimizer's step on the CPU.

The device holds the weights in the run's precision, as they are delivered, and of the gradients one at a time. The fp32 weights
take the steps, so that small updates are not lost (Ren et al. 2021, ZeRO-Offload).
"""

from __future__ import annotations

import contextlib

import torch

from cogvx.model import blocks


class Masters:
    """The fp32 weights of trained parameters, which have become copies of them on the device."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], device: torch.device, dtype: torch.dtype
    ):
        self.copies = parameters
        self.weights = [torch.nn.Parameter(parameter.data) for parameter in parameters]
        for copy, weight in zip(self.copies, self.weights, strict=True):
            copy.data = blocks.to_device(weight.data.to(dtype), device)
            copy.register_post_accumulate_grad_hook(self.fetch_for(weight))

    @staticmethod
    def fetch_for(weight: torch.nn.Parameter):
        def fetch(copy: torch.nn.Parameter) -> None:
            gradient = blocks.to_cpu(copy.grad, pinned=False).float()
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
            copy.grad = None

        return fetch

    @torch.no_grad()
    def push(self, *_) -> None:
        """The fp32 weights to the device."""
        for copy, weight in zip(self.copies, self.weights, strict=True):
            copy.copy_(blocks.to_device(weight.to(copy.dtype), copy.device))

    @contextlib.contextmanager
    def in_their_place(self):
        """The model holds the fp32 weights themselves, to be saved or loaded."""
        held = [copy.data for copy in self.copies]
        for copy, weight in zip(self.copies, self.weights, strict=True):
            copy.data = weight.data
        try:
            yield
        finally:
            for copy, data in zip(self.copies, held, strict=True):
                copy.data = data
            self.push()
