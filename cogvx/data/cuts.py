"""What is taken of a file: which of its frames, at which size.

Of a file that is longer than the clip, data.long_files=head, middle, random and uniform make one
example. With random it has several cuts, of which training draws one. sliding and scenes make
several examples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from cogvx.data.buckets import Size, bucket_of, part_frames, size_for, used_part
from cogvx.data.cache import Cache
from cogvx.data.footage import BadClip
from cogvx.data.listed import shortened
from cogvx.data.sources import Data, Example, LongFiles, ShortFiles
from cogvx.progress import counted

LEFT_OR_RIGHT = re.compile(r"\b(left|right)(wards?|most)?\b", re.IGNORECASE)
# Of captions that are warned of: how many are named, and how many of their characters.
MOST_CAPTIONS_NAMED, SHOWN_OF_CAPTION = 3, 60


@dataclass(frozen=True)
class Cut:
    """One way to use a file. With its bytes and the VAE it decides the latents."""

    size: Size
    first: int  # the first frame of the file that may be used
    skipped_at_end: int = 0  # frames at the end of the file that are not used
    flipped: bool = False  # left and right are swapped
    # Where the clip lies between these two if it is shorter: 0 at their start, 1 at their end.
    place: float = 0.0
    spread: bool = False  # if it is shorter, it is spread over all of it


def head(data: Data) -> Cut:
    """The beginning of a file, after data.skip_frames_start, at the size of `data`."""
    return Cut(size_for(data), data.skip_frames_start, data.skip_frames_end)


# -- the cuts of an example ----------------------------------------------------------------------


def cuts_of(example: Example, data: Data, cache: Cache) -> tuple[Cut, ...]:
    """The ways to use a clip. Training draws one for each epoch. All have the same size.

    The first one is used where nothing is drawn: for the held-out loss, and in reports. BadClip if
    something must be known of the file, and it cannot be read.
    """
    cuts = windows(example, data, cache)
    sides = (False, True) if data.flip else (False,)
    return tuple(replace(cut, flipped=flipped) for cut in cuts for flipped in sides)


def windows(example: Example, data: Data, cache: Cache) -> list[Cut]:
    size = bucket_of(example, data, cache)
    first, skipped = used_part(example, data, cache)
    whole = Cut(size, first, skipped, place=example.place)
    # The parts of a divided file, too.
    if data.long_files is LongFiles.head or data.divides_files:
        return [whole]
    over = frames_over(example, size, data, cache)
    if not over:
        return [whole]
    if data.long_files is LongFiles.middle:
        return [replace(whole, place=0.5)]
    if data.long_files is LongFiles.uniform:
        return [replace(whole, spread=True)]
    return [replace(whole, place=place) for place in places(min(data.random_windows, 1 + over))]


def frames_over(example: Example, size: Size, data: Data, cache: Cache) -> int:
    """How many frames at data.fps are left beside the clip. 0 if the file is not longer."""
    return max(0, part_frames(example, data, cache) - size.frames)


def places(count: int) -> list[float]:
    """Evenly from 0 to 1. One is at 0."""
    return [number / max(1, count - 1) for number in range(count)]


def look_at_files(examples: list[Example], data: Data, cache: Cache) -> None:
    """Finds out what must be known of the files before they are cut, several at a time."""
    files, threshold = (example.video for example in examples), data.scene_threshold_used
    cache.look_at(files, facts=data.needs_facts, threshold=threshold)


# -- several examples of a file ------------------------------------------------------------------


def divided(
    examples: list[Example], data: Data, cache: Cache, say: Callable[[str], None]
) -> list[Example]:
    """With data.long_files=sliding or scenes: an example for each part of each file."""
    if data.flip:
        warn_of_directions(examples, say)
    if not data.divides_files:
        return examples
    divide = sliding_windows if data.long_files is LongFiles.sliding else parts_by_scene
    found, short = [], 0
    for example in examples:
        try:
            parts = divide(example, data, cache)
        # Encoding it may fail too, and then the clip is left out.
        except (BadClip, OSError) as bad:
            say(f"warning {example.origin} {example.video.name} {bad}; not divided")
            parts = [example]
        used = long_enough(parts, data, cache) if len(parts) > 1 else parts
        short += len(parts) - len(used)
        found += used
    what = "windows" if data.long_files is LongFiles.sliding else "scenes"
    say(f"cuts    {counted(len(examples), 'file')}, divided into {what}: {len(found)} examples")
    if short:
        say(
            f"warning {counted(short, 'scene has', 'scenes have')} fewer than data.min_num_frames="
            f"{data.min_num_frames} frames at {data.fps or 'their own'} fps; not used"
        )
    return found


def sliding_windows(example: Example, data: Data, cache: Cache) -> list[Example]:
    """As few windows as cover the whole file and overlap by data.window_overlap or more."""
    size = bucket_of(example, data, cache)
    over = frames_over(example, size, data, cache)
    if not over:
        return [example]
    step = max(1.0, size.frames * (1 - data.window_overlap))
    count = 1 + math.ceil(over / step)
    return [
        replace(example, place=place, origin=f"{example.origin} window {number} of {count}")
        for number, place in enumerate(places(count), start=1)
    ]


def parts_by_scene(example: Example, data: Data, cache: Cache) -> list[Example]:
    found = cache.scenes(example.video, data.scene_threshold)
    return [
        replace(
            example, start=start, end=end, origin=f"{example.origin} scene {number} of {len(found)}"
        )
        for number, (start, end) in enumerate(found, start=1)
    ]


def long_enough(parts: list[Example], data: Data, cache: Cache) -> list[Example]:
    """The parts of a file that training can use.

    If there is none: the longest, so that the report says of the file why it is left out.
    """
    frames = [usable_frames(part, data, cache) for part in parts]
    found = [p for p, count in zip(parts, frames, strict=True) if count >= data.min_num_frames]
    return found or [parts[frames.index(max(frames))]]


def usable_frames(part: Example, data: Data, cache: Cache) -> int:
    """How many frames training can use of it. Clips that are not filled have 4k + 1."""
    frames = part_frames(part, data, cache)
    return usable(frames) if data.short_files is ShortFiles.drop else frames


def usable(frames: int, multiple: int = 4) -> int:
    """The largest multiple * k + 1 that is not more: what the VAE takes."""
    return (frames - 1) // multiple * multiple + 1


def warn_of_directions(examples: list[Example], say: Callable[[str], None]) -> None:
    """A mirrored clip does not show what such a caption says."""
    said = [c for each in examples for c in each.captions if LEFT_OR_RIGHT.search(c)]
    if not said:
        return
    say(
        f"warning {counted(len(said), 'caption says', 'captions say')} left or right, and "
        f"data.flip=true shows the clips mirrored in half of the epochs: write it without, or "
        f"data.flip=false"
    )
    for caption in said[:MOST_CAPTIONS_NAMED]:
        say(f"        {shortened(caption, SHOWN_OF_CAPTION)!r}")
