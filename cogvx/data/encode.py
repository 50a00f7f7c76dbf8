"""Videos and prompts to latents and embeddings, once; then the two encoders are let go.

F frames, C channels, H height, W width of the clip; F' H' W' of its latents; S text tokens, D their width.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.data.cache import Cache, key_of
from cogvx.data.sources import Data, Example, Reshape
from cogvx.data.video import BadClip, Clip, read_clip, read_first_frame, read_image, to_bytes
from cogvx.errors import UserError, listed
from cogvx.progress import bar

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLCogVideoX
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

VERSION = 2  # raise it when the same inputs would encode to other values
THUMBNAIL = 96  # pixels of a thumbnail's longer side, for the contact sheet


@dataclass(frozen=True)
class Encoder:
    """One of the checkpoint's encoders: how to load it when it is needed, and what its results depend on."""

    load: Callable[[], object]
    identity: str  # of weights and settings
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class EncodedClip:
    example: Example
    path: Path  # latent_moments [2C, F', H', W'] and thumbnails, in the cache
    about: dict  # frames, file_frames, file_fps, file_width, file_height, repeated, shapes
    image_path: Path | None = None  # image-to-video: image_moments [1 + variants, 2C, 1, H', W'], in the cache

    @property
    def latent_shape(self) -> list[int]:
        return self.about["shapes"]["latent_moments"]


@dataclass(frozen=True)
class Rejected:
    example: Example
    reason: str


