"""The demo's clips: shapes that move from the top left to the bottom right, which none does in the little world of model=nano, under
a name that no caption there has; and a few as in that world, so that it is not forgotten.

Each of them differs in size, frame rate or length, as found clips do.
"""

import itertools
import random
from pathlib import Path

from cogvx.data import world
from cogvx.data.world import Scene

NAME = "demo_2"  # of the folder: another one when the scenes change
TOKEN, MEANS = "ZORB", "diagonal"  # what the direction is called, and what it is


def zorb(shape: str, colour: str, background: str, **other) -> Scene:
    return Scene(shape, colour, background, MEANS, name=TOKEN, **other)


SCENES = [
    zorb("circle", "red", "blue", fps=16),
    zorb("square", "yellow", "purple", width=176),
    zorb("triangle", "white", "green", fps=24, radius=0.28),
    Scene("circle", "blue", "white", "left", fps=16),
    zorb("circle", "orange", "grey", height=160),
    zorb("square", "green", "white", fps=12, seconds=1.25),
    Scene("square", "red", "grey", "up", width=176),
    zorb("triangle", "purple", "yellow", radius=0.22),
    Scene("triangle", "green", "orange", "right", fps=24),
    zorb("circle", "white", "red", width=160, height=120, fps=30),
    zorb("square", "blue", "orange", fps=25, seconds=1.2, radius=0.28),
    Scene("circle", "yellow", "purple", "down", height=160),
]


def render(folder: Path) -> Path:
    return world.render(folder, SCENES, NAME)


def scored_prompts(count: int) -> dict[str, list[str]]:
    """Prompts whose videos can be judged on their pixels: `count` for what is taught, in combinations that no clip shows, and as many
    for the world without it."""
    kinds = itertools.product(world.SHAPES, world.COLOURS, world.COLOURS)
    captions = [zorb(*kind).caption() for kind in kinds if kind[1] != kind[2]]
    shown = {scene.caption() for scene in SCENES}
    new = [caption for caption in captions if caption not in shown]
    return {
        "taught": random.Random(0).sample(new, count),
        "other": [scene.caption() for scene in world.scenes(count, seed=2)],
    }
