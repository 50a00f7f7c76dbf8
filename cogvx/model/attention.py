"""Which of torch's kernels computes attention, in training, held-out losses and videos."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend

from cogvx.errors import UserError
from cogvx.options.train import Attention

KINDS = {
    SDPBackend.FLASH_ATTENTION: Attention.flash,
    SDPBackend.EFFICIENT_ATTENTION: Attention.efficient,
    SDPBackend.CUDNN_ATTENTION: Attention.cudnn,
    SDPBackend.MATH: Attention.math,
}


@contextlib.contextmanager
def using(wanted: Attention) -> Iterator[None]:
    """Within this context only this kernel is used; `auto`: torch takes the fastest that works."""
    switches = torch.backends.cuda  # they switch the CPU's kernels too
    kinds = {
        Attention.flash: (switches.flash_sdp_enabled, switches.enable_flash_sdp),
        Attention.efficient: (
            switches.mem_efficient_sdp_enabled,
            switches.enable_mem_efficient_sdp,
        ),
        Attention.cudnn: (switches.cudnn_sdp_enabled, switches.enable_cudnn_sdp),
        Attention.math: (switches.math_sdp_enabled, switches.enable_math_sdp),
    }
    before = {kind: enabled() for kind, (enabled, _) in kinds.items()}
    try:
        if wanted is not Attention.auto:
            for kind, (_, enable) in kinds.items():
                enable(kind is wanted)
        yield
    finally:
        for kind, (_, enable) in kinds.items():
            enable(before[kind])


def in_use(
    heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, *, trained: bool = True
) -> Attention:
    """The kernel that torch takes for such a transformer. UserError if none is allowed."""
    tokens = torch.empty(1, heads, 128, head_dim, device=device, dtype=dtype, requires_grad=trained)
    try:
        return KINDS[SDPBackend(torch._fused_sdp_choice(tokens, tokens, tokens))]
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"train.attention: no such kernel on {device} for heads of {head_dim} in {dtype}; "
            f"train.attention=auto takes the fastest that works, "
            f"or try another of {', '.join(kind.name for kind in Attention)}"
        ) from error
