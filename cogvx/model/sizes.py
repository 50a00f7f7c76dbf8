"""The sizes of data.buckets=auto: what the model takes at about the same cost.   [no torch]"""

from __future__ import annotations

import copy

from cogvx.data.buckets import AUTO, Size, size_for, sizes_of
from cogvx.data.sources import Data
from cogvx.model.geometry import Geometry

# Width / height of films and phones, of photographs and of old television. Each also upright.
ASPECTS = (16 / 9, 3 / 2, 4 / 3, 1.0)
# A size has at least this share of the pixels of data.height x data.width, and never more.
LEAST_AREA = 0.9
# Aspect ratios that differ by less than this factor are one.
SAME_ASPECT = 1.06


def with_sizes(data: Data, geometry: Geometry) -> Data:
    """The settings with the sizes that `auto` stands for. Other settings are returned as they are.

    What read() has noted in them stays.
    """
    if data.buckets != AUTO:
        return data
    found = copy.copy(data)
    found.buckets = [
        str(size) for size in sizes_like(size_for(data), data.min_num_frames, geometry)
    ]
    return found


def largest_size(data: Data, geometry: Geometry) -> Size:
    """The size of the most tokens that clips are trained at: it takes the most memory."""
    if data.buckets is None:
        return size_for(data)
    sizes = sizes_of(with_sizes(data, geometry))
    return max(
        sizes, key=lambda s: geometry.tokens(frames=s.frames, height=s.height, width=s.width)
    )


def sizes_like(size: Size, shortest: int, geometry: Geometry) -> list[Size]:
    """The given size, other aspect ratios of at most as many pixels, and shorter lengths of each.

    NovelAI's aspect ratio bucketing (github.com/NovelAI/novelai-aspect-ratio-bucketing) takes every
    width and the largest height that fits. Here there are few aspect ratios, so that few clips are
    alone in their bucket. Frames are halved down to `shortest`: a short clip has fewer tokens.
    """
    shapes = [(size.height, size.width)]
    wanted = [size.width / size.height, *ASPECTS]
    for aspect in [ratio for each in wanted for ratio in (each, 1 / each)]:
        shape = nearest_shape(aspect, size.pixels, geometry)
        if shape and all(is_another(shape, known) for known in shapes):
            shapes.append(shape)
    lengths = halved(size.frames, shortest, geometry.temporal_stride)
    return [Size(frames, *shape) for frames in lengths for shape in shapes]


def nearest_shape(aspect: float, area: int, geometry: Geometry) -> tuple[int, int] | None:
    """Height and width of at most `area` pixels, as near to the aspect ratio as the model takes.

    None if the area is so small that there is none.
    """
    multiple, shapes = geometry.pixel_multiple, []
    for height in range(multiple, area // multiple + 1, multiple):
        below = int(height * aspect) // multiple * multiple
        shapes += [(height, width) for width in (below, below + multiple)]
    shapes = [
        (height, width)
        for height, width in shapes
        if LEAST_AREA * area <= height * width <= area
        and not geometry.size_problems(height, width, "")
    ]
    return min(
        shapes,
        key=lambda shape: (factor(shape[1] / shape[0], aspect), -shape[0] * shape[1]),
        default=None,
    )


def is_another(shape: tuple[int, int], known: tuple[int, int]) -> bool:
    return factor(shape[1] / shape[0], known[1] / known[0]) >= SAME_ASPECT


def factor(one: float, other: float) -> float:
    return max(one / other, other / one)


def halved(frames: int, shortest: int, stride: int) -> list[int]:
    """`frames`, and half, a quarter ... of it, as stride * k + 1, down to `shortest`."""
    lengths = []
    while frames >= shortest and frames not in lengths:
        lengths.append(frames)
        frames = (frames - 1) // 2 // stride * stride + 1
    return lengths
