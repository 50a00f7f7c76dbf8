"""Entries for single parts: attention, stored forms of weights, the text encoder, the VAE."""

from __future__ import annotations

import dataclasses
import functools
import gc
import re
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from battery import Here, told
from entries import GIB
from real_size import configuration, fill

from cogvx.compose import compose_config
from cogvx.data.encode import Encoder, latent_moments
from cogvx.errors import UserError
from cogvx.model import attention as attention_kernels
from cogvx.model import blocks
from cogvx.model.nano import NANO
from cogvx.model.released import TRANSFORMER_5B
from cogvx.options.memory import Recompute, Storage
from cogvx.options.train import Attention
from cogvx.plan.phases import PlannedModel, configs_of
from cogvx.plan.trace import initialized_by

# 13 latent frames of 30 x 45 patches, and 226 text tokens.
TOKENS, HEADS, WIDTH = 17776, 48, 64
# How far a kernel may be from math, both in bf16, relative to the norm.
KERNEL_BOUND = 0.02
# docs/my_card.md
STORAGE_BOUNDS = {"own": 0.0, "fp8": 0.03, "int8": 0.01, "nf4": 0.10}
REPEATED = 5
# What torch and cogvx say of a kernel that is not here. Any other error is one to mend.
LACKING = ["No viable backend", "No available kernel", "no such kernel", "not installed", "needs"]


def seconds_of(here: Here, run) -> float:
    """The median of a few runs, after two that are not timed."""
    found = []
    for number in range(2 + REPEATED):
        wait(here)
        began = time.monotonic()
        run()
        wait(here)
        if number >= 2:
            found.append(time.monotonic() - began)
    return statistics.median(found)


def wait(here: Here) -> None:
    if here.device == "cuda":
        torch.cuda.synchronize()


