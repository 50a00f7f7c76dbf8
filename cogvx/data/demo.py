"""The clips of the demo.

Half of them show a colour that model=nano has never seen, under a name that it has never read. The
others show its own little world, so that it does not forget it. The clips differ in size and frame
rate, as real ones do.
"""

import random
from dataclasses import replace
from pathlib import Path

from cogvx.data import world
from cogvx.data.world import Scene

# The folder's name. It must change when the scenes change.
DEMO_FOLDER = "demo_3"
# The new colour: its name in the captions, and what it looks like.
TOKEN, MEANS = "ZORB", "black"
CLIPS = 32
SIZES = ((128, 128), (176, 128), (128, 160), (160, 120))  # width and height, pixels
RATES = (8, 12, 16, 24, 25, 30)  # fps


def zorb(scene: Scene) -> Scene:
    """The scene in the new colour."""
    return replace(scene, colour=MEANS, called=TOKEN)


def filmed(scene: Scene, number: int) -> Scene:
    """The scene in one of the sizes and frame rates."""
    width, height = SIZES[number % len(SIZES)]
    return replace(scene, width=width, height=height, fps=RATES[number % len(RATES)])


def demo_scenes() -> list[Scene]:
    """Every second scene is in the new colour."""
    known = [
        filmed(scene, number // 2) for number, scene in enumerate(world.scenes(CLIPS, seed=11))
    ]
    return [zorb(scene) if number % 2 == 0 else scene for number, scene in enumerate(known)]


def render_demo(folder: Path) -> Path:
    return world.render_clips(folder, demo_scenes(), DEMO_FOLDER)


def scored_prompts(count: int) -> dict[str, list[str]]:
    """Prompts whose videos can be judged by their pixels, `count` of each kind.

    "taught": the new colour, in combinations that no clip shows. "other": the world without it.
    """
    shown = {scene.caption() for scene in demo_scenes()}
    every = dict.fromkeys(
        zorb(scene).caption() for scene in world.scenes(len(world.COMBINATIONS), seed=1)
    )
    new = [caption for caption in every if caption not in shown]
    return {
        "taught": random.Random(0).sample(new, count),
        "other": [scene.caption() for scene in world.scenes(count, seed=2)],
    }
