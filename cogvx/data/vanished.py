"""Listed clips whose files do not exist any more, while the cache has all that training needs.

F frames, C channels, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.data.buckets import Size
from cogvx.data.cache import Cache
from cogvx.data.sources import Example
from cogvx.errors import MOST_SHOWN, UserError, listed
from cogvx.progress import counted

if TYPE_CHECKING:
    from torch import Tensor

# An example, its clip or image, and what the cache should have of it.
Needed = tuple[Example, Path, Iterable[Path]]


def require_cached(needed: list[Needed], cache: Cache, say: Callable[[str], None]) -> None:
    """Names the files that have vanished.

    UserError if the cache lacks something of one of them: nothing can be encoded from it.
    """
    gone = [
        (example, file, [*paths])
        for example, file, paths in needed
        if file in cache.vanished and cache.has_known(str(file))
    ]
    if not gone:
        return
    lacking = set(cache.lacking(path for _, _, paths in gone for path in paths))
    problems = [
        f"{example.origin} names {file}, which does not exist, and {why}"
        for example, file, paths in gone
        if (why := why_unusable(paths, lacking, cache))
    ]
    if problems:
        headline = f"{len(problems)} of {counted(len(needed), 'clip')} cannot be used as listed:"
        raise UserError(listed(headline, problems))
    names = ", ".join(f"{example.origin} {file.name}" for example, file, _ in gone[:MOST_SHOWN])
    more = f" and {len(gone) - MOST_SHOWN} more" if len(gone) > MOST_SHOWN else ""
    say(
        f"warning {counted(len(gone), 'listed file does', 'listed files do')} not exist any more, "
        f"and the cache has what training needs: {names}{more}. Where their frames are shown or "
        f"measured, small previews stand for them"
    )


def why_unusable(paths: list[Path], lacking: set[Path], cache: Cache) -> str | None:
    """paths: none if it is not known which files of the cache it needs."""
    missing = [path for path in paths if path in lacking]
    if paths and not missing:
        return None
    damaged = next(filter(None, map(cache.damaged.get, missing)), None)
    return "it is not in the cache" if damaged is None else f"its file in the cache: {damaged}"


def preview_frames(mp4: bytes, size: Size) -> Tensor:
    """The small mp4 that the cache has of a clip, as large as the clip: [F, C, H, W] in [-1, 1]."""
    import av
    import numpy
    import torch

    with av.open(io.BytesIO(mp4)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    pixels = torch.from_numpy(numpy.stack(frames)).permute(0, 3, 1, 2)  # [F, C, h, w]
    return covering(pixels.float() / 127.5 - 1, size).clamp(-1, 1)


def covering(pixels: Tensor, size: Size) -> Tensor:
    """[F, C, h, w] -> [F, C, H, W]: enlarged, and cropped around the middle. Not stretched."""
    import torch.nn.functional as F

    height, width = pixels.shape[2:]
    scale = max(size.height / height, size.width / width)
    sides = [max(1, round(height * scale)), max(1, round(width * scale))]
    large = F.interpolate(pixels, sides, mode="bilinear", antialias=True)
    top, left = (sides[0] - size.height) // 2, (sides[1] - size.width) // 2
    return large[:, :, top : top + size.height, left : left + size.width]
