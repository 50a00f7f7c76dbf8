"""Encodes videos and images to latents, once: the results stay in the cache.

F frames, C channels, H height, W width of the clip; F', H', W' of its latents.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.data.buckets import Size
from cogvx.data.cache import Cache, content_key
from cogvx.data.cuts import Cut, cuts_of
from cogvx.data.looks import look_of
from cogvx.data.measures import measured, preview
from cogvx.data.sharing import Share, make_missing
from cogvx.data.sources import Data, Example, LongFiles, Reshape, ShortFiles
from cogvx.data.vanished import preview_frames, require_cached
from cogvx.data.video import BadClip, Clip, read_clip, read_first_frame, read_image, to_bytes
from cogvx.errors import UserError, listed
from cogvx.libraries import collections_paused
from cogvx.progress import bar, counted

if TYPE_CHECKING:
    import numpy
    import torch
    from diffusers import AutoencoderKLCogVideoX
    from torch import Tensor

VERSION = 3  # raise it when a change makes the same inputs encode to other values
THUMBNAIL = 96  # pixels of the longer side; thumbnails are for the contact sheet


@dataclass(frozen=True)
class Encoder:
    """The VAE or the text encoder: how to load it, and what its results depend on."""

    load: Callable[[], object]
    identity: str  # a hash of its weights and settings
    dtype: torch.dtype
    device: torch.device
    # Its weights are copied to the device block by block, anew in every pass.
    streamed: bool = False


# Of task=inspect, which looks at clips and encodes nothing.
NO_VAE = Encoder(lambda: None, "no VAE", dtype=None, device=None)


@dataclass(frozen=True)
class EncodedCut:
    """One cut of a clip, encoded."""

    cut: Cut
    # In the cache: latent_moments [2C, F', H', W'] and thumbnails.
    path: Path
    # What facts_of() returns, and the shapes of the tensors.
    about: dict
    # In the cache, for image-to-video: image_moments [1 + noisy images, 2C, 1, H', W'].
    image_path: Path | None = None


@dataclass(frozen=True)
class EncodedClip:
    """Training draws one of the cuts for each epoch. Everything else uses the first."""

    example: Example
    cuts: tuple[EncodedCut, ...]

    @property
    def first(self) -> EncodedCut:
        return self.cuts[0]

    @property
    def about(self) -> dict:
        return self.first.about

    @property
    def size(self) -> Size:
        """What the model sees: a clip may have fewer frames than its cut asks for."""
        return replace(self.first.cut.size, frames=self.about["frames"])

    @property
    def latent_shape(self) -> list[int]:
        """[] with NO_VAE."""
        return self.about["shapes"].get("latent_moments", [])

    def look(self) -> str:
        """For pairs_alike(). The cache's files of earlier versions do not say it."""
        return self.about.get("look") or look_of(self.picture("thumbnails"))

    def has_vanished(self) -> bool:
        """Whether a file that it is made of does not exist any more."""
        files = (self.example.video, self.example.image)
        return not all(file.exists() for file in files if file is not None)

    def remembered_frames(self, size: Size) -> Tensor:
        """[F, C, H, W] in [-1, 1], from its preview. BadClip if an earlier version encoded it."""
        if "preview" not in self.about["shapes"]:
            raise BadClip("does not exist any more, and the cache has no preview of it")
        return preview_frames(self.picture("preview").tobytes(), size)

    def picture(self, name: str) -> numpy.ndarray:
        """thumbnails [3, h, w, C] or preview, the bytes of an mp4: uint8."""
        from safetensors import safe_open

        with safe_open(self.first.path, framework="np") as file:
            return file.get_tensor(name)


@dataclass(frozen=True)
class Rejected:
    example: Example
    reason: str


def cache_of(data: Data) -> Cache:
    """The cache, with what it remembers of this set of clips."""
    name = "the demo" if data.is_demo() else data.described()
    return Cache(data.cache_dir, name, data.decode_limits)


