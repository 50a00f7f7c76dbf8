"""Tensors between the CPU's memory and the device's. The planner replaces these three functions."""

from __future__ import annotations

import torch
from torch import Tensor


def to_cpu(tensor: Tensor, *, pinned: bool) -> Tensor:
    """pinned: the copy does not wait for the device."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return copy.copy_(tensor.detach(), non_blocking=pinned)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def bring(module: torch.nn.Module, device: torch.device) -> None:
    module.to(device)
