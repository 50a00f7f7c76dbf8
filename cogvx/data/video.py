"""Reads a video file into the frames that the model sees.

F frames, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.data.buckets import Size
from cogvx.data.cuts import Cut, head, usable
from cogvx.data.decoders import decoded_frames, surveyed
from cogvx.data.footage import BadClip, Footage, require_usual_size
from cogvx.data.sources import Data, Reshape, ShortFiles
from cogvx.progress import counted

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

# Resized together: 8 frames of 1080p, 200 MB in fp32. More would need more memory.
PIXELS_AT_ONCE = 8 * 1920 * 1080
# A longer shape would be larger than memory after scaling: the short side is filled.
MOST_TIMES_AS_LONG = 100
# Pillow's names of the formats that it may read here. For some others it starts a program.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Containers round their times: a frame due at 0.125 s may be stamped 0.125001. By this share of the
# time between two frames ...
SLACK = 1e-3
# ... or, where this time can be long, by so many seconds.
SPREAD_SLACK = 1e-6


@dataclass(frozen=True)
class Clip:
    """A clip as the model sees it, and facts about its file."""

    frames: Tensor  # [F, C, H, W] in [-1, 1], fp32
    indices: list[int]  # the number of each frame in the file
    own_frames: int  # how many these are without those that data.short_files adds
    file_frames: int
    file_fps: float
    file_width: int
    file_height: int
    cropped: float  # the share of the picture that is outside
    treatment: str  # what was done to its frames besides decoding and resizing them


def read_clip(path: Path, data: Data, cut: Cut | None = None, *, frame_multiple: int = 4) -> Clip:
    """Frames at data.fps, brought to the cut's size as data.video_reshape_mode says.

    cut: None for the beginning of the file, at the size of `data`. Frames are chosen by their
    timestamps. Their number is frame_multiple * k + 1, as the VAE needs it. BadClip if the file
    gives too few.
    """
    cut = cut or head(data)
    footage = surveyed(path, *data.decode_limits)
    stamps, most = used_stamps(footage, cut), usable(cut.size.frames, frame_multiple)
    chosen = choose_frames(stamps, data.fps, most, cut)
    fill = data.short_files is not ShortFiles.drop and 1 < len(chosen) < most
    own = chosen if fill else chosen[: usable(len(chosen), frame_multiple)]
    if len(own) < data.min_num_frames:
        raise BadClip(too_few(footage, len(chosen), len(own), data))
    indices = [cut.first + number for number in (filled_up(own, most, data) if fill else own)]
    pixels = decoded_frames(footage, indices, *data.decode_limits)  # [F, H, W, C]
    mode, aspect = data.video_reshape_mode, footage.upright_pixel_aspect
    height, width = pixels.shape[1], pixels.shape[2]
    bars = bars_beside(height, width * aspect, cut.size) if mode is Reshape.pad else 0.0
    treatment = [
        *footage.treatment,
        *treatment_in_time(stamps, own, data, cut, fill=fill),
        *([f"black bars on {bars:.0%} of the picture"] if bars else []),
    ]
    return Clip(
        frames=fitted_to(cut, pixels, mode, path, aspect),
        indices=indices,
        own_frames=len(own),
        file_frames=len(footage.times),
        file_fps=footage.fps,
        file_height=height,
        file_width=width,
        cropped=0.0 if mode is Reshape.pad else cut.size.cropped(height, width * aspect),
        treatment=", ".join(treatment),
    )


def too_few(footage: Footage, chosen: int, own: int, data: Data) -> str:
    """Why a file is left out. own: how many of the chosen frames are used."""
    if len(footage.times) == 1:
        return "is a picture, a clip of 1 frame; to train on it: data.min_num_frames=1"
    used = f", of which {own} can be used (4k + 1)" if data.short_files is ShortFiles.drop else ""
    return (
        f"is too short: {counted(chosen, 'frame')} at {data.fps or 'its own'} fps{used}; "
        f"data.min_num_frames is {data.min_num_frames}"
    )


def read_image(path: Path, data: Data, video: Path, cut: Cut) -> Tensor:
    """A picture, resized and cropped like the first frame of `video`.

    [1, C, H, W] in [-1, 1]. BadClip if the file cannot be read.
    """
    import numpy
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            require_usual_size(*picture.size)
            pixels = numpy.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except BadClip as bad:
        raise BadClip(f"has an image, {path}, that {bad}") from bad
    except UnidentifiedImageError as error:
        raise BadClip(
            f"has an image, {path}, that is no picture ({path.stat().st_size} bytes)"
        ) from error
    # All of these are raised by PIL for damaged files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadClip(f"has an image, {path}, that cannot be read: {error}") from error
    try:
        return fitted_to(cut, pixels[None], data.video_reshape_mode, video)
    except BadClip as bad:
        raise BadClip(f"has an image, {path}, that {bad}") from bad


def read_first_frame(path: Path, data: Data, cut: Cut) -> Tensor:
    """The first frame that read_clip() takes, [1, C, H, W] in [-1, 1]."""
    footage = surveyed(path, *data.decode_limits)
    first = choose_frames(used_stamps(footage, cut), data.fps, usable(cut.size.frames), cut)[0]
    pixels = decoded_frames(footage, [cut.first + first], *data.decode_limits)
    aspect = footage.upright_pixel_aspect
    return fitted_to(cut, pixels, data.video_reshape_mode, path, aspect)


def to_bytes(frames: Tensor) -> numpy.ndarray:
    """[F, C, H, W] in [-1, 1] -> [F, H, W, C] uint8."""
    pixels = ((frames + 1) * 127.5).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


# -- which frames --------------------------------------------------------------------------------


def used_stamps(footage: Footage, cut: Cut) -> list[float]:
    """Of each frame that the cut may use. BadClip if there is none."""
    stamps = footage.stamps
    found = stamps[cut.first : max(0, len(stamps) - cut.skipped_at_end)]
    if not found:
        raise BadClip(
            f"has {counted(len(stamps), 'frame')}; none is left after skipping {cut.first} at its "
            f"start and {cut.skipped_at_end} at its end"
        )
    return found


def choose_frames(stamps: list[float], fps: float | None, most: int, cut: Cut) -> list[int]:
    """The numbers of up to `most` of these frames, at the cut's place or spread over all."""
    latest = latest_start(stamps, fps, most)
    if cut.spread and latest:
        return spread_evenly(stamps, most)
    start = round(cut.place * latest)
    return [start + number for number in by_timestamp(stamps[start:], fps, most)]


