"""Which kernel computes attention, in training, held-out losses and videos.

B batch, H heads, S tokens, the prompt's among them, D size of a head.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend

from cogvx.errors import UserError, first_line
from cogvx.options.cards import generation_of
from cogvx.options.train import Attention

BACKENDS = {
    Attention.flash: SDPBackend.FLASH_ATTENTION,
    Attention.efficient: SDPBackend.EFFICIENT_ATTENTION,
    Attention.cudnn: SDPBackend.CUDNN_ATTENTION,
    Attention.math: SDPBackend.MATH,
    # These two are other kernels behind torch's flash attention: the operations of torch.ops.aten,
    # forward and backward, keep their names, arguments and results.
    Attention.fa3: SDPBackend.FLASH_ATTENTION,
    Attention.fa4: SDPBackend.FLASH_ATTENTION,
}
KINDS = {
    SDPBackend.FLASH_ATTENTION: Attention.flash,
    SDPBackend.EFFICIENT_ATTENTION: Attention.efficient,
    SDPBackend.CUDNN_ATTENTION: Attention.cudnn,
    SDPBackend.MATH: Attention.math,
}


@dataclass(frozen=True)
class Package:
    """Brings a kernel that torch can use for flash attention."""

    implementation: str  # its name in torch
    module: str
    install: str
    majors: tuple[int, ...]  # of the compute capability, as torch checks them


PACKAGES = {
    Attention.fa3: Package(
        "FA3",
        "flash_attn_interface",
        "pip install --no-deps flash-attn-3 (from PyTorch's own package index for your CUDA)",
        (9,),
    ),
    Attention.fa4: Package("FA4", "flash_attn.cute", "pip install --pre flash-attn-4", (9, 10)),
}
TORCH_NEEDS = ("activate_flash_attention_impl", "restore_flash_attention_impl")
ELSE = (
    f"train.attention=auto takes the fastest that works, "
    f"or try another of {', '.join(kind.name for kind in Attention)}"
)


# -- using a kernel ------------------------------------------------------------------------------


@contextlib.contextmanager
def using(wanted: Attention, *, others: bool = False) -> Iterator[None]:
    """Within this context only this kernel is used; `auto`: torch's own choice, as it is.

    others: where this kernel cannot run, torch takes another one.
    """
    if wanted is Attention.auto:
        yield
        return
    backends = [BACKENDS[wanted]]
    if others:
        backends += [backend for backend in KINDS if backend not in backends]
    with (
        torch_attention.sdpa_kernel(backends, set_priority=others),
        implementation(PACKAGES.get(wanted)),
    ):
        yield


@contextlib.contextmanager
def implementation(package: Package | None) -> Iterator[None]:
    """Within this context torch's flash attention is the package's. None: nothing changes."""
    if package is None:
        yield
        return
    before = torch_attention.current_flash_attention_impl()
    with warnings.catch_warnings():
        # torch warns that its own kernel is replaced.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        torch_attention.activate_flash_attention_impl(package.implementation)
    try:
        yield
    finally:
        torch_attention.restore_flash_attention_impl()
        if before is not None:
            torch_attention.activate_flash_attention_impl(before)


def in_use(
    heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, *, trained: bool = True
) -> Attention:
    """The kernel that torch takes for such a transformer. UserError if none is allowed."""
    tokens = torch.empty(1, heads, 128, head_dim, device=device, dtype=dtype, requires_grad=trained)
    try:
        kind = KINDS[SDPBackend(torch._fused_sdp_choice(tokens, tokens, tokens))]
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"train.attention: no such kernel on {device} for heads of {head_dim} in {dtype}; "
            f"{ELSE}"
        ) from error
    return from_package() or kind if kind is Attention.flash else kind


def from_package() -> Attention | None:
    """The kernel that stands behind torch's flash attention now; None: torch's own."""
    current = getattr(torch_attention, "current_flash_attention_impl", lambda: None)()
    named = {package.implementation: kernel for kernel, package in PACKAGES.items()}
    return named.get(current)


def require(wanted: Attention, device: torch.device) -> None:
    """UserError if a package's kernel is wanted and cannot be used here."""
    reason = unusable(wanted, device)
    if reason is not None:
        raise UserError(f"train.attention={wanted.name}: {reason}. Otherwise {ELSE}")


def unusable(kernel: Attention, device: torch.device) -> str | None:
    """Why a package's kernel cannot be used here, and what helps; None if it can."""
    reason = missing_for(kernel, device)
    if reason is not None:
        return reason
    try:
        with implementation(PACKAGES.get(kernel)):
            return None
    # Whatever the package raises when it is imported.
    except Exception as error:
        install = PACKAGES[kernel].install
        return f"its package cannot be loaded ({first_line(error)}). Install it anew: {install}"


