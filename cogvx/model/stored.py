"""The stored forms of a frozen weight: as it is, fp8, int8 or nf4."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cogvx.data.cache import Cache, content_key
from cogvx.options.memory import Storage

NF4_BLOCK = 64  # weights that share a scale, bitsandbytes' default
FORMS = 1  # raise it when a change quantises the same weights to other values
# Weights that are quantised at once. On a CPU, all that is computed for them stays in its cache,
# which is ten times as fast for int8. On a device it bounds the memory that this takes.
AT_ONCE_ON_CPU, AT_ONCE = 2**18, 2**24


@dataclass(frozen=True)
class KeptForms:
    """The stored forms of a model's weights in the cache, a file for each block."""

    cache: Cache
    fingerprint: Callable[[], str]  # of the model's files

    def path(self, names: list[str], dtype: torch.dtype, storage: Storage, kind: str) -> Path:
        """kind: of the device that quantises. bitsandbytes has other code for each."""
        by = importlib.metadata.version("bitsandbytes") if storage is Storage.nf4 else None
        of = self.fingerprint(), names, str(dtype)
        return self.cache.path("quantised", content_key(FORMS, *of, storage.value, kind, by))


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
        data, scale, code = weight.detach(), None, None
        storage = cls.storage_of(weight, storage)
        if storage is Storage.fp8:
            data = data.to(torch.float8_e4m3fn)
        elif storage is Storage.int8:
            rows = max(1, at_once(data) // data[0].numel())
            data, scale = in_parts(to_int8, data, rows)
        elif storage is Storage.nf4:
            from bitsandbytes.functional import get_4bit_type

            data, scale = in_parts(to_nf4, data.reshape(-1), at_once(data))
            code = get_4bit_type("nf4", device=data.device)
        return cls(data, scale, code, storage, weight.shape, weight.dtype)

    @staticmethod
    def storage_of(weight: Tensor, storage: Storage) -> Storage:
        """Vectors (biases and norms, a thousandth of the weights) keep their own form."""
        return Storage.own if weight.ndim < 2 else storage

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


def at_once(weight: Tensor) -> int:
    return AT_ONCE_ON_CPU if weight.device.type == "cpu" else AT_ONCE


def in_parts(
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """quantise() of `size` rows after the other: their data and scales."""
    parts = [quantise(part) for part in weight.split(size)]
    return torch.cat([data for data, _ in parts]), torch.cat([scale for _, scale in parts])


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row becomes 127. Data and scale, in fp32."""
    values = rows.float()
    largest = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    # CUDA multiplies by the reciprocal of a Python number. By a tensor it divides, as the CPU does.
    scale = largest / torch.full_like(largest, 127.0)
    return (values / scale).round().to(torch.int8), scale


def to_nf4(weights: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(weights.contiguous(), quant_type="nf4", blocksize=NF4_BLOCK)
    return data, state.absmax
