"""Runs real code on tensors without contents, and logs what a GPU would allocate and compute.

The tensors are fake CPU tensors that stand for those of a GPU: fake CUDA tensors cannot run
backward without a driver. Where CUDA works differently, this is imitated: fused attention, the
operations that autocast runs in fp32, workspaces. Tensors that our own code puts into the CPU's
memory are logged separately. Only model/transfer.py puts them there.
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
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cogvx.model import transfer
from cogvx.plan.allocator import Event, Peak

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


@dataclass
class Work:
    """The sums over all operations of one kind in one phase."""

    flops: int = 0
    bytes: int = 0  # read and written
    count: int = 0


@dataclass
class TracedStorage:
    key: int
    size: int
    on_host: bool
    # What it holds, as named by call(). Else the phase and the operation that made it.
    what: str
    alive: weakref.ref | None = None


class Recorder(TorchDispatchMode):
    """Logs every allocation and release, and the work of every operation, by phase."""

    def __init__(self):
        super().__init__()
        self.events: list[Event] = []
        self.storages: dict[int, TracedStorage] = {}
        self.born = 0
        self.phase = ""
        self.work: dict[tuple[str, str, torch.dtype | None], Work] = defaultdict(Work)
        # Bytes by place. False: the device; True: the host; None: both together.
        self.now: dict[bool | None, int] = defaultdict(int)
        self.most: dict[bool | None, int] = defaultdict(int)
        # What was on the device at each phase's peak.
        self.at_peak: dict[str, list[TracedStorage]] = {}
        self.peak_of_phase: dict[str, int] = defaultdict(int)
        # Where new storages are. True: the host; False: the device; None: where their operands are.
        self.place: bool | None = None

    def begin(self, phase: str) -> None:
        self.phase = phase
        self.events.append(("phase", phase))
        self.note_peak()

    def empty_cache(self) -> None:
        self.events.append(("empty_cache",))

    def lap(self) -> None:
        """Nothing: tracing measures no time."""

    def born_now(self, tensor: Tensor, what: str, on_host: bool = False) -> None:
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name in self.storages:
            return
        self.born += 1
        about = TracedStorage(self.born, storage.nbytes(), on_host, what)
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

    @contextlib.contextmanager
    def putting(self, *, on_host: bool) -> Iterator[None]:
        before, self.place = self.place, on_host
        try:
            yield
        finally:
            self.place = before

    def is_on_host(self, tensor: Tensor) -> bool:
        about = self.storages.get(tensor.untyped_storage()._cdata)
        return about is not None and about.on_host

    def call(self, tensors: Iterator[Tensor], what: str) -> None:
        """Names what these tensors hold."""
        for tensor in tensors:
            self.born_now(tensor, what)
            self.storages[tensor.untyped_storage()._cdata].what = what

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        # .item(): any finite value will do.
        if packet is aten._local_scalar_dense:
            tensor = args[0]
            return 1.0 if tensor.is_floating_point() else tensor.dtype is torch.bool or 1
        if packet in (aten.equal, aten.is_nonzero):
            return True
        result = func(*args, **kwargs)
        if func.namespace == "prim":
            return result
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name, workspace = packet.__name__, workspace_of(packet, args)
        on_host = self.place
        if on_host is None:
            operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            on_host = bool(operands) and all(map(self.is_on_host, operands))
        for tensor in outputs:
            self.born_now(tensor, f"{self.phase}: {name}", on_host)
        if on_host:
            return result
        if workspace:
            self.born += 1
            about = TracedStorage(self.born, workspace, False, f"{self.phase}: workspace of {name}")
            self.count(about, workspace)
            self.count(about, -workspace)
        if packet not in MOVES_NOTHING:
            self.note_work(packet, name, args, kwargs, result, outputs)
        return result

    def note_work(self, packet, name: str, args, kwargs, result, outputs: list[Tensor]) -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)] + outputs
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

    def empty_cache(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def putting(self, *, on_host: bool):
        return contextlib.nullcontext()

    def call(self, tensors: Iterator[Tensor], what: str) -> None:
        """Nothing: CUDA's allocator does not tell what its memory holds."""


def workspace_of(packet, args) -> int:
    """Bytes that a CUDA kernel takes for itself.

    The backward pass of FlashAttention-2 sums dq in fp32, padded to 128 rows and 32 columns.
    """
    if packet is aten._scaled_dot_product_flash_attention_backward:
        batch, heads, tokens, width = args[1].shape
        rows, columns = math.ceil(tokens / 128) * 128, math.ceil(width / 32) * 32
        return 4 * batch * heads * rows * (columns + 1)
    return 0


# -- what CUDA does differently ----------------------------------------------------------------


def fused_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """The kernel that CUDA chooses, in 16 bits under autocast.

    Flash attention in 16 bits without a mask, else memory-efficient attention.
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (
            tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value)
        )
    if query.dtype in (torch.float16, torch.bfloat16) and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    for_backward = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (query, key, value)
    )
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, for_backward, dropout_p, is_causal, scale=scale
    )[0]


def in_fp32_under_autocast(function: Callable) -> Callable:
    """CUDA's autocast runs the norms in fp32; the CPU's does not."""

    def run(*args, **kwargs):
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            args = [
                a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
            ]
            return function(
                *args, **{n: v.float() if isinstance(v, Tensor) else v for n, v in kwargs.items()}
            )

    return run


def apply_in_place(
    self: torch.nn.Module, function: Callable, recurse: bool = True
) -> torch.nn.Module:
    """nn.Module._apply for fake parameters: torch's own swaps them, which fake tensors refuse."""
    for child in self.children() if recurse else ():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            changed = function(parameter.detach())
            if changed.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
                self._parameters[name] = torch.nn.Parameter(
                    changed, requires_grad=parameter.requires_grad
                )
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


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
def tracing(*, as_cuda: bool = True, fake: bool = True) -> Iterator[Recorder]:
    """Logs everything that runs inside.

    as_cuda=False: what the CPU does, to compare with real runs. fake=False: on real tensors.
    """
    recorder = Recorder()

    def to_cpu(tensor: Tensor) -> Tensor:
        with recorder.putting(on_host=True):
            return tensor.detach().clone()

    def host_memory(size: int, device: torch.device) -> Tensor:
        with recorder.putting(on_host=True):
            return torch.empty(size, dtype=torch.uint8)

    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        if not recorder.is_on_host(tensor):
            return tensor
        with recorder.putting(on_host=False):
            return tensor.clone()

    def bring(module: torch.nn.Module, device: torch.device) -> None:
        module._apply(lambda tensor: to_device(tensor, device))

    with contextlib.ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(patched(torch.nn.Module, _apply=apply_in_place))
            stack.enter_context(
                patched(torch.nn.init, **{name: lambda tensor, *a, **k: tensor for name in INITS})
            )
        places = {"to_cpu": to_cpu, "host_memory": host_memory}
        stack.enter_context(patched(transfer, to_device=to_device, bring=bring, **places))
        if as_cuda:
            norms = {
                name: in_fp32_under_autocast(getattr(F, name))
                for name in ("layer_norm", "group_norm")
            }
            stack.enter_context(patched(F, scaled_dot_product_attention=fused_attention, **norms))
        stack.enter_context(recorder)
        yield recorder


@contextlib.contextmanager
def metering(device: torch.device) -> Iterator[Meter]:
    """Everything inside really runs on this GPU. Weights are 0.01: no size depends on them."""
    with patched(
        torch.nn.init, **{name: lambda tensor, *a, **k: tensor.data.fill_(0.01) for name in INITS}
    ):
        yield Meter(device)