def latest_start(stamps: list[float], fps: float | None, most: int) -> int:
    """The last frame after which by_timestamp() still finds `most` frames. 0 if there is none."""
    if fps is None:
        return max(0, len(stamps) - most)
    end = shown_until(stamps)
    needed = (most - 1 + SLACK) / fps
    return max((i for i, stamp in enumerate(stamps[:-1]) if stamp + needed < end), default=0)


def spread_evenly(stamps: list[float], most: int) -> list[int]:
    """The numbers of the frames that are shown at `most` evenly spaced moments, first to last."""
    import numpy

    moments = numpy.linspace(stamps[0], stamps[-1], most) + SPREAD_SLACK
    return (numpy.searchsorted(stamps, moments, side="right") - 1).tolist()


def by_timestamp(stamps: list[float], fps: float | None, most: int) -> list[int]:
    """The numbers of the frames that are shown 0, 1/fps, 2/fps ... seconds after the first.

    stamps: the second at which each frame appears. A frame is shown until the next one appears;
    the last frame, as long as the one before it. At most `most` frames. With fps=None: every
    frame.
    """
    if fps is None or len(stamps) == 1:
        return list(range(min(len(stamps), most)))
    slack, end = SLACK / fps, shown_until(stamps)
    indices, index = [], 0
    for number in range(most):
        moment = stamps[0] + number / fps + slack
        if moment >= end:
            break
        while index + 1 < len(stamps) and stamps[index + 1] <= moment:
            index += 1
        indices.append(index)
    return indices


def shown_until(stamps: list[float]) -> float:
    """The last frame is shown as long as the one before it."""
    return stamps[-1] + (stamps[-1] - stamps[-2]) if len(stamps) > 1 else stamps[-1]


def filled_up(numbers: list[int], most: int, data: Data) -> list[int]:
    """`most` frames: from the first one again, or the last one held."""
    if data.short_files is ShortFiles.loop:
        return [numbers[place % len(numbers)] for place in range(most)]
    return numbers + numbers[-1:] * (most - len(numbers))


