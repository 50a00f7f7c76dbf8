"""A little world to learn: clips of one shape that moves over a background, with captions.

The clips are real mp4 files. model=nano was trained on them (experiment=nano_pretrain). The demo
adds a colour that they do not have.   F frames, H height, W width.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.data.filled import filled
from cogvx.data.mp4 import write_video
from cogvx.files import write_text
from cogvx.progress import bar

if TYPE_CHECKING:
    import numpy

# The folder's name begins with it. It must change when the clips change.
WORLD_FOLDER = "world_2"

COLOURS = {
    "red": (214, 48, 49),
    "blue": (36, 113, 209),
    "green": (39, 160, 85),
    "yellow": (245, 202, 50),
    "purple": (125, 70, 175),
    "orange": (235, 125, 35),
    "white": (240, 240, 240),
    "grey": (88, 94, 102),
}
# Not in this world.
OTHER_COLOURS = {"black": (16, 16, 18)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SHAPES = ("circle", "square", "triangle")
# Not in this world.
OTHER_SHAPES = ("ring", "cross")
CORNERS = {"square": 4, "triangle": 3}
COMBINATIONS = [
    kind for kind in itertools.product(SHAPES, COLOURS, COLOURS, DIRECTIONS) if kind[1] != kind[2]
]
# A ring's inner radius and half the width of a cross's arm, as shares of the radius.
HOLE, ARM = 0.5, 0.36
# Frames are drawn this many times larger, then averaged: edges become smooth.
FINE = 4


@dataclass(frozen=True)
class Scene:
    shape: str
    colour: str
    background: str
    direction: str
    called: str | None = None  # the colour's name in the caption; None: `colour`
    width: int = 128  # pixels
    height: int = 128
    fps: int = 8
    seconds: float = 1.125
    # Of the circle around the shape, as a share of the frame's shorter side.
    radius: float = 0.25
    # Where the path lies, across its direction: -1 and 1 are the frame's sides.
    aside: float = 0.0
    # How much of the free path the shape moves along, 0 to 1.
    travel: float = 1.0
    turn: float = 60.0  # degrees, from the first frame to the last
    start: float = 0.0  # degrees, in the first frame

    def caption(self) -> str:
        shape = f"A {self.called or self.colour} {self.shape}"
        return f"{shape} moves {self.direction} over a {self.background} background."

    def frames(self) -> int:
        return round(self.fps * self.seconds)


def scenes(count: int, seed: int) -> list[Scene]:
    """Scenes that differ, spread evenly over shapes, colours, backgrounds and directions."""
    import numpy

    generator = numpy.random.default_rng(seed)
    rounds = math.ceil(count / len(COMBINATIONS))
    order = [
        COMBINATIONS[i] for _ in range(rounds) for i in generator.permutation(len(COMBINATIONS))
    ]
    return [with_variation(Scene(*kind), generator) for kind in order[:count]]


def with_variation(
    scene: Scene,
    generator: numpy.random.Generator,
    *,
    radius: tuple[float, float] = (0.27, 0.33),
    start: float = 10.0,
    turn: float = 20.0,
) -> Scene:
    """The scene with a random size, path and turn.

    Sizes are close together. So the share of the frame that a shape fills tells which shape it is.
    """
    draw = generator.uniform
    return replace(
        scene,
        radius=draw(*radius),
        aside=draw(-0.6, 0.6),
        travel=draw(0.7, 1.0),
        turn=draw(-turn, turn),
        start=draw(-start, start),
    )


def draw_clip(scene: Scene) -> numpy.ndarray:
    """The clip, [F, H, W, 3] uint8."""
    colours = COLOURS | OTHER_COLOURS
    return paint(
        scene, colours[scene.colour], colours[scene.background], DIRECTIONS[scene.direction]
    )


def paint(
    scene: Scene, colour: tuple, background: tuple, direction: tuple[float, float]
) -> numpy.ndarray:
    """The scene in any colours and any direction, [F, H, W, 3] uint8."""
    import numpy

    size = min(scene.width, scene.height) * scene.radius
    # The way from the middle to where the shape touches the frame's side.
    free = (scene.width / 2 - size, scene.height / 2 - size)
    dx, dy = direction
    frames = []
    for way in numpy.linspace(-1, 1, scene.frames()):
        along, across = way * scene.travel, scene.aside
        x = scene.width / 2 + free[0] * (along * dx + across * dy)
        y = scene.height / 2 + free[1] * (along * dy + across * dx)
        angle = scene.start + scene.turn * (way + 1) / 2
        frames.append(draw_frame(scene, colour, background, (x, y), size, angle))
    return numpy.stack(frames)


def draw_frame(
    scene: Scene,
    colour: tuple,
    background: tuple,
    centre: tuple[float, float],
    size: float,
    angle: float,
) -> numpy.ndarray:
    """One frame, [H, W, 3] uint8. centre and size in pixels, angle in degrees."""
    import numpy
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (scene.width * FINE, scene.height * FINE), background)
    pen, (x, y), radius = ImageDraw.Draw(image), (centre[0] * FINE, centre[1] * FINE), size * FINE
    if scene.shape in CORNERS:
        pen.regular_polygon(((x, y), radius), CORNERS[scene.shape], rotation=angle, fill=colour)
    elif scene.shape == "cross":
        pen.polygon(cross(x, y, radius, numpy.deg2rad(angle)), fill=colour)
    else:
        pen.circle((x, y), radius, fill=colour)
        if scene.shape == "ring":
            pen.circle((x, y), radius * HOLE, fill=background)
    return numpy.asarray(image.resize((scene.width, scene.height), Image.Resampling.BOX))


def cross(x: float, y: float, radius: float, angle: float) -> list[tuple[float, float]]:
    """The twelve corners of a plus sign. angle in radians."""
    import numpy

    arm = ARM * radius
    quarter = [(arm, -radius), (arm, -arm), (radius, -arm)]
    corners = []
    for turn in range(4):
        turned = angle + turn * numpy.pi / 2
        cosine, sine = numpy.cos(turned), numpy.sin(turned)
        corners += [(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in quarter]
    return corners


def render_clips(folder: Path, clips: list[Scene], name: str) -> Path:
    """The folder `name` with these clips as mp4, prompts.txt and videos.txt.

    Made if it does not exist yet.
    """
    return filled(folder / name, lambda partial: write_clips(partial, clips))


def write_clips(folder: Path, clips: list[Scene]) -> None:
    names = [f"videos/{number:04d}.mp4" for number in range(1, len(clips) + 1)]
    pairs = bar(
        zip(names, clips, strict=True),
        total=len(clips),
        desc="render",
        unit="clip",
        leave=False,
        disable=len(clips) < 100,
    )
    for name, scene in pairs:
        write_video(folder / name, draw_clip(scene), fps=scene.fps)
    write_text(folder / "prompts.txt", "".join(f"{scene.caption()}\n" for scene in clips))
    write_text(folder / "videos.txt", "".join(f"{name}\n" for name in names))


FORM = re.compile(r"\bA (\w+) (\w+) moves (\w+) over a (\w+) background\b")


def parse_caption(prompt: str) -> dict[str, str]:
    """What a prompt of the form of Scene.caption() asks for. {} if it has another form.

    Keys: colour (by its name in the caption), shape, direction, background.
    """
    found = FORM.search(prompt)
    if found is None:
        return {}
    return dict(zip(("colour", "shape", "direction", "background"), found.groups(), strict=True))
