"""Makes videos with a model in memory, through the diffusers pipeline itself.

F frames, H height, W width; S text tokens, D the size of a token's embedding.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import clear_device_cache

from cogvx.model import blocks, offload

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from cogvx.data.sources import Data
    from cogvx.options.validation import Validation

VIDEO_TO_VIDEO = "CogVideoXVideoToVideoPipeline"


@dataclass(frozen=True)
class SourceClip:
    """What video-to-video starts from."""

    frames: numpy.ndarray  # [F, H, W, 3] uint8, F = 4k + 1
    strength: float  # the share of the sampling steps that are made: above 0, to 1


def generate(
    pipeline_class: str,
    *,
    transformer,
    vae,
    noise_scheduler,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor,
    image: numpy.ndarray | None,
    clip: SourceClip | None,
    data: Data,
    sampling: Validation,
    frugal: bool,
    seed: int,
    description: str | None,
    after_each_step: Callable[[], None] | None = None,
) -> numpy.ndarray:
    """A video of the size in `data`, [F, H, W, 3] uint8. With a clip it is as long as the clip.

    pipeline_class: its name in diffusers. prompt_embeds, negative_prompt_embeds: [S, D]. image:
    the first frame, [H, W, 3] uint8; None for text-to-video. clip: for video-to-video. frugal:
    memory.frugal_videos. description: of the progress bar; None for no bar. after_each_step(): what
    it raises ends the video. The same seed gives the same starting noise on every device.
    """
    pipeline_class = pipeline_class if clip is None else VIDEO_TO_VIDEO
    pipeline = pipeline_of(pipeline_class, transformer, vae, noise_scheduler, description)
    device = vae.device
    # With a clip, prepare_latents() encodes it.
    for name in ("decode_latents", *([] if clip is None else ["prepare_latents"])):
        method = getattr(pipeline, name)
        setattr(pipeline, name, functools.partial(vae_alone, method, transformer, device, frugal))
    with blocks.clip_by_clip(transformer) if frugal else contextlib.nullcontext():
        frames = pipeline(
            **start_of(image, clip, data),
            prompt_embeds=prompt_embeds[None].to(device),
            negative_prompt_embeds=negative_prompt_embeds[None].to(device),
            height=data.height,
            width=data.width,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            use_dynamic_cfg=sampling.use_dynamic_cfg,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
            callback_on_step_end=called(after_each_step),
            callback_on_step_end_tensor_inputs=[],
        ).frames[0]
    if clip is not None:
        # The VAE decodes an even number of latent frames to four frames each, the first one too.
        frames = frames[-len(clip.frames) :]
    return (frames * 255).round().clip(0, 255).astype("uint8")


def called(after_each_step: Callable[[], None] | None) -> Callable | None:
    """As diffusers' pipelines call it. It changes no tensor."""
    if after_each_step is None:
        return None

    def after(pipeline, step: int, timestep, tensors: dict) -> dict:
        after_each_step()
        return {}

    return after


def vae_alone(method: Callable, transformer, device: torch.device, frugal: bool, *given):
    """A method of the pipeline that runs the VAE."""
    with offload.offloaded(transformer, device) if frugal else contextlib.nullcontext():
        # The VAE needs the memory that the transformer's activations have left.
        clear_device_cache()
        return method(*given)


def start_of(image: numpy.ndarray | None, clip: SourceClip | None, data: Data) -> dict:
    """What the pipeline's call starts from."""
    from PIL import Image

    if clip is not None:
        return {"video": [*map(Image.fromarray, clip.frames)], "strength": clip.strength}
    start = {} if image is None else {"image": Image.fromarray(image)}
    return start | {"num_frames": data.max_num_frames}


def pipeline_of(pipeline_class: str, transformer, vae, noise_scheduler, description: str | None):
    import diffusers

    pipeline = getattr(diffusers, pipeline_class)(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=noise_scheduler,
    )
    hidden = description is None or not sys.stderr.isatty()
    pipeline.set_progress_bar_config(desc=description, leave=False, disable=hidden)
    return pipeline