def encode_clips(
    examples: list[Example], data: Data, cache: Cache, vae: Encoder, say: Callable[[str], None]
) -> tuple[list[EncodedClip], list[Rejected]]:
    """Puts the latents of every example into the cache. Processes share the work.

    vae: NO_VAE to look at the clips only. Returns the clips, and the examples that cannot be used.
    UserError if these are more than data.max_bad_fraction.
    """
    with collections_paused():
        wanted, unusable = files_of_all(examples, data, cache, vae)
    pairs = zip(examples, wanted, strict=True)
    require_cached([(each, each.video, files.values()) for each, files in pairs], cache, say)
    # A file that is listed twice is encoded once; messages name its first line.
    sources = {
        path: (example.video, cut)
        for example, files in zip(reversed(examples), reversed(wanted), strict=True)
        for cut, path in files.items()
    }
    # Loaded only if there is something to encode.
    model = functools.cache(vae.load)

    def encode(share: Share) -> None:
        multiple = 4 if vae is NO_VAE else model().config.temporal_compression_ratio

        def read(path: Path) -> tuple[Tensor, dict[str, Tensor], dict]:
            """The frames, their pictures, and what is known of them."""
            video, cut = sources[path]
            clip = read_clip(video, data, cut, frame_multiple=multiple)
            pictures = shown_of(clip, data)
            look = look_of(pictures["thumbnails"].numpy())
            return clip.frames, pictures, facts_of(clip) | measured(clip) | {"look": look}

        for path, (frames, tensors, about) in share.read_ahead(read):
            if vae is not NO_VAE:
                tensors["latent_moments"] = latent_moments(model(), frames, vae)
            # Without this, one more clip would stay in memory.
            del frames
            share.write(path, tensors, about)

    paths = [path for files in wanted for path in files.values()]
    if data.flip or data.long_files is LongFiles.random:
        say(
            f"cuts    {counted(len(examples), 'clip')} in {len(paths)} versions; training draws one"
        )
    reasons = make_missing(paths, cache, encode, "clip", say)
    encoded, rejected = [], []
    with collections_paused():
        for number, (example, files) in enumerate(zip(examples, wanted, strict=True)):
            reason = unusable.get(number) or first_of(map(reasons.get, files.values()))
            found = reason or encoded_files(files, data, cache)
            if isinstance(found, str):
                rejected.append(Rejected(example, found))
            else:
                encoded.append(EncodedClip(example, found))
    report_rejected(rejected, len(examples), data.max_bad_fraction, say)
    return encoded, rejected


def encoded_files(files: dict[Cut, Path], data: Data, cache: Cache) -> tuple[EncodedCut, ...] | str:
    """The cuts of a clip, which are in the cache; a text says why they cannot be used."""
    cuts = tuple(EncodedCut(cut, path, cache.about(path)) for cut, path in files.items())
    return first_of(too_short(each, data) for each in cuts) or cuts


def first_of(reasons: Iterable[str | None]) -> str | None:
    return next(filter(None, reasons), None)


def files_of_all(
    examples: list[Example], data: Data, cache: Cache, vae: Encoder
) -> tuple[list[dict[Cut, Path]], dict[int, str]]:
    """files_of() each example, and why those that cannot be read cannot, by their number."""
    wanted, unusable = [], {}
    for number, example in enumerate(bar(examples, desc="look    clips", unit="clip", leave=False)):
        try:
            wanted.append(files_of(example, data, cache, vae))
        except (BadClip, OSError) as bad:
            wanted.append({})
            unusable[number] = unreadable(bad)
    return wanted, unusable


def files_of(example: Example, data: Data, cache: Cache, vae: Encoder) -> dict[Cut, Path]:
    """The file in the cache of each cut. BadClip or OSError if the clip cannot be read."""
    kind = "looks" if vae is NO_VAE else "latents"
    return {
        cut: cache.path(kind, clip_key(example.video, data, cut, cache, vae))
        for cut in cuts_of(example, data, cache)
    }


def unreadable(error: BadClip | OSError) -> str:
    """Why a clip is left out."""
    return str(error) if isinstance(error, BadClip) else f"cannot be read: {error.strerror}"


def too_short(encoded: EncodedCut, data: Data) -> str | None:
    """Why a cached cut cannot be used: data.min_num_frames may be larger than it was before."""
    frames, least = encoded.about["frames"], data.min_num_frames
    # Earlier versions of the cache have no frames that are added to a file.
    own = encoded.about.get("own_frames", frames)
    if own < least:
        return f"is too short: {counted(own, 'frame')}; data.min_num_frames is {least}"
    if data.buckets is not None and frames < encoded.cut.size.frames:
        return f"is too short: {counted(frames, 'frame')}; its bucket is {encoded.cut.size}"
    return None