def treatment_in_time(
    stamps: list[float], own: list[int], data: Data, cut: Cut, *, fill: bool
) -> list[str]:
    """What is done with the time of a clip, for the report. own: its frames, not repeated ones."""
    if fill:
        how = "begins again" if data.short_files is ShortFiles.loop else "its last frame stays"
        return [f"{how} after {len(own)} frames"]
    if not cut.spread or len(own) == 1:
        return []
    seconds = stamps[own[-1]] - stamps[own[0]]
    rate = data.fps or (len(stamps) - 1) / (stamps[-1] - stamps[0])
    speed = seconds * rate / (len(own) - 1)
    return (
        [f"spread over {seconds:.1f} s: {speed:.2g} times as fast as filmed"] if speed > 1 else []
    )


# -- which part of the picture -------------------------------------------------------------------


def crop_place(path: Path, mode: Reshape) -> tuple[float, float]:
    """Where the crop lies in the frame: from (0, 0), top left, to (1, 1), bottom right.

    A random place is a hash of the file, so that it stays the same.
    """
    if mode is not Reshape.random:
        return 0.5, 0.5
    digest = hashlib.sha256(path.read_bytes()).digest()
    return digest[0] / 255, digest[1] / 255


def fitted_to(
    cut: Cut, pixels: numpy.ndarray, mode: Reshape, video: Path, pixel_aspect: float = 1.0
) -> Tensor:
    """[F, H, W, C] uint8 -> [F, C, height, width] of the cut, in [-1, 1].

    BadClip if they have another size and `mode` is none.
    """
    height, width = pixels.shape[1], round(pixels.shape[2] * pixel_aspect)
    size, place = cut.size, crop_place(video, mode)
    if mode is Reshape.none and (height, width) != (size.height, size.width):
        raise BadClip(
            f"is {width}x{height}, and data.video_reshape_mode=none takes {size.width}x"
            f"{size.height} only: data.width={width} data.height={height}, or "
            f"data.video_reshape_mode=center"
        )
    times = max(height, width) / max(1, min(height, width))
    if times > MOST_TIMES_AS_LONG:
        raise BadClip(
            f"is {width}x{height}: one side may be {MOST_TIMES_AS_LONG} times as long as the other"
        )
    frames = resize_and_crop(pixels, size, place, pixel_aspect, pad=mode is Reshape.pad)
    return frames.flip(-1) if cut.flipped else frames


def scaled_sides(height: float, width: float, size: Size, *, pad: bool) -> tuple[int, int]:
    """Height and width in which a picture covers `size`. With `pad`: in which it fits inside."""
    nearest = min if pad else max
    scale = nearest(size.height / height, size.width / width)
    sides = [(height, size.height), (width, size.width)]
    new = [nearest(most, math.floor(side * scale + 0.5)) for side, most in sides]
    return max(1, new[0]), max(1, new[1])


def bars_beside(height: float, width: float, size: Size) -> float:
    """The share of `size` that a picture does not fill."""
    new_height, new_width = scaled_sides(height, width, size, pad=True)
    return 1 - new_height * new_width / size.pixels


def resize_and_crop(
    pixels: numpy.ndarray,
    size: Size,
    place: tuple[float, float],
    pixel_aspect: float = 1.0,
    *,
    pad: bool = False,
) -> Tensor:
    """[F, H, W, C] uint8 -> [F, C, size.height, size.width] in [-1, 1].

    Scaled (bicubic) until both sides are long enough, then cropped at `place`. With `pad`: until
    one side is as long, then black bars are put beside it. Never stretched.
    pixel_aspect: the width of a pixel of the file, divided by its height.
    """
    import torch
    import torch.nn.functional as F

    new_height, new_width = scaled_sides(
        pixels.shape[1], pixels.shape[2] * pixel_aspect, size, pad=pad
    )
    top = round((new_height - size.height) * place[0])
    left = round((new_width - size.width) * place[1])
    below, right = new_height - size.height - top, new_width - size.width - left
    parts = []
    at_once = max(1, PIXELS_AT_ONCE // (pixels.shape[1] * pixels.shape[2]))
    for part in torch.from_numpy(pixels).split(at_once):
        # [F, H, W, C] -> [F, C, H, W]
        part = part.permute(0, 3, 1, 2).float()
        part = F.interpolate(
            part, (new_height, new_width), mode="bicubic", antialias=True, align_corners=False
        )
        # Less than nothing is put beside it where it is cropped.
        part = F.pad(part, (-left, -right, -top, -below)).clamp(0, 255)
        # In this order it rounds as diffusers' VideoProcessor does.
        parts.append(2 * (part / 255) - 1)
    return torch.cat(parts)
