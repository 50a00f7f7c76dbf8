"""Measures what a clip of the little world shows, from its pixels alone.   [no torch]

The background is the colour at the frames' edges. The shape is what differs from the background.
Which shape it is follows from how much it fills of the circle around it, and from whether its
middle is empty. Its direction follows from its places in the first and the last frames.

F frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from cogvx.data.world import COLOURS, OTHER_COLOURS

# The least distance in RGB between a shape and its background. Black to white is 442.
VISIBLE = 40.0
# The shortest way that has a direction, as a share of the frame's side.
MOVED = 0.12
# The way along one side, as a share of the way along the other. Above this: no direction.
SLANTING = 0.5
# How much a shape fills of the circle around it. Measured at 64 pixels, after nano's VAE, which
# rounds corners: triangles 0.46 to 0.58, squares 0.68 to 0.77, circles 0.90 to 0.96.
SQUARE, CIRCLE = 0.63, 0.84
# How much of its inner third a shape fills. Below this it is a ring.
EMPTY_MIDDLE = 0.5


@dataclass(frozen=True)
class Seen:
    """Words of the little world. None: not recognised."""

    shape: str | None
    colour: str | None
    background: str | None
    direction: str | None
    # The way from the first to the last frames, as a share of the frame's side.
    motion: float
    # The mean of (max - min) / max over all pixels, 0 to 1.
    saturation: float

    def agrees(self, **expected: str) -> bool:
        return all(getattr(self, name) == value for name, value in expected.items())


def look_at(frames: numpy.ndarray) -> Seen:
    """frames: [F, H, W, 3] uint8."""
    pixels = frames.astype(numpy.float32)
    sides = [pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:]]
    background = numpy.median(numpy.concatenate([s.reshape(-1, 3) for s in sides]), axis=0)
    away = numpy.linalg.norm(pixels - background, axis=-1)  # [F, H, W]
    contrast = float(numpy.percentile(away, 99))
    saturation = saturation_of(pixels)
    if contrast < VISIBLE:
        return Seen(None, None, nearest_colour(background), None, 0.0, saturation)
    masks = [largest(frame > contrast / 2) for frame in away]
    colour = numpy.median(pixels[numpy.stack(masks)], axis=0)
    places = numpy.array([centre(mask) for mask in masks if mask.any()])  # [F, 2], y and x
    way = (places[-2:].mean(0) - places[:2].mean(0)) / frames.shape[1:3]
    return Seen(
        shape=shape_of(masks),
        colour=nearest_colour(colour),
        background=nearest_colour(background),
        direction=direction_of(way),
        motion=float(numpy.linalg.norm(way)),
        saturation=saturation,
    )


def saturation_of(pixels: numpy.ndarray) -> float:
    highest = pixels.max(axis=-1)
    return float(((highest - pixels.min(axis=-1)) / numpy.maximum(highest, 1)).mean())


def largest(mask: numpy.ndarray) -> numpy.ndarray:
    """The largest connected part of a mask [H, W]."""
    from scipy import ndimage

    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = ndimage.sum_labels(mask, labels, range(1, count + 1))
    return labels == 1 + numpy.argmax(sizes)


def centre(mask: numpy.ndarray) -> numpy.ndarray:
    """The middle of the smallest box around the mask, y and x: a hole does not change it."""
    places = numpy.argwhere(mask)
    return (places.min(0) + places.max(0)) / 2


def shape_of(masks: list[numpy.ndarray]) -> str | None:
    filled, middle = [], []
    for mask in masks:
        places = numpy.argwhere(mask)
        if len(places) < 12:
            continue
        distances = numpy.linalg.norm(places - places.mean(0), axis=1)
        radius = numpy.percentile(distances, 99) + 0.5
        filled.append(len(places) / (numpy.pi * radius**2))
        middle.append((distances < radius / 3).sum() / (numpy.pi * (radius / 3) ** 2))
    if len(filled) < len(masks) / 2:
        return None
    if numpy.median(middle) < EMPTY_MIDDLE:
        return "ring"
    share = numpy.median(filled)
    return "circle" if share > CIRCLE else "square" if share > SQUARE else "triangle"


def direction_of(way: numpy.ndarray) -> str | None:
    """way: y and x, as shares of the frame's sides. None if it is short, or slants too much."""
    down, right = way
    if max(abs(down), abs(right)) < MOVED:
        return None
    if min(abs(down), abs(right)) > SLANTING * max(abs(down), abs(right)):
        return None
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def nearest_colour(colour: numpy.ndarray) -> str:
    """The name of the nearest colour, of the little world or of the demo."""
    known = COLOURS | OTHER_COLOURS
    return min(known, key=lambda name: float(numpy.linalg.norm(numpy.array(known[name]) - colour)))
