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
from cogvx.data.cuts import Cut, head
from cogvx.data.decoders import decoded_frames, surveyed
from cogvx.data.footage import BadClip
from cogvx.data.sources import Data, Reshape
from cogvx.progress import counted

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

# Resized together. More would need more memory: 8 frames of 1080p are 200 MB in fp32.
FRAMES_AT_ONCE = 8


@dataclass(frozen=True)
class Clip:
    """A clip as the model sees it, and facts about its file."""

    frames: Tensor  # [F, C, H, W] in [-1, 1], fp32
    indices: list[int]  # the number of each frame in the file
    file_frames: int
    file_fps: float
    file_width: int
    file_height: int
    cropped: float  # the share of the picture that is outside
    treatment: str  # what was done to its frames besides decoding and resizing them


def read_clip(path: Path, data: Data, cut: Cut | None = None, *, frame_multiple: int = 4) -> Clip:
    """Frames at data.fps, resized and cropped to the cut's size.

    cut: None for the beginning of the file, at the size of `data`. Frames are chosen by their
    timestamps. Their number is frame_multiple * k + 1, as the VAE needs it. BadClip if the file
    gives too few.
    """
    cut = cut or head(data)
    footage = surveyed(path, data.decode_seconds)
    stamps = footage.stamps
    first, last = cut.first, len(stamps) - 1 - cut.skipped_at_end
    if first > last:
        raise BadClip(
            f"has {counted(len(stamps), 'frame')}; none is left after skipping {first} at its "
            f"start and {cut.skipped_at_end} at its end"
        )
    indices = by_timestamp(stamps[first : last + 1], data.fps, cut.size.frames)
    count = (len(indices) - 1) // frame_multiple * frame_multiple + 1
    if count < data.min_num_frames:
        raise BadClip(
            f"is too short: {counted(len(indices), 'frame')} at {data.fps or 'its own'} fps, of "
            f"which {count} can be used ({frame_multiple}k + 1); "
            f"data.min_num_frames is {data.min_num_frames}"
        )
    indices = [first + index for index in indices[:count]]
    pixels = decoded_frames(footage, indices, data.decode_seconds)  # [F, H, W, C]
    place = crop_place(path, data.video_reshape_mode)
    return Clip(
        frames=fitted_to(cut, pixels, place, footage.upright_pixel_aspect),
        indices=indices,
        file_frames=len(stamps),
        file_fps=footage.fps,
        file_height=pixels.shape[1],
        file_width=pixels.shape[2],
        cropped=cut.size.cropped(pixels.shape[1], pixels.shape[2] * footage.upright_pixel_aspect),
        treatment=", ".join(footage.treatment),
    )


def read_image(path: Path, data: Data, video: Path, cut: Cut) -> Tensor:
    """A picture, resized and cropped like the first frame of `video`.

    [1, C, H, W] in [-1, 1]. BadClip if the file cannot be read.
    """
    import numpy
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            pixels = numpy.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except UnidentifiedImageError as error:
        raise BadClip(
            f"has an image, {path}, that is no picture ({path.stat().st_size} bytes)"
        ) from error
    # All of these are raised by PIL for damaged files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadClip(f"has an image, {path}, that cannot be read: {error}") from error
    return fitted_to(cut, pixels[None], crop_place(video, data.video_reshape_mode))


def read_first_frame(path: Path, data: Data, cut: Cut) -> Tensor:
    """The first frame that read_clip() takes, [1, C, H, W] in [-1, 1]."""
    footage = surveyed(path, data.decode_seconds)
    if cut.first >= len(footage.times):
        raise BadClip(f"has only {counted(len(footage.times), 'frame')}")
    pixels = decoded_frames(footage, [cut.first], data.decode_seconds)
    place = crop_place(path, data.video_reshape_mode)
    return fitted_to(cut, pixels, place, footage.upright_pixel_aspect)


def to_bytes(frames: Tensor) -> numpy.ndarray:
    """[F, C, H, W] in [-1, 1] -> [F, H, W, C] uint8."""
    pixels = ((frames + 1) * 127.5).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def by_timestamp(stamps: list[float], fps: float | None, most: int) -> list[int]:
    """The numbers of the frames that are shown 0, 1/fps, 2/fps ... seconds after the first.

    stamps: the second at which each frame appears. A frame is shown until the next one appears;
    the last frame, as long as the one before it. At most `most` frames. With fps=None: every
    frame.
    """
    if fps is None or len(stamps) == 1:
        return list(range(min(len(stamps), most)))
    # Containers round their times: a frame due at 0.125 may be stamped 0.125001.
    slack = 1e-3 / fps
    end = stamps[-1] + (stamps[-1] - stamps[-2])
    indices, index = [], 0
    for number in range(most):
        moment = stamps[0] + number / fps + slack
        if moment >= end:
            break
        while index + 1 < len(stamps) and stamps[index + 1] <= moment:
            index += 1
        indices.append(index)
    return indices


def crop_place(path: Path, mode: Reshape) -> tuple[float, float]:
    """Where the crop lies in the frame: from (0, 0), top left, to (1, 1), bottom right.

    A random place is a hash of the file, so that it stays the same.
    """
    if mode is Reshape.center:
        return 0.5, 0.5
    digest = hashlib.sha256(path.read_bytes()).digest()
    return digest[0] / 255, digest[1] / 255


def fitted_to(
    cut: Cut, pixels: numpy.ndarray, place: tuple[float, float], pixel_aspect: float = 1.0
) -> Tensor:
    """[F, H, W, C] uint8 -> [F, C, height, width] of the cut, in [-1, 1]."""
    frames = resize_and_crop(pixels, cut.size, place, pixel_aspect)
    return frames.flip(-1) if cut.flipped else frames


def resize_and_crop(
    pixels: numpy.ndarray, size: Size, place: tuple[float, float], pixel_aspect: float = 1.0
) -> Tensor:
    """[F, H, W, C] uint8 -> [F, C, size.height, size.width] in [-1, 1].

    Scaled (bicubic) until both sides are long enough, then cropped at `place`. Never stretched.
    pixel_aspect: the width of a pixel of the file, divided by its height.
    """
    import torch
    import torch.nn.functional as F

    height, width = pixels.shape[1], pixels.shape[2] * pixel_aspect
    scale = max(size.height / height, size.width / width)
    new_height = max(size.height, math.floor(height * scale + 0.5))
    new_width = max(size.width, math.floor(width * scale + 0.5))
    top = round((new_height - size.height) * place[0])
    left = round((new_width - size.width) * place[1])
    parts = []
    for part in torch.from_numpy(pixels).split(FRAMES_AT_ONCE):
        # [F, H, W, C] -> [F, C, H, W]
        part = part.permute(0, 3, 1, 2).float()
        part = F.interpolate(
            part, (new_height, new_width), mode="bicubic", antialias=True, align_corners=False
        )
        part = part[:, :, top : top + size.height, left : left + size.width].clamp(0, 255)
        # In this order it rounds as diffusers' VideoProcessor does.
        parts.append(2 * (part / 255) - 1)
    return torch.cat(parts)
