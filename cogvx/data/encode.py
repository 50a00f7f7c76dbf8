"""Videos and prompts to latents and embeddings, once; then the two encoders are let go.

F frames, C channels, H height, W width of the clip; F' H' W' of its latents; S text tokens, D their width.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.data.cache import Cache, claimed, content_key
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
    image_path: Path | None = (
        None  # image-to-video: image_moments [1 + variants, 2C, 1, H', W'], in the cache
    )

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
    paths = [
        cache.path("latents", clip_key(example.video, data, cache, vae)) for example in examples
    ]
    listed_at = dict(
        zip(reversed(paths), reversed(examples), strict=True)
    )  # a file listed twice is encoded once
    model = functools.cache(vae.load)  # when there is something to encode

    def encode(path: Path) -> None:
        clip = read_clip(
            listed_at[path].video, data, frame_multiple=model().config.temporal_compression_ratio
        )
        tensors = {
            "latent_moments": latent_moments(model(), clip.frames, vae),
            "thumbnails": thumbnails(clip.frames),
        }
        cache.write(path, tensors, about=facts_of(clip))

    reasons = encode_missing(paths, cache, encode, "clip", say)
    encoded, rejected = [], []
    for example, path in zip(examples, paths, strict=True):
        reason = reasons.get(path)
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


def encode_missing(
    paths: list[Path],
    cache: Cache,
    encode: Callable[[Path], None],
    what: str,
    say: Callable[[str], None],
) -> dict[Path, str]:
    """Calls encode(path) for every file that the cache lacks, unless another run that goes on at the same time does; what that one
    has begun comes last. Processes of this run share the work. Returns the reason for each that could not be encoded."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    state = PartialState()
    found = [path for path in dict.fromkeys(paths) if cache.about(path) is None]
    # One list for all processes: another run may have written between their looks.
    [missing] = broadcast_object_list([found])
    lacking = set(missing)
    say(cached(f"{what}s", len(paths), sum(path in lacking for path in paths)))
    mine, elsewhere, reasons = missing[state.process_index :: state.num_processes], [], {}
    for wait, todo in ((False, mine), (True, elsewhere)):
        if wait and todo:
            say(
                f"encode  waits for another run to encode {len(todo)} {what}{'s' if len(todo) > 1 else ''}"
            )
        for path in bar(todo, desc=f"encode  {what}s", unit=what, leave=False):
            with claimed(path, wait=wait) as claim:
                if not claim:
                    elsewhere.append(path)
                elif cache.about(path) is None:
                    try:
                        encode(path)
                    except BadClip as bad:
                        reasons[path] = str(bad)
    reasons = dict(gather_object(list(reasons.items())))
    state.wait_for_everyone()
    return reasons


def cached(what: str, total: int, missing: int) -> str:
    return (
        f"encode  {missing} {what}; {total - missing} of {total} are in the cache"
        if missing
        else f"encode  nothing: all {total} {what} are in the cache"
    )


def latent_moments(model: AutoencoderKLCogVideoX, frames: Tensor, vae: Encoder) -> Tensor:
    """[F, C, H, W] pixels -> [2C, F', H', W'], mean and log variance of the posterior, unscaled, in the VAE's dtype."""
    import torch

    pixels = frames.permute(1, 0, 2, 3)[None].to(
        vae.device, vae.dtype
    )  # [F, C, H, W] -> [1, C, F, H, W]
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
    paths = [cache.path("images", image_key(clip.example, data, cache, vae)) for clip in clips]
    starts = dict(zip(reversed(paths), (clip.example for clip in reversed(clips)), strict=True))
    model = functools.cache(vae.load)

    def encode(path: Path) -> None:
        cache.write(
            path, {"image_moments": image_moments(model(), starts[path], data, vae, seed=path.stem)}
        )

    reasons = encode_missing(paths, cache, encode, "image", say)
    pairs = list(zip(clips, paths, strict=True))
    rejected = [Rejected(clip.example, reasons[path]) for clip, path in pairs if path in reasons]
    refuse_too_many(rejected, len(clips), data.max_bad_fraction)
    for left_out in rejected:
        say(
            f"warning {left_out.example.origin} {left_out.example.video.name} {left_out.reason}; left out"
        )
    return [replace(clip, image_path=path) for clip, path in pairs if path not in reasons], rejected


def image_of(example: Example, data: Data) -> Tensor:
    """What an image-to-video clip starts from, [1, C, H, W] in [-1, 1]. BadClip when the file yields none."""
    if example.image is None:
        return read_first_frame(example.video, data)
    return read_image(example.image, data, example.video)


def image_moments(
    model: AutoencoderKLCogVideoX, example: Example, data: Data, vae: Encoder, seed: str
) -> Tensor:
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
    placed_by = (
        cache.fingerprint(example.video) if data.video_reshape_mode is Reshape.random else None
    )
    source = ("frame", data.skip_frames_start) if example.image is None else ("image", placed_by)
    return content_key(
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
    return content_key(
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
    paths = {
        prompt: cache.path(
            "prompts", content_key(VERSION, prompt, text.identity, str(text.dtype), max_length)
        )
        for prompt in dict.fromkeys(prompts)
    }
    prompt_of = {path: prompt for prompt, path in paths.items()}
    models = functools.cache(text.load)

    def encode(path: Path) -> None:
        embeds, tokens = prompt_embeds(*models(), prompt_of[path], text, max_length)
        cache.write(path, {"prompt_embeds": embeds}, about={"tokens": tokens})

    encode_missing(list(paths.values()), cache, encode, "prompt", say)
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
    tokenizer: PreTrainedTokenizerBase,
    model: T5EncoderModel,
    prompt: str,
    text: Encoder,
    max_length: int,
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