def latent_moments(model: AutoencoderKLCogVideoX, frames: Tensor, vae: Encoder) -> Tensor:
    """[F, C, H, W] pixels in [-1, 1] -> [2C, F', H', W'].

    The mean and the log variance of the posterior, not scaled, in the VAE's dtype. UserError if
    the VAE's tiles do not fit the size.
    """
    import torch

    # [F, C, H, W] -> [1, C, F, H, W]
    pixels = frames.permute(1, 0, 2, 3)[None].to(vae.device, vae.dtype)
    with torch.no_grad():
        moments = model.encode(pixels).latent_dist.parameters[0].cpu().contiguous()
    stride = 2 ** (len(model.config.block_out_channels) - 1)
    expected = [side // stride for side in frames.shape[2:]]
    # diffusers' tiles overlap by whole latent pixels at the released VAE's sizes, not at all sizes.
    if list(moments.shape[2:]) != expected:
        hint = ": its tiles do not fit; set memory.vae_tiling=false" if model.use_tiling else ""
        found = list(moments.shape[2:])
        raise UserError(f"this VAE gives latents of {found} where {expected} are expected{hint}")
    return moments


def encode_images(
    clips: list[EncodedClip], data: Data, cache: Cache, vae: Encoder, say: Callable[[str], None]
) -> tuple[list[EncodedClip], list[Rejected]]:
    """Image-to-video: puts the latents of each clip's first image into the cache.

    Returns the clips with their image_path, and the examples whose image cannot be used. Processes
    share the work. UserError as in encode_clips().

    CogVideo's own trainer and diffusers' guide add new noise to the pixels in every step, with
    standard deviation exp(N(-3, 0.5)). That needs the VAE in every step. Here the image is
    encoded in advance: once as it is, and data.image_noise_variants times with noise, at evenly
    spread standard deviations. Training uses these in turn and samples from their posteriors
    anew in every step. An encoded image is small: 0.35 MB at 480x720 in bf16.
    """
    wanted = [
        [
            cache.path("images", image_key(clip.example, data, each.cut, cache, vae))
            for each in clip.cuts
        ]
        for clip in clips
    ]
    pairs = zip((clip.example for clip in clips), wanted, strict=True)
    files = ((example, example.image or example.video, paths) for example, paths in pairs)
    require_cached([*files], cache, say)
    starts = {
        path: (clip.example, each.cut)
        for clip, files in zip(reversed(clips), reversed(wanted), strict=True)
        for each, path in zip(clip.cuts, files, strict=True)
    }
    model = functools.cache(vae.load)

    def encode(share: Share) -> None:
        for path, image in share.read_ahead(lambda path: image_of(*starts[path], data)):
            variants = data.image_noise_variants
            moments = image_moments(model(), image, vae, variants, seed=path.stem)
            share.write(path, {"image_moments": moments})

    reasons = make_missing([*itertools.chain(*wanted)], cache, encode, "image", say)
    encoded, rejected = [], []
    for clip, files in zip(clips, wanted, strict=True):
        reason = first_of(map(reasons.get, files))
        if reason is None:
            pairs = zip(clip.cuts, files, strict=True)
            cuts = tuple(replace(each, image_path=path) for each, path in pairs)
            encoded.append(replace(clip, cuts=cuts))
        else:
            rejected.append(Rejected(clip.example, reason))
    report_rejected(rejected, len(clips), data.max_bad_fraction, say)
    return encoded, rejected


def image_of(example: Example, cut: Cut, data: Data) -> Tensor:
    """The image that an image-to-video clip starts from, [1, C, H, W] in [-1, 1].

    BadClip if its file cannot be read.
    """
    if example.image is None:
        return read_first_frame(example.video, data, cut)
    return read_image(example.image, data, example.video, cut)


def image_moments(
    model: AutoencoderKLCogVideoX, image: Tensor, vae: Encoder, variants: int, seed: str
) -> Tensor:
    """[1 + variants, 2C, 1, H', W']: first the image itself, then the image with noise.

    image: [1, C, H, W] in [-1, 1]. seed: hexadecimal digits.
    """
    import numpy
    import torch

    moments = [latent_moments(model, image, vae)]
    generator = numpy.random.default_rng(int(seed, 16))
    for sigma in noise_levels(variants):
        noise = torch.from_numpy(generator.standard_normal(image.shape, dtype=numpy.float32))
        moments.append(latent_moments(model, image + sigma * noise, vae))
    return torch.stack(moments)


def noise_levels(count: int) -> list[float]:
    """`count` standard deviations, spread evenly over the distribution exp(N(-3, 0.5)).

    They are for pixels in [-1, 1].
    """
    normal = statistics.NormalDist(-3.0, 0.5)
    return [math.exp(normal.inv_cdf((k + 0.5) / count)) for k in range(count)]


def image_key(example: Example, data: Data, cut: Cut, cache: Cache, vae: Encoder) -> str:
    """A hash of everything that decides an image's latents."""
    if example.image is None:
        source = ("frame", cut.first, *in_time(cut, data))
    else:
        # A random crop of the image lies where the crop of its video does.
        is_random = data.video_reshape_mode is Reshape.random
        source = ("image", cache.fingerprint(example.video) if is_random else None)
    return content_key(
        VERSION,
        *source,
        cache.fingerprint(example.image or example.video),
        vae.identity,
        str(vae.dtype),
        cut.size.height,
        cut.size.width,
        data.video_reshape_mode.name,
        data.image_noise_variants,
        *(["flipped"] if cut.flipped else []),
    )


def in_time(cut: Cut, data: Data) -> list[object]:
    """For keys: how frames are chosen, as far as the first version of the cache did not choose."""
    if not cut.place and not cut.spread:
        return []
    return [cut.place, cut.spread, data.fps, cut.size.frames, cut.skipped_at_end]


def frames_of(clip: EncodedClip, data: Data, *, frame_multiple: int = 4) -> Tensor:
    """The clip as the model sees it, [F, C, H, W] in [-1, 1]. Read from its file again.

    Of a file that has vanished: from the small preview in the cache.
    """
    cut = clip.first.cut
    if clip.has_vanished():
        return clip.remembered_frames(clip.size)
    return read_clip(clip.example.video, data, cut, frame_multiple=frame_multiple).frames


def shown_of(clip: Clip, data: Data) -> dict[str, Tensor]:
    """thumbnails [3, h, w, C] and preview, an mp4: uint8."""
    import torch

    played = preview(clip, data.fps or clip.file_fps)
    return {"thumbnails": thumbnails(clip.frames), "preview": torch.tensor(played)}


def thumbnails(frames: Tensor) -> Tensor:
    """The first, the middle and the last frame, [3, h, w, C] uint8."""
    import torch
    import torch.nn.functional as F

    chosen = frames[[0, len(frames) // 2, len(frames) - 1]]
    scale = min(1.0, THUMBNAIL / max(chosen.shape[2:]))
    size = [max(1, round(side * scale)) for side in chosen.shape[2:]]
    return torch.from_numpy(to_bytes(F.interpolate(chosen, size, mode="bilinear", antialias=True)))


def facts_of(clip: Clip) -> dict[str, object]:
    """What the dataset report says of a clip.

    repeated: frames of the file that are used more than once, without those that are added to a
    file that is too short. cropped: the share of the picture.
    """
    own = clip.indices[: clip.own_frames]
    return {
        "frames": len(clip.indices),
        "own_frames": clip.own_frames,
        "first_frame": clip.indices[0],
        "last_frame": own[-1],
        "repeated": len(own) - len(set(own)),
        "file_frames": clip.file_frames,
        "file_fps": round(clip.file_fps, 3),
        "file_width": clip.file_width,
        "file_height": clip.file_height,
        "cropped": round(clip.cropped, 3),
        "treatment": clip.treatment,
    }


def clip_key(video: Path, data: Data, cut: Cut, cache: Cache, vae: Encoder) -> str:
    """A hash of everything that decides a clip's latents: its bytes, frames, crop, and the VAE."""
    return content_key(
        VERSION,
        cache.fingerprint(video),
        vae.identity,
        str(vae.dtype),
        cut.size.height,
        cut.size.width,
        data.fps,
        cut.size.frames,
        cut.first,
        cut.skipped_at_end,
        data.video_reshape_mode.name,
        *in_time(cut, data),
        *(["flipped"] if cut.flipped else []),
        *([] if data.short_files is ShortFiles.drop else [data.short_files.name]),
    )


def report_rejected(
    rejected: list[Rejected], total: int, most: float, say: Callable[[str], None]
) -> None:
    """Warns of every clip that is left out. UserError if these are more than the share `most`."""
    if len(rejected) == total or len(rejected) > most * total:
        headline = (
            f"{len(rejected)} of {counted(total, 'clip')} cannot be used, more than "
            f"data.max_bad_fraction={most} allows. "
            f"Repair or remove them, or raise data.max_bad_fraction:"
        )
        reasons = (f"{bad.example.origin} {bad.example.video} {bad.reason}" for bad in rejected)
        raise UserError(listed(headline, reasons))
    for bad in rejected:
        say(f"warning {bad.example.origin} {bad.example.video.name} {bad.reason}; left out")
