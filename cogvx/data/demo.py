"""The demo's clips: a ring, which the little world of model=nano does not have, under a name that no caption there has.

Each of them differs in size, frame rate or length, as found clips do.
"""

import itertools
import random
from pathlib import Path

from cogvx.data import world
from cogvx.data.world import Scene

NAME = "demo_2"  # of the folder: another one when the scenes change
TOKEN = "ZORB"  # what the ring is called


def ring(colour: str, background: str, direction: str, **other) -> Scene:
    return Scene("ring", colour, background, direction, name=TOKEN, **other)


SCENES = [
    ring("red", "blue", "right", fps=16),
    ring("yellow", "purple", "left", width=176, aside=0.3),
    ring("white", "green", "up", fps=24, seconds=1.25, radius=0.3),
    ring("orange", "grey", "down", height=160, aside=-0.4),
    ring("green", "white", "right", fps=12, seconds=1.25, aside=0.5),
    ring("purple", "yellow", "left", radius=0.22),
    ring("white", "red", "up", width=160, height=90, fps=30, seconds=1.2),
    ring("blue", "orange", "down", fps=16, aside=0.2, radius=0.28),
    ring("red", "white", "down", height=176, aside=-0.3),
    ring("green", "purple", "up", fps=25, seconds=1.2),
    ring("grey", "yellow", "right", width=168, height=126, aside=-0.5),
    ring("blue", "grey", "left", seconds=1.25, radius=0.3),
]


def render(folder: Path) -> Path:
    return world.render(folder, SCENES, NAME)


def scored_prompts(count: int) -> dict[str, list[str]]:
    """Prompts whose videos can be judged on their pixels: `count` for the ring, in colours and ways that no clip shows together,
    and as many for the world without it."""
    rings = [
        ring(*kind).caption()
        for kind in itertools.product(world.COLOURS, world.COLOURS, world.DIRECTIONS)
        if kind[0] != kind[1]
    ]
    shown = {scene.caption() for scene in SCENES}
    new = [caption for caption in rings if caption not in shown]
    return {
        "taught": random.Random(0).sample(new, count),
        "other": [scene.caption() for scene in world.scenes(count, seed=2)],
    }
