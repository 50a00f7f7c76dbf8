"""The size that each clip is trained at: data.buckets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cogvx.data.cache import Cache
    from cogvx.data.footage import FileFacts
    from cogvx.data.sources import Data, Example

AUTO = "auto"
# Two buckets that crop the same share of a clip, up to this, are equally near.
SAME_CROP = 0.05
# Seconds by which the times in a file may be rounded.
TIME_ROUNDING = 0.002


@dataclass(frozen=True)
class Size:
    frames: int  # at most
    height: int  # pixels
    width: int  # pixels

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def cropped(self, height: float, width: float) -> float:
        """The share of a picture of height x width that is cropped to give it this shape."""
        ratio = (width * self.height) / (height * self.width)
        return 1 - min(ratio, 1 / ratio)


def size_for(data: Data) -> Size:
    """The size that data.max_num_frames, data.height and data.width name."""
    return Size(data.max_num_frames, data.height, data.width)


def read_size(text: object) -> Size | None:
    """49x480x720 is 49 frames of height 480 and width 720. None if it is no such text."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", str(text))
    return None if found is None else Size(*map(int, found.groups()))


def sizes_of(data: Data) -> list[Size]:
    """Of a list of buckets. Those of `auto` depend on the model: model/sizes.py."""
    return [read_size(text) for text in data.buckets]


def bucket_of(example: Example, data: Data, cache: Cache) -> Size:
    """The size of a clip: the nearest bucket, or the only size. BadClip if it cannot be read."""
    if data.buckets is None:
        return size_for(data)
    facts = cache.facts(example.video)
    return nearest_bucket(sizes_of(data), facts, part_frames(example, data, cache))


def part_frames(example: Example, data: Data, cache: Cache) -> int:
    """How many frames an example's part of its file gives at data.fps."""
    unused = sum(used_part(example, data, cache))
    return frames_given(cache.facts(example.video), data, unused)


def used_part(example: Example, data: Data, cache: Cache) -> tuple[int, int]:
    """The first frame that may be used, and how many at the file's end may not."""
    first, skipped = data.skip_frames_start, data.skip_frames_end
    if example.end is None:
        return first, skipped
    frames = cache.facts(example.video).frames
    return max(first, example.start), max(skipped, frames - example.end)


def frames_given(facts: FileFacts, data: Data, unused: int) -> int:
    """How many frames a file gives at data.fps. unused: how many of its own may not be used."""
    left = facts.frames - unused
    if data.fps is None or left <= 1:
        return left
    seconds = facts.seconds / (facts.frames - 1) * left
    return math.ceil((seconds - TIME_ROUNDING) * data.fps)


def nearest_bucket(sizes: list[Size], facts: FileFacts, frames: int) -> Size:
    """The bucket of a clip with so many frames.

    Of the buckets that it is long enough for: the one that crops the least of its picture. Of those
    that crop about the same: the longest, then the largest for which it is not enlarged. For a
    clip that is shorter than all: a bucket of the shortest.
    """
    shortest = min(size.frames for size in sizes)
    filled = [size for size in sizes if size.frames <= max(frames, shortest)]
    crops = {size: size.cropped(facts.height, facts.width) for size in filled}
    alike = [size for size in filled if crops[size] <= min(crops.values()) + SAME_CROP]

    def rank(size: Size) -> tuple[int, bool, int, float]:
        enlarged = facts.height < size.height or facts.width < size.width
        return size.frames, not enlarged, -size.pixels if enlarged else size.pixels, -crops[size]

    return max(alike, key=rank)


def problems_of_buckets(data: Data) -> list[str]:
    """What is wrong with data.buckets, whatever the model."""
    buckets = data.buckets
    if buckets in (None, AUTO):
        return []
    texts = buckets if isinstance(buckets, list) else [buckets]
    wrong = [text for text in texts if read_size(text) is None]
    if wrong or not texts or not isinstance(buckets, list):
        found = ", ".join(map(str, wrong)) or str(buckets)
        return [
            f"data.buckets={found}: must be a list of sizes (frames x height x width), such as "
            f"[49x480x720,25x720x480]; auto; or null for one size"
        ]
    least = data.min_num_frames
    return [
        f"data.buckets: {size} has fewer frames than data.min_num_frames={least}"
        for size in sizes_of(data)
        if size.frames < least
    ]