def missing_for(kernel: Attention, device: torch.device) -> str | None:
    """What a package's kernel lacks here, and what helps; None if nothing is missing."""
    package = PACKAGES.get(kernel)
    if package is None:
        return None
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in package.majors:
        fitting = " or ".join(generation_of(each).name for each in package.majors)
        return (
            f"it needs a GPU of the generation {fitting}, and this is "
            f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        )
    if not all(hasattr(torch_attention, name) for name in TORCH_NEEDS):
        return (
            f"torch {torch.__version__} cannot use other implementations of flash attention: "
            f"pip install --upgrade torch"
        )
    if package.implementation not in torch_attention.list_flash_attention_impls():
        return f"torch {torch.__version__} does not know it: pip install --upgrade torch"
    if not is_installed(package.module):
        return f"its package is not installed: {package.install}"
    return None


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


# -- the fastest of several ----------------------------------------------------------------------

# Calls before the clock starts: a package compiles its kernel in the first one.
WARM_UP = 2
TIMED = 3
# Results of two kernels differ by rounding: by less than 1 % of their norm in bf16.
MOST_DIFFERENCE = 0.05


@dataclass(frozen=True)
class KernelChoice:
    """A kernel, and why it was chosen."""

    kernel: Attention
    # Of the kernels that were measured: a forward and a backward pass.
    milliseconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # a kernel's name -> the reason


def choose(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> KernelChoice:
    """The fastest kernel for training on tensors of this shape, [B, H, S, D].

    `auto`, torch's own choice, if this is no GPU whose kernels are known, or if none of them works.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return KernelChoice(Attention.auto)
    generation = generation_of(torch.cuda.get_device_capability(device)[0])
    known = [] if generation is None else generation.attention
    left_out = {kernel.name: reason for kernel in known if (reason := missing_for(kernel, device))}
    # efficient attention is slower than all others.
    candidates = [k for k in known if k.name not in left_out and k is not Attention.efficient]
    if len(candidates) < 2:
        return KernelChoice(*candidates or [Attention.auto], left_out=left_out)
    times, failed = measure_all(candidates, shape, device, dtype)
    torch.cuda.empty_cache()
    fastest = min(times, key=times.get) if times else Attention.auto
    named = {kernel.name: round(time, 2) for kernel, time in times.items()}
    return KernelChoice(fastest, named, left_out | failed)


def measure_all(
    candidates: list[Attention], shape: tuple, device: torch.device, dtype: torch.dtype
) -> tuple[dict[Attention, float], dict[str, str]]:
    """Milliseconds by kernel; and for each kernel that fails, its name and the reason.

    A kernel also fails whose results are not finite, or not those of the first one.
    """
    run = functools.partial(forward_and_backward, *inputs_like(shape, device, dtype))
    times, failed, expected = {}, {}, None
    for kernel in candidates:
        try:
            with using(kernel):
                results = run()
                difference = most_different(results, expected or results)
                # NaN is below nothing.
                if not difference < MOST_DIFFERENCE:
                    failed[kernel.name] = (
                        f"its results differ from other kernels': {difference:.0%}"
                    )
                    continue
                times[kernel] = milliseconds(run)
            expected = expected or results
        # Out of memory, a package of another version, a shape without a kernel.
        except Exception as error:
            failed[kernel.name] = first_line(error)
    return times, failed


def inputs_like(shape: tuple, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the output's gradient, laid out in memory as a block has them."""
    random = torch.Generator(device).manual_seed(0)
    batch, heads, tokens, size = shape
    by_head, by_token = shape, (batch, tokens, heads, size)
    query, key, value, gradient = (
        torch.randn(each, generator=random, device=device, dtype=dtype)
        for each in (by_head, by_head, by_token, by_token)
    )
    return [query, key, value.transpose(1, 2), gradient.transpose(1, 2)]


def forward_and_backward(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor
) -> list[Tensor]:
    """The output and the gradients of the three inputs, each [B, H, S, D]."""
    given = [each.detach().requires_grad_() for each in (query, key, value)]
    output = F.scaled_dot_product_attention(*given)
    output.backward(gradient)
    return [output.detach(), *(each.grad for each in given)]


def most_different(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference, in norm. NaN if one is not finite."""
    differences = [
        torch.linalg.vector_norm(a - b, dtype=torch.float32)
        / torch.linalg.vector_norm(b, dtype=torch.float32)
        for a, b in zip(found, expected, strict=True)
    ]
    return float(torch.stack(differences).max())


def milliseconds(run: Callable[[], object]) -> float:
    """The time of one call on the GPU."""
    for _ in range(WARM_UP):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(TIMED):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / TIMED