def random(here: Here, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(here.device, dtype)


# -- attention -------------------------------------------------------------------------------------


def attention(here: Here) -> None:
    """A kernel that this card or torch lacks costs a line."""
    for kind in Attention:
        if kind is Attention.auto:
            continue
        try:
            one_kernel(here, kind)
        except Exception as error:
            lacking = re.search("|".join(LACKING), str(error)) or isinstance(error, ImportError)
            status = "skipped" if lacking else "failed"
            here.line(f"{kind.name}", status=status, note=told(error))
    torch_takes = attention_kernels.in_use(HEADS, WIDTH, torch.device(here.device), torch.bfloat16)
    here.line("torch takes", torch_takes.name)
    if not here.small:
        fastest(here)


def fastest(here: Here) -> None:
    """What train.attention=auto takes at this size, and the time of each kernel."""
    shape, device = (1, HEADS, TOKENS, WIDTH), torch.device(here.device)
    choice = attention_kernels.choose(shape, device, torch.bfloat16)
    here.line("auto takes", choice.kernel.name)
    for name, milliseconds in choice.milliseconds.items():
        here.line(f"auto: {name}, forward and backward", milliseconds, "ms")
    for name, reason in choice.left_out.items():
        here.line(f"auto: {name}", status="skipped", note=reason)


def one_kernel(here: Here, kind: Attention) -> None:
    name = kind.name
    with attention_kernels.using(kind):
        found = attended(here, 256)
    with attention_kernels.using(Attention.math):
        expected = attended(here, 256)
    for what, ours, right in zip(("output", "gradient"), found, expected, strict=True):
        difference = float((ours - right).norm() / right.norm())
        here.line(f"{name}: {what} beside math", difference, "relative", most=KERNEL_BOUND)
    with attention_kernels.using(kind):
        difference = recomputed_difference(here)
        here.line(f"{name}: selective beside full recompute", difference, "relative", most=0.02)
        # math would need 30 GiB for the scores alone.
        if kind is not Attention.math:
            time_kernel(here, name)


def attended(here: Here, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the gradient of the query, fp32."""
    q, k, v = (random(here, 1, 4, tokens, WIDTH) * scale for scale in (1, 1.1, 1.2))
    q = q.detach().requires_grad_()
    output = F.scaled_dot_product_attention(q, k, v)
    output.float().square().sum().backward()
    return output.detach().float(), q.grad.float()


def time_kernel(here: Here, name: str) -> None:
    tokens, heads = (512, 2) if here.small else (TOKENS, HEADS)
    q, k, v = (random(here, 1, heads, tokens, WIDTH).requires_grad_() for _ in range(3))
    flops = 4 * heads * tokens**2 * WIDTH

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    output = forward()
    gradient = torch.ones_like(output)

    def backward() -> None:
        torch.autograd.grad(output, (q, k, v), gradient, retain_graph=True)

    for what, run, work in (("forward", forward, flops), ("backward", backward, 2.5 * flops)):
        seconds = seconds_of(here, run)
        note = f"{work / seconds / 1e12:.0f} TFLOP/s; {heads} heads, {tokens} tokens"
        here.line(f"{name}: {what}", round(1000 * seconds, 3), "ms", note=note)


def recomputed_difference(here: Here) -> float:
    """The largest difference of a gradient between recompute=selective and full, relative."""
    full, selective = (gradients(here, recompute) for recompute in Recompute)
    pairs = zip(full, selective, strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def gradients(here: Here, recompute: Recompute) -> list[torch.Tensor]:
    memory = compose_config(["memory=balanced"]).memory
    memory = dataclasses.replace(memory, recompute=recompute)
    transformer = small_transformer(here, memory)
    geometry = NANO.transformer
    latents = random(here, 1, 3, geometry["in_channels"], 16, 16, dtype=torch.float32)
    text = random(here, 1, geometry["max_text_seq_length"], geometry["text_embed_dim"])
    with torch.autocast(here.device, torch.bfloat16):
        output = transformer(
            hidden_states=latents,
            encoder_hidden_states=text.float(),
            timestep=torch.tensor([500], device=here.device),
            return_dict=False,
        )[0]
    output.float().square().mean().backward()
    return [weight.grad.float() for weight in transformer.transformer_blocks.parameters()]


def small_transformer(here: Here, memory) -> torch.nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(**NANO.transformer)
    device = torch.device(here.device)
    blocks.arrange(transformer.train(), memory, recompute=True, device=device)
    return transformer


# -- stored forms of weights -----------------------------------------------------------------------


def storage(here: Here) -> None:
    """Two layers of 5b: how long it takes to store them, and what it changes."""
    layers = 1 if here.small else 2
    expected = None
    for form in Storage:
        try:
            output, seconds, taken = stored_output(here, form, layers)
        except UserError as error:
            if "not installed" not in str(error):
                raise
            here.line(form.name, status="skipped", note=str(error).splitlines()[-1].strip(" -"))
            continue
        expected = output if expected is None else expected
        difference = float((output - expected).norm() / expected.norm())
        bound = STORAGE_BOUNDS.get(form.name)
        here.line(f"{form.name}: output beside own", difference, "relative", most=bound)
        whole = seconds / layers * TRANSFORMER_5B["num_layers"]
        note = f"{layers} layers took {seconds:.2f} s, {taken:.2f} GiB on the card"
        if form is not Storage.own:
            here.line(f"{form.name}: to store all of 5b", round(whole, 2), "s", note=note)


def stored_output(here: Here, form: Storage, layers: int) -> tuple[torch.Tensor, float, float]:
    """The output of a forward pass; seconds and GiB that storing and moving the weights takes."""
    from diffusers import CogVideoXTransformer3DModel

    shape = NANO.transformer if here.small else TRANSFORMER_5B
    with initialized_by(fill):
        transformer = CogVideoXTransformer3DModel(**shape | {"num_layers": layers})
    transformer = transformer.to(torch.bfloat16).eval().requires_grad_(False)
    memory = compose_config(["memory=balanced", f"memory.base_storage={form.name}"]).memory
    memory = dataclasses.replace(memory, gradient_checkpointing=False)
    before, device = on_card(here), torch.device(here.device)
    wait(here)
    began = time.monotonic()
    blocks.arrange(transformer, memory, recompute=False, device=device)
    wait(here)
    seconds, taken = time.monotonic() - began, on_card(here) - before
    hidden = random(
        here, 1, 64, transformer.config.num_attention_heads * shape["attention_head_dim"]
    )
    text, temb = hidden[:, :16], random(here, 1, shape["time_embed_dim"])
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            hidden, text = block(hidden, text, temb, None)
    return torch.cat([hidden, text], dim=1).float(), seconds, taken


def on_card(here: Here) -> float:
    return torch.cuda.memory_allocated() / GIB if here.device == "cuda" else 0.0


# -- encoders --------------------------------------------------------------------------------------


def planned_model(here: Here, model: str, memory: str) -> PlannedModel:
    config = configuration(here, model, memory)
    configs = configs_of(config)
    return PlannedModel(Path(), torch.device(here.device), torch.bfloat16, configs)


def text_encoder(here: Here) -> None:
    pretrained = planned_model(here, "5b", "low")
    answers = [encoded_prompts(here, pretrained, streamed=streamed) for streamed in (False, True)]
    difference = float((answers[1] - answers[0]).norm() / answers[0].norm())
    here.line("streamed beside on the card", difference, "relative", most=1e-3)


@torch.no_grad()
def encoded_prompts(here: Here, pretrained: PlannedModel, *, streamed: bool) -> torch.Tensor:
    where, tokens = "streamed" if streamed else "on the card", pretrained.geometry().text_tokens
    with initialized_by(fill):
        _, encoder = pretrained.text_encoder(streamed=streamed)
    reset_peak(here)
    ids = torch.arange(2, 2 + tokens, device=here.device)[None] % 250
    answer = encoder(ids)[0].float()
    for count in (1, 8):
        seconds = seconds_of(here, functools.partial(encoder, ids.expand(count, -1)))
        note = f"{count / seconds:.1f} prompts/s"
        here.line(f"{where}, {count} prompts", round(seconds, 4), "s", note=note)
    tell_reserved(here, where)
    del encoder
    empty(here)
    return answer


def vae(here: Here) -> None:
    data, pretrained = configuration(here, "5b", "low").data, planned_model(here, "5b", "low")
    frames = random(here, data.max_num_frames, 3, data.height, data.width).cpu().float()
    # Whole clips need most, so they come last.
    for tiling in (True, False):
        encoded_clip(here, pretrained, frames.clamp(-1, 1), tiling=tiling)
        empty(here)


def encoded_clip(
    here: Here, pretrained: PlannedModel, frames: torch.Tensor, *, tiling: bool
) -> None:
    with initialized_by(fill):
        model = pretrained.vae(tiling=tiling)
    reset_peak(here)
    encoder = Encoder(None, "", pretrained.dtype, pretrained.device)
    seconds = seconds_of(here, functools.partial(latent_moments, model, frames, encoder))
    where, (count, _, height, width) = "in tiles" if tiling else "whole", frames.shape
    note = f"{1 / seconds:.2f} clips/s; {count} frames of {width}x{height}"
    here.line(f"{where}: one clip", round(seconds, 3), "s", note=note)
    tell_reserved(here, where)


def reset_peak(here: Here) -> None:
    if here.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def tell_reserved(here: Here, where: str) -> None:
    if here.device == "cuda":
        reserved = torch.cuda.max_memory_reserved() / GIB
        here.line(f"{where}: reserved", round(reserved, 3), "GiB")


def empty(here: Here) -> None:
    gc.collect()
    if here.device == "cuda":
        torch.cuda.empty_cache()
