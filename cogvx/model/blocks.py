"""How the transformer's blocks are run: what is recomputed, where their frozen weights and inputs wait, and in which form.

Each block is a function of its inputs and weights, so its frozen weights can be kept small or elsewhere and made whole just for
the moment in which it runs, forward and again in the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from cogvx.options.memory import Memory, Recompute, Storage

ATTENTION = [
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
]

VARIANTS = 32  # of a compiled block: with and without gradients, with and without the LoRA, by length and batch; torch's default is 8


def arrange(
    transformer: torch.nn.Module,
    memory: Memory,
    *,
    recompute: bool,
    device: torch.device,
    compiled: bool = False,
) -> None:
    """Sets the transformer up as `memory` says and brings it to the device, as far as it is to stay there."""
    remember_positions(transformer.patch_embed)
    if memory.feed_forward_chunks > 1:
        for block in transformer.transformer_blocks:
            block.ff.forward = functools.partial(
                in_chunks, block.ff, block.ff.forward, memory.feed_forward_chunks
            )
    if memory.base_storage is not Storage.own or memory.stream_weights:
        transformer.keeper = Keeper(
            transformer.transformer_blocks,
            memory.base_storage,
            device,
            streamed=memory.stream_weights,
        )
    bring(transformer, device)
    if compiled:  # without the hooks of a Keeper, which are of no use in a graph; all blocks share what is compiled
        torch._dynamo.config.recompile_limit = VARIANTS
        for block in transformer.transformer_blocks:
            block.forward = torch.compile(block.forward)
    if recompute:
        transformer.enable_gradient_checkpointing(functools.partial(run_again, memory))


def remember_positions(patch_embed: torch.nn.Module) -> None:
    """diffusers computes the sine table anew in every forward pass at other sizes than the checkpoint's own."""
    patch_embed._get_positional_embeddings = functools.lru_cache(maxsize=8)(
        patch_embed._get_positional_embeddings
    )


# -- everything computed again -----------------------------------------------------------------------------------------


class RunAgain(torch.autograd.Function):
    """Gradient checkpointing: a block keeps its inputs, on the CPU if asked to, and its attention's results if they are not to be
    computed again, and runs once more in the backward pass.

    torch's own keeps, besides, the graph of the first run, and with it weights that a Keeper has made whole.
    """

    @staticmethod
    def forward(
        ctx,
        anchor: Tensor,
        memory: Memory,
        block,
        hidden_states,
        encoder_hidden_states,
        temb: Tensor,
        *others,
    ):
        ctx.device, inputs = hidden_states.device, (hidden_states, encoder_hidden_states)
        on_cpu = memory.offload_activations
        ctx.kept = [to_cpu(each, pinned=each.is_cuda) for each in inputs] if on_cpu else inputs
        ctx.block, ctx.temb, ctx.others = (
            block,
            temb,
            others,
        )  # these two are the same for all blocks
        # The backward pass runs outside of autocast, and has to compute as the forward pass did.
        kind = hidden_states.device.type
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }
        first, ctx.again = contextlib.nullcontext(), contextlib.nullcontext()
        if memory.recompute is Recompute.selective:
            first = KeepAttention([])
            ctx.again = GiveAttention(first.results)
        with torch.no_grad(), first:
            return block(hidden_states, encoder_hidden_states, temb, *others)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        inputs = [to_device(kept, ctx.device).detach().requires_grad_() for kept in ctx.kept]
        ctx.kept = None
        temb = ctx.temb.detach().requires_grad_(ctx.temb.requires_grad)
        with torch.enable_grad(), torch.autocast(**ctx.autocast), ctx.again:
            outputs = ctx.block(*inputs, temb, *ctx.others)
        torch.autograd.backward(outputs, gradients)
        return (
            None,
            None,
            None,
            *(tensor.grad for tensor in inputs),
            temb.grad,
            *(None for _ in ctx.others),
        )


class KeepAttention(TorchDispatchMode):
    """Keeps the results of attention, in the order in which it is called ..."""

    def __init__(self, results: list):
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in ATTENTION:
            self.results.append(
                tree_map(lambda part: part.detach() if isinstance(part, Tensor) else part, result)
            )
        return result


