"""The demo's clips: shapes that move from the top left to the bottom right, which none does in the little world of model=nano, under
a name that no caption there has; and as many as in that world, so that it is not forgotten.

They differ in size, frame rate and length, as found clips do.
"""

import itertools
import random
from dataclasses import replace
from pathlib import Path

from cogvx.data import world
from cogvx.data.world import Scene

NAME = "demo_3"  # of the folder: another one when the scenes change
TOKEN, MEANS = "ZORB", "diagonal"  # what the direction is called, and what it is
TAUGHT, OTHERS = 16, 16  # clips
FILES = ({"fps": 8}, {"fps": 16, "width": 176}, {"fps": 24}, {"fps": 12, "seconds": 1.25, "height": 160}, {"fps": 25, "width": 160, "height": 120})  # fmt: skip


def zorb(scene: Scene) -> Scene:
    """From corner to corner, whatever the scene's own way is."""
    return replace(scene, direction=MEANS, name=TOKEN, radius=0.27, aside=0.0, travel=1.0)


def scenes() -> list[Scene]:
    taught, others = map(zorb, even(TAUGHT, seed=11)), even(OTHERS, seed=12)
    mixed = [scene for pair in zip(taught, others, strict=True) for scene in pair]
    return [replace(scene, **FILES[number % len(FILES)]) for number, scene in enumerate(mixed)]


def even(count: int, seed: int) -> list[Scene]:
    """Of the world, spread evenly over shapes and directions."""
    found, left = [], world.scenes(672, seed=seed)
    kinds = itertools.cycle(itertools.product(world.DIRECTIONS, world.SHAPES))
    for kind in itertools.islice(kinds, count):
        found.append(next(scene for scene in left if (scene.direction, scene.shape) == kind))
        left.remove(found[-1])
    return found


def render(folder: Path) -> Path:
    return world.render(folder, scenes(), NAME)


def scored_prompts(count: int) -> dict[str, list[str]]:
    """Prompts whose videos can be judged on their pixels, none of which is a clip's caption: `count` for what is taught, and as many for
    the world without it."""
    kinds = itertools.product(world.SHAPES, world.COLOURS, world.COLOURS)
    captions = [zorb(Scene(*kind, direction=MEANS)).caption() for kind in kinds if kind[1] != kind[2]]
    shown = {scene.caption() for scene in scenes()}
    new = [caption for caption in captions if caption not in shown]
    return {
        "taught": random.Random(0).sample(new, count),
        "other": [c for c in (scene.caption() for scene in world.scenes(2 * count, seed=2)) if c not in shown][:count],
    }
