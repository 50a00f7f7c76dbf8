"""A second device without a GPU. Its tensors have shapes and dtypes, but no contents.

Under FakeTensorMode torch keeps this device apart from the CPU, in forward and backward passes, in
autocast and in optimizers. So code that leaves a tensor on the CPU fails here as it does on a GPU,
and what is on the device can be told from what waits in the CPU's memory. Autocast and attention
work as on CUDA. Streams, pinned memory, the numbers in a tensor and the speed cannot be seen here.

torch calls such a device PrivateUse1 (torch/utils/backend_registration.py).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fake_gpu"  # the device's type
AUTOCAST, AUTOGRAD = "AutocastPrivateUse1", "AutogradPrivateUse1"

# What autocast does on CUDA, as far as CogVideoX needs it (aten/src/ATen/autocast_mode.h).
IN_16_BITS = (
    *("conv1d", "conv2d", "conv3d"),
    *("linear", "matmul", "mm", "mv", "addmm", "bmm", "baddbmm", "addbmm"),
    "scaled_dot_product_attention",
)
IN_FP32 = (
    *("layer_norm", "native_layer_norm", "group_norm", "rms_norm", "softmax.int"),
    *("log_softmax.int", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "norm.Scalar"),
    *("exp", "log", "rsqrt", "reciprocal", "cumsum", "prod", "sum", "sum.dim_IntList"),
    *("mse_loss", "l1_loss"),
)
IN_THE_WIDEST = ("cat", "stack", "addcmul", "addcdiv")

# A library's functions are taken back when it is collected.
libraries: list[torch.library.Library] = []
# Weights that autocast has cast, by the weight's id, until the outermost autocast ends.
cast_weights: dict[int, tuple[weakref.ref, Tensor]] = {}


class Module:
    """What torch looks for in torch.fake_gpu, as in torch.cuda."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    get_rng_state = staticmethod(lambda device=None: torch.empty(0, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda state, device=None: None)
    manual_seed_all = staticmethod(lambda seed: None)
    _is_in_bad_fork = staticmethod(lambda: False)


@functools.cache
def device() -> torch.device:
    """The second device, which is set up once in a process."""
    # autograd starts a thread for each device in the first backward pass, and a process with such
    # threads must not be forked. Here everything runs in one thread, so none is needed.
    torch.zeros(1, requires_grad=True).sum().backward()
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    libraries.extend([everything, aten])
    everything.fallback(torch.library.fallthrough_kernel, AUTOCAST)
    for names, dtype_of in ((IN_16_BITS, low), (IN_FP32, high), (IN_THE_WIDEST, widest)):
        for name in names:
            aten.impl(name, autocasting(operation(name), dtype_of), AUTOCAST)
    aten.impl("scaled_dot_product_attention", fused_attention, AUTOGRAD)
    torch.clear_autocast_cache = clearing(torch.clear_autocast_cache)
    return torch.device(NAME, 0)


# -- autocast ------------------------------------------------------------------------------------


def operation(name: str) -> Callable:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def low(tensors: list[Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype(NAME)


def high(tensors: list[Tensor]) -> torch.dtype:
    return torch.float32


def widest(tensors: list[Tensor]) -> torch.dtype:
    is_wide = any(tensor.dtype is torch.float32 for tensor in tensors)
    return torch.float32 if is_wide else torch.get_autocast_dtype(NAME)


def autocasting(run: Callable, dtype_of: Callable[[list[Tensor]], torch.dtype]) -> Callable:
    """The operation with its tensors in another dtype, as autocast calls it."""
    without_autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def call(*args, **kwargs):
        dtype = dtype_of([each for each in values_of(args) if is_cast(each)])
        with torch._C._ExcludeDispatchKeyGuard(without_autocast):
            args = [autocast_to(each, dtype) for each in args]
            return run(*args, **{key: autocast_to(each, dtype) for key, each in kwargs.items()})

    return call


def values_of(args: tuple) -> list:
    return [each for arg in args for each in (arg if isinstance(arg, list | tuple) else [arg])]


def is_cast(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == NAME
        and value.is_floating_point()
        and value.dtype is not torch.float64
    )


def autocast_to(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, list | tuple):
        return [autocast_to(each, dtype) for each in value]
    if not is_cast(value) or value.dtype is dtype:
        return value
    if not is_kept(value, dtype):
        return value.to(dtype)
    weight, cast = cast_weights.get(id(value), (lambda: None, None))
    if weight() is not value:
        cast = value.to(dtype)
        cast_weights[id(value)] = weakref.ref(value), cast
    return cast


def is_kept(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether autocast keeps the cast tensor: a trained fp32 weight in 16 bits."""
    return (
        torch.is_autocast_cache_enabled()
        and dtype is torch.get_autocast_dtype(NAME)
        and weight.dtype is torch.float32
        and weight.requires_grad
        and weight.is_leaf
        and not weight._is_view()
    )


def clearing(clear: Callable[[], None]) -> Callable[[], None]:
    def clear_both() -> None:
        cast_weights.clear()
        clear()

    return clear_both


# -- attention and modules -----------------------------------------------------------------------


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that CUDA chooses: flash attention in 16 bits without a mask, else efficient.

    With train.attention=math all scores are computed and kept, in fp32.
    """
    aten = torch.ops.aten
    if not torch.backends.cuda.flash_sdp_enabled():
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale
        )[0]
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


def apply_in_place(
    self: torch.nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
) -> torch.nn.Module:
    """nn.Module._apply for fake parameters: torch's own swaps them, which fake tensors refuse.

    A parameter that is in its place already stays as it is, with its hooks.
    """
    for child in self.children() if recurse else ():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        changed = function(parameter.detach())
        if changed.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
            moved = torch.nn.Parameter(changed, requires_grad=parameter.requires_grad)
            self._parameters[name] = moved
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self
