"""How the transformer's blocks run: what is recomputed, and where weights and inputs are stored.

A block is a function of its inputs and weights. So its frozen weights can be stored in fewer bytes
or on the CPU, and restored while it runs, in the forward and again in the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from cogvx.model import transfer
from cogvx.model.activations import InputStore
from cogvx.model.kept import storing
from cogvx.model.offload import Pass, WeightOffloader
from cogvx.model.unread import read_weights
from cogvx.options.memory import Memory, Recompute, Storage

# A compiled block has variants: with and without gradients, with and without the LoRA, by length
# and batch. torch's default limit is 8.
VARIANTS = 32


def arrange(
    transformer: torch.nn.Module,
    memory: Memory,
    *,
    recompute: bool,
    device: torch.device,
    compiled: bool = False,
) -> None:
    """Sets the transformer up as `memory` says, and moves to the device what belongs there.

    Weights that are still in their files are read.
    """
    cache_positions(transformer.patch_embed)
    blocks = transformer.transformer_blocks
    if memory.feed_forward_chunks > 1:
        for block in blocks:
            block.ff.forward = functools.partial(
                in_chunks, block.ff, block.ff.forward, memory.feed_forward_chunks
            )
    offloader = None
    if memory.base_storage is not Storage.own or memory.stream_weights:
        streamed = memory.stream_weights
        with storing(
            transformer, len(blocks), memory.base_storage, device, streamed=streamed
        ) as store:
            offloader = WeightOffloader(blocks, store, device, streamed=streamed)
        transformer.offloader = offloader
    read_weights(transformer, device)
    transfer.bring(transformer, device)
    if compiled:
        # block.forward is compiled, not block(): the offloader's hooks gain nothing in a graph.
        # All blocks share what is compiled.
        for block in blocks:
            block.forward = torch.compile(block.forward, **limit_of_variants())
    if recompute:
        store = InputStore(device) if memory.offload_activations else None
        selective = memory.recompute is Recompute.selective
        transformer.enable_gradient_checkpointing(Checkpointing(selective, store, offloader))


def limit_of_variants() -> dict[str, int]:
    """The argument of torch.compile() for it.

    torch 2.11 has none: there the setting holds for all threads. In torch 2.13 the setting holds
    for one thread only, and on a GPU the backward pass runs in another one.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": VARIANTS}
    torch._dynamo.config.recompile_limit = VARIANTS
    return {}


def cache_positions(patch_embed: torch.nn.Module) -> None:
    """At other sizes than the model's own, diffusers computes the sine table in every forward.

    With buckets the size changes from step to step. A table is computed much faster than a step,
    and one of 2B at 49 frames of 720x480 is 137 MB on the GPU: only two are kept.
    """
    patch_embed._get_positional_embeddings = functools.lru_cache(maxsize=2)(
        patch_embed._get_positional_embeddings
    )


# -- gradient checkpointing ----------------------------------------------------------------------

ATTENTION = [
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
]


# Without gradients these two leave out the logsumexp, unless this argument asks for it. Their
# backward passes need it. Flash attention always computes it.
COMPUTE_LOGSUMEXP = 4
WITHOUT_LOGSUMEXP = ATTENTION[1:3]


@dataclass(frozen=True)
class Checkpointing:
    """Runs a block as a CheckpointedBlock."""

    selective: bool  # the results of attention are saved
    store: InputStore | None  # where the inputs are saved; None: on the device
    offloader: WeightOffloader | None

    def __call__(self, block: torch.nn.Module, *inputs):
        # The inputs of the first block may need no gradient. The anchor always does.
        anchor = torch.empty(0, device=inputs[0].device, requires_grad=True)
        return CheckpointedBlock.apply(anchor, self, block, *inputs)

    def during(self, running: Pass) -> contextlib.AbstractContextManager[None]:
        if self.offloader is None:
            return contextlib.nullcontext()
        return self.offloader.during(running)


