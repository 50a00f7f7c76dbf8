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

from cogvx.data.buckets import Size, size_for
from cogvx.data.cache import Cache
from cogvx.data.footage import BadClip, FileFacts
from cogvx.data.listed import shortened
from cogvx.data.scenes import scenes_of
from cogvx.data.sources import Data, Example, LongFiles, ShortFiles
from cogvx.progress import bar, counted

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
    """The beginning of a file, after data.skip_frames_start."""
    return Cut(size_for(data), data.skip_frames_start, data.skip_frames_end)


# -- the cuts of an example ----------------------------------------------------------------------


def cuts_of(example: Example, data: Data, cache: Cache) -> tuple[Cut, ...]:
    """The ways to use a clip. Training draws one for each epoch. All have the same size.

    The first one is used where nothing is drawn: for the held-out loss, and in reports.
    """
    cuts = windows(example, data, cache)
    sides = (False, True) if data.flip else (False,)
    return tuple(replace(cut, flipped=flipped) for cut in cuts for flipped in sides)


def windows(example: Example, data: Data, cache: Cache) -> list[Cut]:
    whole = Cut(size_for(data), *used_part(example, data, cache), place=example.place)
    if data.long_files in (LongFiles.head, LongFiles.sliding, LongFiles.scenes):
        return [whole]
    try:
        more = more_frames_than(whole, data, cache.facts(example.video))
    # Encoding it names what is wrong.
    except BadClip:
        return [whole]
    if not more:
        return [whole]
    if data.long_files is LongFiles.middle:
        return [replace(whole, place=0.5)]
    if data.long_files is LongFiles.uniform:
        return [replace(whole, spread=True)]
    return [replace(whole, place=place) for place in places(min(data.random_windows, 1 + more))]


def used_part(example: Example, data: Data, cache: Cache) -> tuple[int, int]:
    """The first frame that may be used, and how many at the file's end may not."""
    first, skipped = data.skip_frames_start, data.skip_frames_end
    if example.end is None:
        return first, skipped
    frames = cache.facts(example.video).frames
    return max(first, example.start), max(skipped, frames - example.end)


def places(count: int) -> list[float]:
    """Evenly from 0 to 1. One is at 0."""
    return [number / max(1, count - 1) for number in range(count)]


def more_frames_than(cut: Cut, data: Data, facts: FileFacts) -> int:
    """How many frames of the file are left over beside the clip. 0 if it is not longer."""
    over = clip_frames(cut, data, facts) - cut.size.frames
    return max(0, math.floor(over * file_frames_per_clip_frame(data, facts)))


def clip_frames(cut: Cut, data: Data, facts: FileFacts) -> int:
    """How many frames the used part gives at data.fps, for a file of a constant frame rate."""
    used = facts.frames - cut.first - cut.skipped_at_end
    # As in by_timestamp(), which counts again from the frames' own times.
    return math.ceil(used / file_frames_per_clip_frame(data, facts) - 1e-3)


def file_frames_per_clip_frame(data: Data, facts: FileFacts) -> float:
    if data.fps is None or not facts.seconds:
        return 1.0
    return (facts.frames - 1) / facts.seconds / data.fps


# -- several examples of a file ------------------------------------------------------------------


def spread(
    examples: list[Example], data: Data, cache: Cache, say: Callable[[str], None]
) -> list[Example]:
    """With data.long_files=sliding or scenes: an example for each part of each file.

    A file that cannot be read stays one example: encoding it names what is wrong.
    """
    if data.flip:
        warn_of_directions(examples, say)
    divide = {LongFiles.sliding: sliding_windows, LongFiles.scenes: parts_by_scene}
    if data.long_files not in divide:
        return examples
    found, short = [], 0
    for example in bar(examples, desc="cuts    files", unit="file", leave=False):
        try:
            parts = divide[data.long_files](example, data, cache)
        except BadClip:
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
    whole = Cut(size_for(data), *used_part(example, data, cache))
    over = clip_frames(whole, data, cache.facts(example.video)) - whole.size.frames
    if over <= 0:
        return [example]
    step = max(1.0, whole.size.frames * (1 - data.window_overlap))
    count = 1 + math.ceil(over / step)
    return [
        replace(example, place=place, origin=f"{example.origin} window {number} of {count}")
        for number, place in enumerate(places(count), start=1)
    ]


def parts_by_scene(example: Example, data: Data, cache: Cache) -> list[Example]:
    found = scenes_of(example.video, data.scene_threshold, cache)
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
    frames = [part_frames(part, data, cache) for part in parts]
    found = [p for p, count in zip(parts, frames, strict=True) if count >= data.min_num_frames]
    return found or [parts[frames.index(max(frames))]]


def part_frames(part: Example, data: Data, cache: Cache) -> int:
    """How many frames training can use of it. Clips that are not filled have 4k + 1."""
    cut = Cut(size_for(data), *used_part(part, data, cache))
    frames = clip_frames(cut, data, cache.facts(part.video))
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
