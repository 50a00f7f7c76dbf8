"""The stored forms of a frozen weight: as it is, fp8, int8 or nf4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cogvx.options.memory import Storage

NF4_BLOCK = 64  # weights that share a scale, bitsandbytes' default


@dataclass(frozen=True)
class StoredWeight:
    """A frozen weight in its stored form, and what restores it."""

    data: Tensor
    scale: Tensor | None  # int8: of each row; nf4: of each NF4_BLOCK weights
    code: Tensor | None  # nf4: its 16 levels
    storage: Storage
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def store(cls, weight: Tensor, storage: Storage) -> StoredWeight:
        """Vectors (biases and norms, a thousandth of the weights) keep their own form."""
        data, scale, code = weight.detach(), None, None
        if weight.ndim < 2:
            storage = Storage.own
        if storage is Storage.fp8:
            data = data.to(torch.float8_e4m3fn)
        elif storage is Storage.int8:
            scale = data.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            data = (data.float() / scale).round().to(torch.int8)
        elif storage is Storage.nf4:
            from bitsandbytes.functional import quantize_4bit

            data, state = quantize_4bit(data.contiguous(), quant_type="nf4", blocksize=NF4_BLOCK)
            scale, code = state.absmax, state.code
        return cls(data, scale, code, storage, weight.shape, weight.dtype)

    def moved(self, move: Callable[[Tensor], Tensor]) -> StoredWeight:
        parts = {name: getattr(self, name) for name in ("data", "scale", "code")}
        moved = {name: None if part is None else move(part) for name, part in parts.items()}
        return replace(self, **moved)

    def restored(self) -> Tensor:
        if self.storage is Storage.int8:
            return (self.data * self.scale).to(self.dtype)
        if self.storage is Storage.nf4:
            from bitsandbytes.functional import QuantState, dequantize_4bit

            state = QuantState(
                self.scale,
                shape=self.shape,
                code=self.code,
                blocksize=NF4_BLOCK,
                quant_type="nf4",
                dtype=self.dtype,
            )
            return dequantize_4bit(self.data, state)
        return self.data.to(self.dtype)