class GiveAttention(KeepAttention):
    """... and gives them instead of computing them again. (torch's selective checkpointing wants every operation to come again in
    the same number, and some come otherwise with gradients than without.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.results.pop(0) if func in ATTENTION else func(*args, **(kwargs or {}))


def run_again(memory: Memory, block, *inputs):
    anchor = torch.empty(
        0, device=inputs[0].device, requires_grad=True
    )  # the first block's inputs may need no gradient
    return RunAgain.apply(anchor, memory, block, *inputs)


# -- between the two memories (the planner follows these three) --------------------------------------------------------


def to_cpu(tensor: Tensor, *, pinned: bool) -> Tensor:
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return kept.copy_(tensor.detach(), non_blocking=pinned)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def bring(module: torch.nn.Module, device: torch.device) -> None:
    module.to(device)


# -- weights elsewhere, or smaller -------------------------------------------------------------------------------------

NF4_BLOCK = 64  # weights that share a scale, bitsandbytes' default


@dataclass(frozen=True)
class Kept:
    """A frozen weight as it waits, and what makes it whole again."""

    data: Tensor
    scale: Tensor | None  # int8: of each row; nf4: of each NF4_BLOCK weights
    code: Tensor | None  # nf4: its 16 levels
    storage: Storage
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def store(cls, weight: Tensor, storage: Storage) -> Kept:
        """Matrices in the form asked for; vectors (biases and norms, a thousandth of the weights) as they are."""
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

    def moved(self, move: Callable[[Tensor], Tensor]) -> Kept:
        parts = {name: getattr(self, name) for name in ("data", "scale", "code")}
        return replace(
            self, **{name: part if part is None else move(part) for name, part in parts.items()}
        )

    def whole(self) -> Tensor:
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


class Keeper:
    """The frozen weights of all blocks. Those of one block are whole while it runs; where they wait on the CPU, the next block's
    are on their way meanwhile, in the direction in which the blocks are being run."""

    def __init__(self, blocks, storage: Storage, device: torch.device, *, streamed: bool):
        self.device = device
        self.streamed = streamed
        self.copying = (
            torch.cuda.Stream(device) if self.streamed and device.type == "cuda" else None
        )
        self.places = [frozen_places(block) for block in blocks]
        self.kept: list[list[Kept]] = []
        self.coming: tuple[int, list[Kept]] | None = None  # a block's weights on their way
        self.last = -1
        for index, block in enumerate(blocks):
            self.kept.append(
                [self.put_away(owner, name, storage) for owner, name in self.places[index]]
            )
            block.register_forward_pre_hook(functools.partial(self.before, index))
            block.register_forward_hook(functools.partial(self.after, index), always_call=True)

    def put_away(self, owner: torch.nn.Module, name: str, storage: Storage) -> Kept:
        parameter = owner._parameters[name]
        kept = Kept.store(parameter, storage)
        if self.streamed:
            kept = kept.moved(functools.partial(to_cpu, pinned=self.device.type == "cuda"))
        else:
            kept = kept.moved(lambda tensor: to_device(tensor, self.device))
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.device)
        parameter.requires_grad_(False)
        return kept

    def move(self, move: Callable[[Tensor], Tensor]) -> None:
        for kept in self.kept:
            for place, weight in enumerate(kept):
                kept[place] = weight.moved(move)

    def before(self, index: int, block: torch.nn.Module, inputs: tuple) -> None:
        self.placeholders = [owner._parameters[name] for owner, name in self.places[index]]
        for (owner, name), kept in zip(self.places[index], self.arrived(index), strict=True):
            owner._parameters[name] = kept.whole()

    def after(self, index: int, block: torch.nn.Module, inputs: tuple, outputs: object) -> None:
        for (owner, name), placeholder in zip(self.places[index], self.placeholders, strict=True):
            owner._parameters[name] = placeholder

    def arrived(self, index: int) -> list[Kept]:
        """The block's weights on the device."""
        if not self.streamed:
            return self.kept[index]
        if self.coming is None or self.coming[0] != index:
            self.send(index)
        found = self.coming[1]
        if self.copying is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copying)
            for (
                kept
            ) in found:  # else their memory could be given away while this stream still reads it
                kept.moved(
                    lambda tensor: tensor.record_stream(torch.cuda.current_stream(self.device))
                )
        following = index + (1 if index > self.last else -1)
        self.last, self.coming = index, None
        if self.copying is not None and 0 <= following < len(self.kept):
            self.send(following)
        return found

    def send(self, index: int) -> None:
        with (
            torch.cuda.stream(self.copying)
            if self.copying is not None
            else contextlib.nullcontext()
        ):
            self.coming = (
                index,
                [
                    kept.moved(lambda tensor: to_device(tensor, self.device))
                    for kept in self.kept[index]
                ],
            )


def frozen_places(block: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    return [
        (owner, name)
        for owner in block.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and not parameter.requires_grad
    ]


# -- one after the other -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def set_aside(transformer: torch.nn.Module, device: torch.device):
    """While something else needs the device, frozen weights that a Keeper holds there wait on the CPU."""
    keeper = getattr(transformer, "keeper", None)
    if keeper is None or keeper.streamed:
        yield
        return
    keeper.move(functools.partial(to_cpu, pinned=False))
    try:
        yield
    finally:
        keeper.move(functools.partial(to_device, device=device))


@contextlib.contextmanager
def clip_by_clip(transformer: torch.nn.Module):
    """Without gradients: guidance's two halves, or any batch, go through the transformer one after the other. Exact."""
    forward = transformer.forward

    def each(
        hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, **same
    ) -> tuple[Tensor]:
        parts = zip(
            hidden_states.split(1), encoder_hidden_states.split(1), timestep.split(1), strict=True
        )
        answers = [
            forward(hidden_states=h, encoder_hidden_states=e, timestep=t, **same)[0]
            for h, e, t in parts
        ]
        return (torch.cat(answers),)

    transformer.forward = each
    try:
        yield
    finally:
        transformer.forward = forward


# -- the feed-forward in parts -----------------------------------------------------------------------------------------


def in_chunks(
    feed_forward: torch.nn.Module, forward: Callable, chunks: int, hidden_states: Tensor
) -> Tensor:
    """A feed-forward treats each token by itself, so parts of the tokens [B, S, D], one after the other, give the same. What is
    within is computed again in the backward pass: it is the largest part of a block's activations, four times its width."""
    if torch.is_grad_enabled():
        weights = [(owner, dict(owner._parameters)) for owner in feed_forward.modules()]
        run = functools.partial(with_weights, weights, forward)
        parts = [
            checkpoint(run, part, use_reentrant=False)
            for part in hidden_states.chunk(chunks, dim=1)
        ]
    else:
        parts = [forward(part) for part in hidden_states.chunk(chunks, dim=1)]
    return torch.cat(parts, dim=1)


def with_weights(
    weights: list[tuple[torch.nn.Module, dict]], forward: Callable, hidden_states: Tensor
) -> Tensor:
    """With the weights of the forward pass, which a Keeper may have put away when it is run again."""
    present = [(owner, dict(owner._parameters)) for owner, _ in weights]
    try:
        for owner, parameters in weights:
            owner._parameters.update(parameters)
        return forward(hidden_states)
    finally:
        for owner, parameters in present:
            owner._parameters.update(parameters)
