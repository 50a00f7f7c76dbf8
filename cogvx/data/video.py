"""Reads a video file into the frames that the model sees.

F frames, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.data.sources import Data, Reshape
from cogvx.progress import counted

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

# Resized together. More would need more memory: 8 frames of 1080p are 200 MB in fp32.
FRAMES_AT_ONCE = 8


class BadClip(Exception):
    """Why a clip cannot be used. The other clips still can."""


@dataclass(frozen=True)
class Clip:
    """A clip as the model sees it, and facts about its file."""

    frames: Tensor  # [F, C, H, W] in [-1, 1], fp32
    indices: list[int]  # the number of each frame in the file
    file_frames: int
    file_fps: float
    file_width: int
    file_height: int


def read_clip(path: Path, data: Data, *, frame_multiple: int = 4) -> Clip:
    """Frames at data.fps, resized and cropped to data.height x data.width.

    Frames are chosen by their timestamps. Their number is frame_multiple * k + 1, as the VAE needs
    it. BadClip if the file gives too few.
    """
    if path.stat().st_size == 0:
        raise BadClip("is empty (0 bytes)")
    reader, stamps = open_video(path)
    first, last = data.skip_frames_start, len(stamps) - 1 - data.skip_frames_end
    if first > last:
        raise BadClip(
            f"has {counted(len(stamps), 'frame')}; none is left after skipping {first} at its "
            f"start and {data.skip_frames_end} at its end"
        )
    indices = by_timestamp(stamps[first : last + 1].tolist(), data.fps, data.max_num_frames)
    count = (len(indices) - 1) // frame_multiple * frame_multiple + 1
    if count < data.min_num_frames:
        raise BadClip(
            f"is too short: {counted(len(indices), 'frame')} at {data.fps or 'its own'} fps, of "
            f"which {count} can be used ({frame_multiple}k + 1); "
            f"data.min_num_frames is {data.min_num_frames}"
        )
    indices = [first + index for index in indices[:count]]
    pixels = decode(reader, indices)  # [F, H, W, C]
    return Clip(
        frames=resize_and_crop(pixels, data, place=crop_place(path, data.video_reshape_mode)),
        indices=indices,
        file_frames=len(stamps),
        file_fps=float(reader.get_avg_fps()),
        file_height=pixels.shape[1],
        file_width=pixels.shape[2],
    )


def read_image(path: Path, data: Data, video: Path) -> Tensor:
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
    return resize_and_crop(pixels[None], data, place=crop_place(video, data.video_reshape_mode))


def read_first_frame(path: Path, data: Data) -> Tensor:
    """The first frame that read_clip() takes, [1, C, H, W] in [-1, 1]."""
    reader, _ = open_video(path)
    pixels = decode(reader, [data.skip_frames_start])
    return resize_and_crop(pixels, data, crop_place(path, data.video_reshape_mode))


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


def missing_bytes(path: Path) -> int:
    """How many bytes are missing at the end of an mp4 or mov file. 0 for other formats.

    Every box in the file gives its length. Decoders ignore a missing part and return fewer frames
    without an error.
    """
    size, place = path.stat().st_size, 0
    with path.open("rb") as file:
        while place + 8 <= size:
            file.seek(place)
            length, kind = struct.unpack(">I4s", file.read(8))
            if place == 0 and kind != b"ftyp":
                return 0
            # 1: the length follows, in 8 bytes. 0: the box ends with the file.
            if length == 1:
                length = struct.unpack(">Q", file.read(8).rjust(8, b"\0"))[0]
            if length < 8:
                return 0
            place += length
    return max(0, place - size)


def open_video(path: Path):
    """The file's reader, and the second at which each frame appears."""
    # decord can crash when it is imported before torch.
    import torch  # noqa: F401

    # isort: split
    import decord

    if missing := missing_bytes(path):
        whole = missing + path.stat().st_size
        raise BadClip(f"is cut off: the last {missing} of its {whole} bytes are missing")
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        stamps = reader.get_frame_timestamp(list(range(len(reader))))[:, 0]
    except (decord.DECORDError, RuntimeError, OSError, IndexError) as error:
        raise BadClip(
            f"cannot be opened as a video ({path.stat().st_size} bytes): "
            f"truncated, or another kind of file"
        ) from error
    if len(stamps) == 0:
        raise BadClip("has no frames")
    return reader, stamps


def decode(reader, indices: list[int]) -> numpy.ndarray:
    import decord

    try:
        return reader.get_batch(indices).asnumpy()
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as error:
        if "from_size == to_size" in str(error):
            # If the padding of a row is as long as a fourth channel, decord2 3.4.0 takes it for
            # one. The padding depends on the processor: widths of 48, 96 and 144 pixels fail on
            # one, 8, 16, 24, 48 and 72 on another.
            raise BadClip(
                "has one of the small widths that the decoder (decord2) cannot read on this "
                "machine: scale it up to 160 pixels or more"
            ) from error
        raise BadClip("stops while its frames are decoded: truncated or damaged") from error


def crop_place(path: Path, mode: Reshape) -> tuple[float, float]:
    """Where the crop lies in the frame: from (0, 0), top left, to (1, 1), bottom right.

    A random place is a hash of the file, so that it stays the same.
    """
    if mode is Reshape.center:
        return 0.5, 0.5
    digest = hashlib.sha256(path.read_bytes()).digest()
    return digest[0] / 255, digest[1] / 255


def resize_and_crop(pixels: numpy.ndarray, data: Data, place: tuple[float, float]) -> Tensor:
    """[F, H, W, C] uint8 -> [F, C, data.height, data.width] in [-1, 1].

    Scaled (bicubic) until both sides are long enough, then cropped at `place`. Never stretched.
    """
    import torch
    import torch.nn.functional as F

    _, height, width, _ = pixels.shape
    scale = max(data.height / height, data.width / width)
    new_height = max(data.height, math.floor(height * scale + 0.5))
    new_width = max(data.width, math.floor(width * scale + 0.5))
    top = round((new_height - data.height) * place[0])
    left = round((new_width - data.width) * place[1])
    parts = []
    for part in torch.from_numpy(pixels).split(FRAMES_AT_ONCE):
        # [F, H, W, C] -> [F, C, H, W]
        part = part.permute(0, 3, 1, 2).float()
        part = F.interpolate(
            part, (new_height, new_width), mode="bicubic", antialias=True, align_corners=False
        )
        part = part[:, :, top : top + data.height, left : left + data.width].clamp(0, 255)
        # In this order it rounds as diffusers' VideoProcessor does.
        parts.append(2 * (part / 255) - 1)
    return torch.cat(parts)
