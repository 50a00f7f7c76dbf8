"""A little world to learn: captioned clips of one shape that moves over a background, drawn to real mp4 files.

model=nano was trained on it (experiment=nano_pretrain), and the demo adds a colour it has never seen.   H height, W width of a frame.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.data.cache import filled

if TYPE_CHECKING:
    import numpy

WORLD_FOLDER = "world_2"  # of its folders: another one when its clips change

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
OTHER_COLOURS = {"black": (16, 16, 18)}  # not in this world
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SHAPES = ("circle", "square", "triangle")
OTHER_SHAPES = ("ring", "cross")  # not in this world
COMBINATIONS = [
    kind for kind in itertools.product(SHAPES, COLOURS, COLOURS, DIRECTIONS) if kind[1] != kind[2]
]
HOLE, ARM = 0.5, 0.36  # a ring's inner radius and a cross's half width, as shares of the radius
FINE = 4  # drawn so many times larger and averaged, for smooth edges


@dataclass(frozen=True)
class Scene:
    shape: str
    colour: str
    background: str
    direction: str
    called: str | None = None  # its colour in captions, where that has another name there
    width: int = 128  # pixels
    height: int = 128
    fps: int = 8
    seconds: float = 1.125
    radius: float = 0.25  # of the circle around the shape, as a share of the shorter side
    aside: float = 0.0  # -1 to 1: where its path lies, across the direction
    travel: float = 1.0  # share of the free path it goes
    turn: float = 60.0  # degrees while it goes
    start: float = 0.0  # degrees it is turned by when it starts

    def caption(self) -> str:
        return f"A {self.called or self.colour} {self.shape} moves {self.direction} over a {self.background} background."

    def frames(self) -> int:
        return round(self.fps * self.seconds)


def scenes(count: int, seed: int) -> list[Scene]:
    """Different ones, spread evenly over shapes, colours, backgrounds and directions."""
    import numpy

    generator = numpy.random.default_rng(seed)
    order = [
        COMBINATIONS[i]
        for _ in range(-(-count // len(COMBINATIONS)))
        for i in generator.permutation(len(COMBINATIONS))
    ]
    return [with_variation(Scene(*kind), generator) for kind in order[:count]]


def with_variation(
    scene: Scene, generator: numpy.random.Generator, *,
    radius: tuple[float, float] = (0.27, 0.33), start: float = 10.0, turn: float = 20.0,
) -> Scene:  # fmt: skip
    """With a size, a path and a turn of its own. Sizes are close together, so that a shape shows in how much of a frame it fills."""
    from dataclasses import replace

    draw = generator.uniform
    return replace(
        scene, radius=draw(*radius), aside=draw(-0.6, 0.6), travel=draw(0.7, 1.0), turn=draw(-turn, turn), start=draw(-start, start),
    )  # fmt: skip


def draw_clip(scene: Scene) -> numpy.ndarray:
    """The clip, [F, H, W, 3] uint8."""
    colours = COLOURS | OTHER_COLOURS
    return paint(
        scene, colours[scene.colour], colours[scene.background], DIRECTIONS[scene.direction]
    )


def paint(
    scene: Scene, colour: tuple, background: tuple, direction: tuple[float, float]
) -> numpy.ndarray:
    """The scene in any colours and going any way, [F, H, W, 3] uint8."""
    import numpy

    size = min(scene.width, scene.height) * scene.radius
    free = (scene.width / 2 - size, scene.height / 2 - size)  # on either side of the middle
    dx, dy = direction
    frames = []
    for way in numpy.linspace(-1, 1, scene.frames()):
        along, across = way * scene.travel, scene.aside
        x = scene.width / 2 + free[0] * (along * dx + across * dy)
        y = scene.height / 2 + free[1] * (along * dy + across * dx)
        frames.append(
            draw_frame(
                scene, colour, background, (x, y), size, scene.start + scene.turn * (way + 1) / 2
            )
        )
    return numpy.stack(frames)


def draw_frame(
    scene: Scene,
    colour: tuple,
    background: tuple,
    centre: tuple[float, float],
    size: float,
    angle: float,
) -> numpy.ndarray:
    """A frame, [H, W, 3] uint8; centre and size in pixels, angle in degrees."""
    import numpy
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (scene.width * FINE, scene.height * FINE), background)
    pen, (x, y), radius = ImageDraw.Draw(image), (centre[0] * FINE, centre[1] * FINE), size * FINE
    if scene.shape in ("square", "triangle"):
        pen.regular_polygon(
            ((x, y), radius), {"square": 4, "triangle": 3}[scene.shape], rotation=angle, fill=colour
        )
    elif scene.shape == "cross":
        pen.polygon(cross(x, y, radius, numpy.deg2rad(angle)), fill=colour)
    else:
        pen.circle((x, y), radius, fill=colour)
        if scene.shape == "ring":
            pen.circle((x, y), radius * HOLE, fill=background)
    return numpy.asarray(image.resize((scene.width, scene.height), Image.Resampling.BOX))


def cross(x: float, y: float, radius: float, angle: float) -> list[tuple[float, float]]:
    """The twelve corners of a plus sign."""
    import numpy

    arm = ARM * radius
    quarter = [(arm, -radius), (arm, -arm), (radius, -arm)]
    corners = []
    for turn in range(4):
        cosine, sine = (
            numpy.cos(angle + turn * numpy.pi / 2),
            numpy.sin(angle + turn * numpy.pi / 2),
        )
        corners += [(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in quarter]
    return corners


def render_clips(folder: Path, clips: list[Scene], name: str) -> Path:
    """A folder with these clips as mp4, prompts.txt and videos.txt, rendered unless it is there."""
    return filled(folder / name, lambda partial: render_scenes(partial, clips))


def render_scenes(folder: Path, clips: list[Scene]) -> None:
    from cogvx.data.mp4 import write_video
    from cogvx.progress import bar

    names = [f"videos/{number:04d}.mp4" for number in range(1, len(clips) + 1)]
    pairs = zip(names, clips, strict=True)
    for name, scene in bar(
        pairs, total=len(clips), desc="render", unit="clip", leave=False, disable=len(clips) < 100
    ):
        write_video(folder / name, draw_clip(scene), fps=scene.fps)
    (folder / "prompts.txt").write_text(
        "".join(f"{scene.caption()}\n" for scene in clips), encoding="utf-8"
    )
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


FORM = re.compile(r"\bA (\w+) (\w+) moves (\w+) over a (\w+) background\b")


def parse_caption(prompt: str) -> dict[str, str]:
    """What a prompt in the form of Scene.caption() asks for: colour (by its name there), shape, direction, background; {} for others."""
    found = FORM.search(prompt)
    return (
        {}
        if found is None
        else dict(zip(("colour", "shape", "direction", "background"), found.groups(), strict=True))
    )
