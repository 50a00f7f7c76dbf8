"""What is taken of a file: which of its frames, at which size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogvx.data.buckets import Size, bucket_of, size_for

if TYPE_CHECKING:
    from cogvx.data.cache import Cache
    from cogvx.data.sources import Data, Example


@dataclass(frozen=True)
class Cut:
    """One way to use a file. With its bytes and the VAE it decides the latents."""

    size: Size
    first: int  # the frame of the file that it begins with
    skipped_at_end: int = 0  # frames at the end of the file that are not used
    flipped: bool = False  # left and right are swapped


def cuts_of(example: Example, data: Data, cache: Cache) -> tuple[Cut, ...]:
    """The ways to use a clip. Training draws one for each epoch. All have the same size.

    The first one is used where nothing is drawn: for the held-out loss, and in reports.
    """
    return (head(data, bucket_of(example, data, cache)),)


def head(data: Data, size: Size | None = None) -> Cut:
    """The beginning of a file, after data.skip_frames_start. None: at the size of `data`."""
    return Cut(size or size_for(data), data.skip_frames_start, data.skip_frames_end)