class CheckpointedBlock(torch.autograd.Function):
    """A block that saves its inputs and runs again in the backward pass.

    torch's own checkpointing also keeps the graph of the first run, and with it the weights that a
    WeightOffloader has restored.
    """

    @staticmethod
    def forward(
        ctx,
        anchor: Tensor,
        how: Checkpointing,
        block: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        *others,
    ):
        ctx.inputs = hidden_states, encoder_hidden_states
        if how.store is not None:
            ctx.inputs = how.store.save(ctx.inputs)
        # temb and the others are the same tensors for all blocks, so they cost nothing.
        ctx.how, ctx.block, ctx.temb, ctx.others = how, block, temb, others
        # The backward pass runs outside of autocast, and must compute as the forward pass did.
        kind = hidden_states.device.type
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }
        first, ctx.again = contextlib.nullcontext(), contextlib.nullcontext()
        if how.selective:
            first = SaveAttention([])
            ctx.again = ReuseAttention(first.results)
        with torch.no_grad(), first, how.during(Pass.forward_of_training):
            outputs = block(hidden_states, encoder_hidden_states, temb, *others)
        if how.store is not None:
            how.store.let_go(ctx.inputs)
        return outputs

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        inputs, ctx.inputs = ctx.inputs, None
        if ctx.how.store is not None:
            inputs = ctx.how.store.fetch(inputs)
        inputs = [each.detach().requires_grad_() for each in inputs]
        temb = ctx.temb.detach().requires_grad_(ctx.temb.requires_grad)
        again = ctx.how.during(Pass.backward)
        with torch.enable_grad(), torch.autocast(**ctx.autocast), ctx.again, again:
            outputs = ctx.block(*inputs, temb, *ctx.others)
        try:
            torch.autograd.backward(outputs, gradients)
        finally:
            if ctx.how.offloader is not None:
                ctx.how.offloader.finished(ctx.block)
        found = [tensor.grad for tensor in inputs]
        return None, None, None, *found, temb.grad, *(None for _ in ctx.others)


class SaveAttention(TorchDispatchMode):
    """Saves the results of attention and the kernel of each, in the order of the calls."""

    def __init__(self, results: list):
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WITHOUT_LOGSUMEXP:
            args = (*args[:COMPUTE_LOGSUMEXP], True, *args[COMPUTE_LOGSUMEXP + 1 :])
        result = func(*args, **(kwargs or {}))
        if func in ATTENTION:
            self.results.append((func, tree_map(detached, result)))
        return result


class ReuseAttention(SaveAttention):
    """Returns the saved results instead of computing them again.

    torch's selective checkpointing expects the same operations in both runs. Some operations
    differ with and without gradients. If torch chooses another kernel for attention than in the
    first run, its results are computed again.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in ATTENTION:
            kernel, result = self.results.pop(0)
            if kernel is func:
                return result
        return func(*args, **(kwargs or {}))


def detached(part: object) -> object:
    return part.detach() if isinstance(part, Tensor) else part


# -- less at a time ------------------------------------------------------------------------------


@contextlib.contextmanager
def clip_by_clip(transformer: torch.nn.Module) -> Iterator[None]:
    """Without gradients: the clips of a batch run one after the other. The result is the same.

    A guided video is a batch of two: with and without the prompt.
    """
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


def in_chunks(
    feed_forward: torch.nn.Module, forward: Callable, chunks: int, hidden_states: Tensor
) -> Tensor:
    """Runs a feed-forward on parts of the tokens [B, S, D], one after the other.

    It treats each token by itself, so the result is the same. Its activations, four times as wide
    as the tokens, are the largest of a block; they are recomputed in the backward pass.
    """
    parts = hidden_states.chunk(chunks, dim=1)
    if torch.is_grad_enabled():
        weights = [(owner, dict(owner._parameters)) for owner in feed_forward.modules()]
        run = functools.partial(with_weights, weights, forward)
        results = [checkpoint(run, part, use_reentrant=False) for part in parts]
    else:
        results = [forward(part) for part in parts]
    return torch.cat(results, dim=1)


def with_weights(
    weights: list[tuple[torch.nn.Module, dict]], forward: Callable, hidden_states: Tensor
) -> Tensor:
    """Runs with the weights of the forward pass. The offloader may have taken them away since.

    Streamed weights are still in their slot: it is free only after the block's backward pass.
    """
    present = [(owner, dict(owner._parameters)) for owner, _ in weights]
    try:
        for owner, parameters in weights:
            owner._parameters.update(parameters)
        return forward(hidden_states)
    finally:
        for owner, parameters in present:
            owner._parameters.update(parameters)
