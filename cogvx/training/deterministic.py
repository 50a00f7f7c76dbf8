"""train.deterministic=true: the same numbers again, also on a GPU.   [no torch at import]

A sum whose parts arrive in any order is rounded differently each time. Many kernels of a GPU add
like that. Here torch may only take kernels that do not.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from cogvx.errors import UserError

# cuBLAS reads it when CUDA starts. With one of these values it always adds in one order
# (docs.nvidia.com/cuda/cublas, "Results reproducibility").
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
# What torch says of an operation that has no such kernel.
NO_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")


@contextlib.contextmanager
def deterministic_kernels(*, compiled: bool) -> Iterator[None]:
    """Within this context torch raises a RuntimeError instead of adding in any order.

    It must begin before CUDA does. torch's own attention kernels know it: the backward passes of
    flash and efficient add in one order then, and torch leaves cudnn out. compiled: train.compile.
    """
    require_workspace()
    import torch
    from torch.backends import cudnn
    from torch.utils import deterministic

    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    # It would write NaN into all new memory. That only shows errors of programs that read memory
    # before they write it, and costs time in every operation.
    deterministic.fill_uninitialized_memory = False
    try:
        with choosing_without_a_clock() if compiled else contextlib.nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
        deterministic.fill_uninitialized_memory = filled


def require_workspace() -> None:
    """Sets it for this process and those that it starts. UserError for another value."""
    given = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if given not in WORKSPACES:
        raise UserError(
            f"{WORKSPACE}={given} is set here, and train.deterministic=true needs "
            f"{' or '.join(WORKSPACES)}: unset {WORKSPACE}"
        )


@contextlib.contextmanager
def choosing_without_a_clock() -> Iterator[None]:
    """torch's compiler takes the fastest of several kernels: maybe another one next time."""
    from torch._inductor import config

    if not hasattr(config, "deterministic"):
        yield
        return
    with config.patch(deterministic=True):
        yield


def without_kernel(error: BaseException) -> str | None:
    """What to say if this error means that an operation has no deterministic kernel, else None."""
    found = NO_KERNEL.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    return (
        f"train.deterministic=true: torch has no deterministic kernel for {found[1]} on this "
        f"device. What is saved is kept. Without it: train.deterministic=false"
    )
