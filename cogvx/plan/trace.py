"""Runs real code on tensors without contents, and logs what a GPU would allocate and compute.

The tensors are on the CPU or on the device of plan/second_device.py, and are logged apart.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cogvx.model import transfer
from cogvx.plan import second_device
from cogvx.plan.allocator import Event, Peak
from cogvx.plan.found import Moved, Work

aten = torch.ops.aten
# Operations that read and write no memory.
MOVES_NOTHING = {
    aten._local_scalar_dense,
    aten._reshape_alias,
    aten._unsafe_view,
    aten.alias,
    aten.as_strided,
    aten.chunk,
    aten.detach,
    aten.diagonal,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.expand,
    aten.lift_fresh,
    aten.movedim,
    aten.narrow,
    aten.new_empty,
    aten.permute,
    aten.select,
    aten.slice,
    aten.split,
    aten.split_with_sizes,
    aten.squeeze,
    aten.t,
    aten.transpose,
    aten.unbind,
    aten.unfold,
    aten.unsqueeze,
    aten.view,
}


# Operations that copy from one place to another.
COPIES = {aten._to_copy, aten.clone, aten.copy_}


@dataclass
class TracedStorage:
    key: int
    size: int
    on_host: bool
    # What it holds, as named by call(). Else the phase and the operation that made it.
    what: str
    dtype: torch.dtype | None = None  # of its first tensor
    alive: weakref.ref | None = None


class Recorder(TorchDispatchMode):
    """Logs every allocation and release, and the work of every operation, by phase."""

    def __init__(self, host: str | None = "cpu"):
        """host: the type of the device that counts as the host. None: all tensors count alike."""
        super().__init__()
        self.host = host
        self.events: list[Event] = []
        self.storages: dict[int, TracedStorage] = {}
        self.born = 0
        self.phase = ""
        self.work: dict[tuple[str, str, torch.dtype | None], Work] = defaultdict(Work)
        self.moved: dict[str, Moved] = defaultdict(Moved)
        self.beside = False  # whether copies run beside the computation
        # Bytes by place. False: the device; True: the host; None: both together.
        self.now: dict[bool | None, int] = defaultdict(int)
        self.most: dict[bool | None, int] = defaultdict(int)
        # What was on the device at each phase's peak.
        self.at_peak: dict[str, list[TracedStorage]] = {}
        self.peak_of_phase: dict[str, int] = defaultdict(int)

    def begin(self, phase: str) -> None:
        self.phase = phase
        self.events.append(("phase", phase))
        self.note_peak()

    def empty_cache(self) -> None:
        self.events.append(("empty_cache",))

    def lap(self) -> None:
        """Nothing: tracing measures no time."""

    def repeat(self, phase: str, times: float) -> None:
        """The phase's work is done so many times. Only a part of it was traced."""
        for (name, _, _), work in self.work.items():
            if name == phase:
                work.flops = round(work.flops * times)
                work.bytes = round(work.bytes * times)
                work.count = round(work.count * times)

    def born_now(self, tensor: Tensor, what: str) -> None:
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name in self.storages:
            return
        self.born += 1
        about = TracedStorage(
            self.born, storage.nbytes(), self.is_on_host(tensor), what, tensor.dtype
        )
        about.alive = weakref.ref(storage, lambda _: self.died(name))
        self.storages[name] = about
        self.count(about, about.size)

    def died(self, name: int) -> None:
        about = self.storages.pop(name)
        self.count(about, -about.size)

    def count(self, about: TracedStorage, size: int) -> None:
        for place in (about.on_host, None):
            self.now[place] += size
            self.most[place] = max(self.most[place], self.now[place])
        if not about.on_host:
            self.events.append(
                ("allocate", about.key, about.size) if size > 0 else ("free", about.key)
            )
            if size > 0:
                self.note_peak()

    def note_peak(self) -> None:
        """Lists what is on the device, if this is a new peak.

        Only if it is 1 % above the last one: a list for every allocation would take too long.
        """
        if self.now[False] > 1.01 * self.peak_of_phase[self.phase]:
            self.peak_of_phase[self.phase] = self.now[False]
            self.at_peak[self.phase] = [
                about for about in self.storages.values() if not about.on_host
            ]

    def is_on_host(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.host

    def call(self, tensors: Iterator[Tensor], what: str) -> None:
        """Names what these tensors hold."""
        for tensor in tensors:
            self.born_now(tensor, what)
            self.storages[tensor.untyped_storage()._cdata].what = what

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here. torch's wrapper would cost a tenth of the time.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Half of the calls only ask where a tensor is.
        if func is torch.ops.prim.device.default:
            return args[0].device
        kwargs = kwargs or {}
        packet = func._overloadpacket
        # .item(): any finite value will do.
        if packet is aten._local_scalar_dense:
            tensor = args[0]
            return 1.0 if tensor.is_floating_point() else tensor.dtype is torch.bool or 1
        if packet in (aten.equal, aten.is_nonzero):
            return True
        if packet is aten._to_copy:
            # A fake tensor made from numbers still has them. They would be moved for real.
            args[0].constant = None
        result = func(*args, **kwargs)
        if func.namespace == "prim":
            return result
        outputs = tensors_in(result)
        name, workspace = packet.__name__, workspace_of(packet, args)
        for tensor in outputs:
            self.born_now(tensor, f"{self.phase}: {name}")
        if packet not in MOVES_NOTHING:
            self.note_moves(func, args, outputs)
        if all(map(self.is_on_host, outputs or tensors_in((args, kwargs)))):
            return result
        if workspace:
            self.born += 1
            about = TracedStorage(self.born, workspace, False, f"{self.phase}: workspace of {name}")
            self.count(about, workspace)
            self.count(about, -workspace)
        if packet not in MOVES_NOTHING:
            self.note_work(packet, name, args, kwargs, result, outputs)
        return result

    def note_moves(self, func, args, outputs: list[Tensor]) -> None:
        places = {self.is_on_host(tensor) for tensor in tensors_in(args) + outputs}
        moved = self.moved[self.phase]
        if places == {True}:
            moved.within_host += bytes_touched(func, args, outputs)
        elif len(places) == 2 and func._overloadpacket in COPIES:
            size = outputs[0].numel() * outputs[0].element_size()
            if not self.beside:
                moved.waited_for += size
            elif self.is_on_host(outputs[0]):
                moved.to_host += size
            else:
                moved.to_device += size

    @contextlib.contextmanager
    def copying_beside(self) -> Iterator[None]:
        self.beside = True
        try:
            yield
        finally:
            self.beside = False

    def note_work(self, packet, name: str, args, kwargs, result, outputs: list[Tensor]) -> None:
        tensors = tensors_in(args) + outputs
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
        work = self.work[self.phase, name, dtype]
        work.count += 1
        work.bytes += sum(
            min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors
        )
        if packet in flop_registry:
            work.flops += flop_registry[packet](*args, **kwargs, out_val=result)


class Meter:
    """Takes the place of a Recorder when everything really runs on a GPU.

    It asks CUDA's own allocator for the peak of each phase.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.phase = ""
        self.peaks: dict[str, Peak] = {}
        self.laps: list[float] = []  # seconds per step

    def begin(self, phase: str) -> None:
        torch.cuda.synchronize(self.device)
        if self.phase:
            allocated, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
            self.peaks[self.phase] = Peak(allocated(self.device), reserved(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)
        self.phase, self.clock = phase, time.monotonic()

    def lap(self) -> None:
        torch.cuda.synchronize(self.device)
        self.laps.append(time.monotonic() - self.clock)
        self.clock = time.monotonic()

    def repeat(self, phase: str, times: float) -> None:
        """Nothing: the work is not counted."""

    def empty_cache(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def call(self, tensors: Iterator[Tensor], what: str) -> None:
        """Nothing: CUDA's allocator does not tell what its memory holds."""


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_touched(func, args, outputs: list[Tensor]) -> int:
    """Read and written. What returns nothing writes into its arguments, as an optimizer does."""
    tensors = tensors_in(args) + outputs
    if not outputs:
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensors += tensors_in(given)
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def workspace_of(packet, args) -> int:
    """Bytes that a CUDA kernel takes for itself.

    The backward pass of FlashAttention-2 sums dq in fp32, padded to 128 rows and 32 columns.
    """
    if packet is aten._scaled_dot_product_flash_attention_backward:
        batch, heads, tokens, width = args[1].shape
        rows, columns = math.ceil(tokens / 128) * 128, math.ceil(width / 32) * 32
        return 4 * batch * heads * rows * (columns + 1)
    return 0


@contextlib.contextmanager
def patched(owner: object, **replacements: object) -> Iterator[None]:
    originals = {name: getattr(owner, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


INITS = [
    "constant_",
    "kaiming_uniform_",
    "normal_",
    "ones_",
    "trunc_normal_",
    "uniform_",
    "xavier_uniform_",
    "zeros_",
]


@contextlib.contextmanager
def tracing(*, fake: bool = True, host: str | None = "cpu") -> Iterator[Recorder]:
    """Logs everything that runs inside. fake=False: on real tensors. host: as for Recorder."""
    recorder = Recorder(host)
    copy_beside = transfer.CopyStream.copy

    def copy(stream: transfer.CopyStream, pairs, *, after):
        with recorder.copying_beside():
            return copy_beside(stream, pairs, after=after)

    with contextlib.ExitStack() as stack:
        # torch starts its threads for devices once, perhaps before there was this device.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(patched(torch.nn.Module, _apply=second_device.apply_in_place))
            stack.enter_context(
                patched(torch.nn.init, **{name: lambda tensor, *a, **k: tensor for name in INITS})
            )
        stack.enter_context(patched(transfer.CopyStream, copy=copy))
        stack.enter_context(recorder)
        yield recorder


@contextlib.contextmanager
def metering(device: torch.device) -> Iterator[Meter]:
    """Everything inside really runs on this GPU. Weights are 0.01: no size depends on them."""
    with initialized_by(lambda tensor, *others, **more: tensor.data.fill_(0.01)):
        yield Meter(device)


@contextlib.contextmanager
def initialized_by(fill: Callable[..., Tensor]) -> Iterator[None]:
    """fill() takes the place of torch's functions for new weights.

    Random numbers for the 4.8 billion weights of T5 would take more than a minute.
    """
    from transformers import initialization

    # transformers keeps the original functions in a dict.
    fills, theirs = dict.fromkeys(INITS, fill), initialization.TORCH_INIT_FUNCTIONS
    before = dict(theirs)
    theirs.update(fills)
    try:
        with patched(torch.nn.init, **fills):
            yield
    finally:
        theirs.update(before)
