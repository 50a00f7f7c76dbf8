"""Animated WebP, which FFmpeg cannot decode. Read by Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy

# Browsers show a frame of at most this many milliseconds for SHOWN_INSTEAD.
TOO_BRIEF, SHOWN_INSTEAD = 10, 100


def is_webp(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(12)
    return start[:4] == b"RIFF" and start[8:] == b"WEBP"


def webp_size(path: Path) -> tuple[int, int]:
    """Width and height. OSError or ValueError if the file is damaged."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.size


def webp_times(path: Path) -> list[int]:
    """When each frame appears, in milliseconds. Errors as above."""
    from PIL import Image

    times, now = [], 0
    with Image.open(path) as picture:
        for number in range(picture.n_frames):
            picture.seek(number)
            # It knows a frame's duration only after decoding it.
            picture.load()
            times.append(now)
            duration = picture.info.get("duration", 0)
            now += duration if duration > TOO_BRIEF else SHOWN_INSTEAD
    return times


def webp_frames(path: Path) -> Iterator[numpy.ndarray]:
    """Each frame, [H, W, 4] uint8 (R, G, B, alpha). Errors as above."""
    from PIL import Image

    with Image.open(path) as picture:
        for number in range(picture.n_frames):
            picture.seek(number)
            yield numpy.asarray(picture.convert("RGBA"))
