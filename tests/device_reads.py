"""What would make the host wait for a GPU, counted on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = (
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.nonzero,
)


class Reads(TorchDispatchMode):
    """Counts values that are read from a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        self.count += func._overloadpacket in WAITS
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched() -> Iterator[Reads]:
    """Reads, also by tolist(), cpu() and numpy(), which the mode does not see."""
    with Reads() as reads, pytest.MonkeyPatch.context() as within:
        for name in ("tolist", "cpu", "numpy"):
            real = getattr(torch.Tensor, name)

            def counted(*given, real=real):
                reads.count += 1
                return real(*given)

            within.setattr(torch.Tensor, name, counted)
        yield reads
