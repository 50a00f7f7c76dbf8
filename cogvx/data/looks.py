"""Finds clips that look alike, such as one clip that was saved twice in different qualities.

A look is small: the first, the middle and the last frame of a clip as 4 x 4 pixels, in colour.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

SIDE = 4  # pixels
# Root mean square difference of two looks, in levels of 0 to 255. The same clip of the demo's kind,
# compressed at crf 18 to 48 or made smaller, differs by 1.0 to 2.3; 600 different clips, by 3.1 and
# more. In a dark clip small differences count more: there it is a share of the look's deviation.
MOST_APART, MOST_OF_DEVIATION = 2.5, 0.08
# Looks that are compared at once.
BLOCK = 256


def look_of(thumbnails: numpy.ndarray) -> str:
    """[3, h, w, C] uint8 -> the look, as hexadecimal digits."""
    from PIL import Image

    box = Image.Resampling.BOX
    small = [Image.fromarray(frame).resize((SIDE, SIDE), box) for frame in thumbnails]
    return b"".join(frame.tobytes() for frame in small).hex()


def pairs_alike(looks: list[str]) -> list[tuple[int, int]]:
    """Places in the list of looks that are near each other. Equal ones are linked to the first."""
    import numpy

    first = {}
    pairs = [(first.setdefault(look, place), place) for place, look in enumerate(looks)]
    pairs = [(one, other) for one, other in pairs if one != other]
    places = numpy.array([*first.values()])
    if len(places) < 2:
        return pairs
    values = numpy.array([[*bytes.fromhex(look)] for look in first], numpy.float32)
    near = ((places[one], places[other]) for one, other in near_rows(values))
    return pairs + [(int(one), int(other)) for one, other in near]


def near_rows(values: numpy.ndarray) -> Iterable[tuple[int, int]]:
    """Pairs of rows of [N, D] that are near each other.

    Rows that are near each other are also near along any direction. So only rows that are near
    along the three directions of most variance are compared: 100,000 looks take seconds.
    """
    import numpy

    width = values.shape[1] ** 0.5
    _, directions = numpy.linalg.eigh(numpy.cov(values, rowvar=False))
    along = (values - values.mean(0)) @ directions[:, -3:].astype(numpy.float32)  # [N, 3]
    order = numpy.argsort(along[:, 2])
    values, along = values[order], along[order]
    allowed = numpy.minimum(MOST_APART, MOST_OF_DEVIATION * values.std(1))
    reach = MOST_APART * width
    ends = numpy.searchsorted(along[:, 2], along[:, 2] + reach, side="right")
    for start in range(0, len(values), BLOCK):
        rows = slice(start, start + BLOCK)
        others = slice(start, ends[rows].max())
        close = abs(along[rows, None, 0] - along[None, others, 0]) <= reach
        close &= abs(along[rows, None, 1] - along[None, others, 1]) <= reach
        one, other = (start + numpy.argwhere(close)).T
        one, other = one[one < other], other[one < other]
        apart = numpy.sqrt(numpy.mean((values[one] - values[other]) ** 2, axis=1))
        near = apart <= numpy.minimum(allowed[one], allowed[other])
        yield from zip(order[one[near]], order[other[near]], strict=True)
