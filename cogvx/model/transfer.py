"""Copies between the CPU's memory and the device's, beside the computation where it is a GPU."""

from __future__ import annotations

import mmap
import sys
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

# Bytes. CUDA's allocator aligns tensors like this, and kernels are chosen by alignment.
ALIGNMENT = 512
REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


def to_cpu(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def bring(module: torch.nn.Module, device: torch.device) -> None:
    module.to(device)


# -- memory of the CPU ---------------------------------------------------------------------------


class PinnedMemory(mmap.mmap):
    """RAM that a GPU copies from and to by itself, in exactly the size that is needed.

    torch's own pinned memory is rounded up to a power of two and never given back
    (aten/src/ATen/core/CachingHostAllocator.h). This memory lives as long as a tensor that
    torch.frombuffer() made of it.
    """

    address = 0  # 0: not pinned

    def pin(self, device: torch.device) -> None:
        """MemoryError if CUDA cannot pin it."""
        address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        with torch.cuda.device(device):
            code = torch.cuda.cudart().cudaHostRegister(address, len(self), REGISTER_PORTABLE)
        if int(code) != 0:
            size = f"{len(self) / 2**30:.2f} GiB"
            raise MemoryError(f"cannot pin {size} of RAM for the GPU (cudaError {int(code)})")
        self.address, self.device = address, device

    def __del__(self):
        if self.address == 0 or sys.is_finalizing():
            return
        # torch does not know this memory, so nothing else waits for the copies that still use it.
        torch.cuda.synchronize(self.device)
        torch.cuda.cudart().cudaHostUnregister(self.address)


def host_memory(size: int, device: torch.device) -> Tensor:
    """`size` bytes of RAM, [size] uint8; pinned if the device is a GPU.

    MemoryError if they cannot be pinned.
    """
    if device.type != "cuda" or size == 0:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    # Shared with forked processes. A private page would be moved when a process is forked, and
    # the GPU would go on using the old one.
    memory = PinnedMemory(-1, size)
    memory.pin(device)
    return torch.frombuffer(memory, dtype=torch.uint8)


def aligned_size(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def packed_size(tensors: Iterable[Tensor]) -> int:
    """Bytes that these tensors need in one memory."""
    return sum(map(aligned_size, tensors))


def packed_views(memory: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """Tensors of the shapes and dtypes of `like`, one behind the other in `memory`."""
    views, start = [], 0
    for tensor in like:
        end = start + tensor.numel() * tensor.element_size()
        views.append(memory[start:end].view(tensor.dtype).view(tensor.shape))
        start += aligned_size(tensor)
    return views


def empty_host_cache() -> None:
    """Gives back the pinned memory that torch has cached and nothing uses."""
    if torch.cuda.is_initialized() and hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()


# -- copies --------------------------------------------------------------------------------------


class CopyStream:
    """Copies beside the computation, on a CUDA stream of their own.

    An event is a point in a stream's work. On other devices than a GPU each copy is done when
    copy() returns, and every event is None.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            # When nobody uses this stream any more, the memory of its last copies is free too.
            # Without this it could be used anew while such a copy still runs.
            weakref.finalize(self, torch.cuda.synchronize, device).atexit = False

    def mark(self) -> torch.cuda.Event | None:
        """The event that everything issued so far to the computing stream is done."""
        if self.stream is None:
            return None
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """What is issued to the computing stream from now on waits for the event.

        The CPU does not wait.
        """
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def copy(
        self, pairs: Iterable[tuple[Tensor, Tensor]], *, after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """Copies to the first of each pair from the second. Returns the event that this is done.

        after: the event that the first may be written and the second be read. Copies run in the
        order of the calls.
        """
        if self.stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self.stream.record_event()
