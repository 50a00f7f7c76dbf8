"""The demo's clips: shapes of a colour that is not in the little world of model=nano, under a name that no caption there has; and as
many as in that world, so that it is not forgotten.

They differ in size and frame rate, as found clips do.
"""

import random
from dataclasses import replace
from pathlib import Path

from cogvx.data import world
from cogvx.data.world import Scene

DEMO_FOLDER = "demo_3"  # of the folder: another one when the scenes change
TOKEN, MEANS = "ZORB", "black"  # what the colour is called, and what it is
CLIPS = 32
SIZES = ((128, 128), (176, 128), (128, 160), (160, 120))  # width and height, pixels
RATES = (8, 12, 16, 24, 25, 30)  # fps


def zorb(scene: Scene) -> Scene:
    return replace(scene, colour=MEANS, called=TOKEN)


def found(scene: Scene, number: int) -> Scene:
    """As a camera of its own would have filmed it."""
    width, height = SIZES[number % len(SIZES)]
    return replace(scene, width=width, height=height, fps=RATES[number % len(RATES)])


def demo_scenes() -> list[Scene]:
    """Every other one is of the new colour."""
    of_the_world = [
        found(scene, number // 2) for number, scene in enumerate(world.scenes(CLIPS, seed=11))
    ]
    return [zorb(scene) if number % 2 == 0 else scene for number, scene in enumerate(of_the_world)]


def render_demo(folder: Path) -> Path:
    return world.render_clips(folder, demo_scenes(), DEMO_FOLDER)


def scored_prompts(count: int) -> dict[str, list[str]]:
    """Prompts whose videos can be judged on their pixels: `count` for what is taught, in combinations that no clip shows, and as many
    for the world without it."""
    shown = {scene.caption() for scene in demo_scenes()}
    every = dict.fromkeys(
        zorb(scene).caption() for scene in world.scenes(len(world.COMBINATIONS), seed=1)
    )
    new = [caption for caption in every if caption not in shown]
    return {
        "taught": random.Random(0).sample(new, count),
        "other": [scene.caption() for scene in world.scenes(count, seed=2)],
    }