def encode_clips(
    examples: list[Example], data: Data, cache: Cache, vae: Encoder, say: Callable[[str], None]
) -> tuple[list[EncodedClip], list[Rejected]]:
    """Every example's latents in the cache, and those that cannot be used. Processes share the work.

    UserError when more than data.max_bad_fraction of the clips are unusable.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    paths = [cache.path("latents", clip_key(example.video, data, cache, vae)) for example in examples]
    missing = [index for index in range(len(examples)) if cache.about(paths[index]) is None]
    state.wait_for_everyone()  # all have looked before the first one writes
    say(cached("clips", len(examples), len(missing)))
    first_of = {paths[index]: index for index in reversed(missing)}  # a file listed twice is encoded once
    mine = sorted(first_of.values())[state.process_index :: state.num_processes]
    reasons = dict(gather_object(list(encode_missing(mine, examples, paths, data, cache, vae).items())))
    state.wait_for_everyone()

    encoded, rejected = [], []
    for index, (example, path) in enumerate(zip(examples, paths, strict=True)):
        reason = reasons.get(first_of.get(path, index))
        about = None if reason else cache.about(path)
        if about and about["frames"] < data.min_num_frames:
            reason = f"is too short: {about['frames']} frames; data.min_num_frames is {data.min_num_frames}"
        if reason is None:
            encoded.append(EncodedClip(example, path, about))
        else:
            rejected.append(Rejected(example, reason))
    refuse_too_many(rejected, len(examples), data.max_bad_fraction)
    for bad in rejected:
        say(f"warning {bad.example.origin} {bad.example.video.name} {bad.reason}; left out")
    return encoded, rejected


def cached(what: str, total: int, missing: int) -> str:
    return (
        f"encode  {missing} {what}; {total - missing} of {total} are in the cache"
        if missing
        else f"encode  nothing: all {total} {what} are in the cache"
    )


def encode_missing(
    indices: list[int], examples: list[Example], paths: list[Path], data: Data, cache: Cache, vae: Encoder
) -> dict[int, str]:
    """Encodes these examples; returns the reason for each that could not be."""
    if not indices:
        return {}
    model, reasons = vae.load(), {}
    for index in bar(indices, desc="encode  clips", unit="clip", leave=False):
        try:
            clip = read_clip(examples[index].video, data, frame_multiple=model.config.temporal_compression_ratio)
        except BadClip as bad:
            reasons[index] = str(bad)
            continue
        tensors = {"latent_moments": latent_moments(model, clip.frames, vae), "thumbnails": thumbnails(clip.frames)}
        cache.write(paths[index], tensors, about=facts_of(clip))
    return reasons


def latent_moments(model: AutoencoderKLCogVideoX, frames: Tensor, vae: Encoder) -> Tensor:
    """[F, C, H, W] pixels -> [2C, F', H', W'], mean and log variance of the posterior, unscaled, in the VAE's dtype."""
    import torch

    pixels = frames.permute(1, 0, 2, 3)[None].to(vae.device, vae.dtype)  # [F, C, H, W] -> [1, C, F, H, W]
    with torch.no_grad():
        moments = model.encode(pixels).latent_dist.parameters[0].cpu().contiguous()
    stride = 2 ** (len(model.config.block_out_channels) - 1)
    expected = [side // stride for side in frames.shape[2:]]
    # diffusers' tiles overlap by whole latent pixels at the released VAE's sizes, not at any.
    if list(moments.shape[2:]) != expected:
        raise UserError(
            f"this VAE gives latents of {list(moments.shape[2:])} where {expected} are expected"
            + (": its tiles do not fit; set memory.vae_tiling=false" if model.use_tiling else "")
        )
    return moments


def encode_images(
    clips: list[EncodedClip], data: Data, cache: Cache, vae: Encoder, say: Callable[[str], None]
) -> tuple[list[EncodedClip], list[Rejected]]:
    """For image-to-video: the clips with the latents of the image each starts from, as it is and with noise, and the clips whose
    image cannot be used. Processes share the work. UserError as encode_clips().

    Training adds noise of standard deviation exp(N(-3, 0.5)) to the pixels (CogVideo's own trainer, diffusers' guide), anew at
    every step; that would take the VAE. A posterior of one frame is small (0.35 MB at 480x720 in bf16), so data.image_noise_variants
    of them are kept, at evenly spread standard deviations, and used in turn; their posterior is sampled anew at every step.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    paths = [cache.path("images", image_key(clip.example, data, cache, vae)) for clip in clips]
    first_of = {path: index for index, path in reversed(list(enumerate(paths))) if cache.about(path) is None}
    state.wait_for_everyone()  # all have looked before the first one writes
    missing = sorted(first_of.values())
    say(cached("images", len(set(paths)), len(missing)))
    mine = missing[state.process_index :: state.num_processes]
    reasons = dict(gather_object(list(encode_missing_images(mine, clips, paths, data, cache, vae).items())))
    state.wait_for_everyone()
    bad = {index: reasons[first_of[path]] for index, path in enumerate(paths) if first_of.get(path) in reasons}
    rejected = [Rejected(clips[index].example, reason) for index, reason in bad.items()]
    refuse_too_many(rejected, len(clips), data.max_bad_fraction)
    for left_out in rejected:
        say(f"warning {left_out.example.origin} {left_out.example.video.name} {left_out.reason}; left out")
    return [
        replace(c, image_path=p) for i, (c, p) in enumerate(zip(clips, paths, strict=True)) if i not in bad
    ], rejected


def encode_missing_images(
    indices: list[int], clips: list[EncodedClip], paths: list[Path], data: Data, cache: Cache, vae: Encoder
) -> dict[int, str]:
    """Encodes the images of these clips; returns the reason for each that could not be."""
    if not indices:
        return {}
    model, reasons = vae.load(), {}
    for index in bar(indices, desc="encode  images", unit="image", leave=False):
        try:
            moments = image_moments(model, clips[index].example, data, vae, seed=paths[index].stem)
            cache.write(paths[index], {"image_moments": moments})
        except BadClip as bad:
            reasons[index] = str(bad)
    return reasons


def image_of(example: Example, data: Data) -> Tensor:
    """What an image-to-video clip starts from, [1, C, H, W] in [-1, 1]. BadClip when the file yields none."""
    if example.image is None:
        return read_first_frame(example.video, data)
    return read_image(example.image, data, example.video)


def image_moments(model: AutoencoderKLCogVideoX, example: Example, data: Data, vae: Encoder, seed: str) -> Tensor:
    """[1 + variants, 2C, 1, H', W']: of the image itself, then with noise."""
    import numpy
    import torch

    image = image_of(example, data)
    moments = [latent_moments(model, image, vae)]
    generator = numpy.random.default_rng(int(seed, 16))
    for sigma in noise_levels(data.image_noise_variants):
        noise = torch.from_numpy(generator.standard_normal(image.shape, dtype=numpy.float32))
        moments.append(latent_moments(model, image + sigma * noise, vae))
    return torch.stack(moments)


def noise_levels(count: int) -> list[float]:
    """`count` standard deviations at the middles of as many equal shares of exp(N(-3, 0.5)), of pixels in [-1, 1]."""
    normal = statistics.NormalDist(-3.0, 0.5)
    return [math.exp(normal.inv_cdf((k + 0.5) / count)) for k in range(count)]


def image_key(example: Example, data: Data, cache: Cache, vae: Encoder) -> str:
    """Of all that decides an image's latents."""
    placed_by = cache.fingerprint(example.video) if data.video_reshape_mode is Reshape.random else None
    source = ("frame", data.skip_frames_start) if example.image is None else ("image", placed_by)
    return key_of(
        VERSION, *source, cache.fingerprint(example.image or example.video), vae.identity, str(vae.dtype), data.height, data.width,
        data.video_reshape_mode.name, data.image_noise_variants,
    )  # fmt: skip


def thumbnails(frames: Tensor) -> Tensor:
    """First, middle and last frame, [3, h, w, C] uint8."""
    import torch
    import torch.nn.functional as F

    chosen = frames[[0, len(frames) // 2, len(frames) - 1]]
    scale = min(1.0, THUMBNAIL / max(chosen.shape[2:]))
    size = [max(1, round(side * scale)) for side in chosen.shape[2:]]
    return torch.from_numpy(to_bytes(F.interpolate(chosen, size, mode="bilinear", antialias=True)))


def facts_of(clip: Clip) -> dict[str, object]:
    return {
        "frames": len(clip.indices),
        "first_frame": clip.indices[0],
        "last_frame": clip.indices[-1],
        "repeated": len(clip.indices) - len(set(clip.indices)),
        "file_frames": clip.file_frames,
        "file_fps": round(clip.file_fps, 3),
        "file_width": clip.file_width,
        "file_height": clip.file_height,
    }


def clip_key(video: Path, data: Data, cache: Cache, vae: Encoder) -> str:
    """Of all that decides a clip's latents: the file's bytes, which frames and pixels are taken, and the VAE."""
    return key_of(
        VERSION,
        cache.fingerprint(video),
        vae.identity,
        str(vae.dtype),
        data.height,
        data.width,
        data.fps,
        data.max_num_frames,
        data.skip_frames_start,
        data.skip_frames_end,
        data.video_reshape_mode.name,
    )


def refuse_too_many(rejected: list[Rejected], total: int, most: float) -> None:
    if len(rejected) == total or len(rejected) > most * total:
        raise UserError(
            listed(
                f"{len(rejected)} of {total} clips cannot be used, more than data.max_bad_fraction={most} allows. "
                f"Mend or remove them, or raise data.max_bad_fraction:",
                (f"{bad.example.origin} {bad.example.video} {bad.reason}" for bad in rejected),
            )
        )


def encode_prompts(
    prompts: Iterable[str], cache: Cache, text: Encoder, max_length: int, say: Callable[[str], None]
) -> dict[str, Path]:
    """The cached embedding of every prompt, prompt_embeds [S, D], S = max_length. Processes share the work.

    text.load() returns the tokenizer and the encoder. Prompts longer than max_length tokens are named: the model sees
    only their beginning, in training as in the pipeline.
    """
    from accelerate import PartialState

    state = PartialState()
    paths = {
        prompt: cache.path("prompts", key_of(VERSION, prompt, text.identity, str(text.dtype), max_length))
        for prompt in dict.fromkeys(prompts)
    }
    about = {prompt: cache.about(path) for prompt, path in paths.items()}
    missing = [prompt for prompt in paths if about[prompt] is None]
    state.wait_for_everyone()
    say(cached("prompts", len(paths), len(missing)))
    mine = missing[state.process_index :: state.num_processes]
    if mine:
        tokenizer, model = text.load()
        for prompt in bar(mine, desc="encode  prompts", unit="prompt", leave=False):
            embeds, tokens = prompt_embeds(tokenizer, model, prompt, text, max_length)
            cache.write(paths[prompt], {"prompt_embeds": embeds}, about={"tokens": tokens})
    state.wait_for_everyone()
    tokens = {prompt: cache.about(path)["tokens"] for prompt, path in paths.items()}
    long = [prompt for prompt in paths if tokens[prompt] > max_length]
    if long:
        worst = max(long, key=tokens.get)
        say(
            f"warning {len(long)} of {len(paths)} prompts are longer than the model's {max_length} tokens; it sees only the "
            f"beginning of them. The longest has {tokens[worst]}: {worst[:60]!r}..."
        )
    return paths


def prompt_embeds(
    tokenizer: PreTrainedTokenizerBase, model: T5EncoderModel, prompt: str, text: Encoder, max_length: int
) -> tuple[Tensor, int]:
    """[S, D] as the pipeline's encode_prompt makes them (no attention mask), and the prompt's tokens before truncation."""
    import torch

    tokens = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
    ids = tokenizer(
        [prompt],
        padding="max_length",
        max_length=max_length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        embeds = model(ids.to(text.device))[0]
    return embeds[0].to(text.dtype).cpu().contiguous(), tokens
