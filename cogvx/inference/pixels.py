"""What a clip of the little world shows, measured on its pixels alone.   F frames, H height, W width.   [no torch]

The background is the colour along the frames' edges; the shape is what differs from it; its form follows from how much of the circle
around it it fills, and whether its middle is empty; its direction from where it is in the first and in the last frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from cogvx.data.world import COLOURS, OTHER_COLOURS

VISIBLE = 40.0  # RGB distance between a shape and its background, of 442 between black and white
MOVED = 0.12  # of the frame's side
SLANTING = (
    0.5  # of the way along one side, the way along the other; what slants more has no direction
)
# Filled share of the circle around a shape at 64 pixels, drawn and restored by nano's VAE, which rounds corners: triangles 0.46 to
# 0.58, squares 0.68 to 0.77, circles 0.90 to 0.96.
SQUARE, CIRCLE = 0.63, 0.84
EMPTY_MIDDLE = 0.5  # filled share of the inner third


@dataclass(frozen=True)
class Seen:
    """Names of the world, or None where nothing of the kind is recognised."""

    shape: str | None
    colour: str | None
    background: str | None
    direction: str | None
    motion: float  # way from the first to the last frame, as a share of the frame's side
    saturation: float  # mean of (max - min) / max over the pixels, 0 to 1

    def agrees(self, **expected: str) -> bool:
        return all(getattr(self, name) == value for name, value in expected.items())


def look_at(frames: numpy.ndarray) -> Seen:
    """Of frames [F, H, W, 3] uint8."""
    pixels = frames.astype(numpy.float32)
    edge = numpy.concatenate([pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3), pixels[:, :, :2].reshape(-1, 3), pixels[:, :, -2:].reshape(-1, 3)])  # fmt: skip
    background = numpy.median(edge, axis=0)
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
        shape=shape_of(masks), colour=nearest_colour(colour), background=nearest_colour(background), direction=direction_of(way),
        motion=float(numpy.linalg.norm(way)), saturation=saturation,
    )  # fmt: skip


def saturation_of(pixels: numpy.ndarray) -> float:
    highest = pixels.max(axis=-1)
    return float(((highest - pixels.min(axis=-1)) / numpy.maximum(highest, 1)).mean())


def largest(mask: numpy.ndarray) -> numpy.ndarray:
    """The largest connected part of [H, W]."""
    from scipy import ndimage

    labels, count = ndimage.label(mask)
    return (
        labels == 1 + numpy.argmax(ndimage.sum_labels(mask, labels, range(1, count + 1)))
        if count
        else mask
    )


def centre(mask: numpy.ndarray) -> numpy.ndarray:
    """Of the smallest box around it, so that a hole does not matter: y and x."""
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
    """The way (y, x) as shares of the frame's sides; None when it is short or slants."""
    down, right = way
    if max(abs(down), abs(right)) < MOVED:
        return None
    if min(abs(down), abs(right)) > SLANTING * max(abs(down), abs(right)):
        return None
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def nearest_colour(colour: numpy.ndarray) -> str:
    """The nearest colour, of the world or what the demo adds to it."""
    known = COLOURS | OTHER_COLOURS
    return min(known, key=lambda name: float(numpy.linalg.norm(numpy.array(known[name]) - colour)))
