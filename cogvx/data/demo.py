"""The demo's clips: shapes that move and turn over a background, rendered once into a folder in the small format.

Each of them differs in size, frame rate or length, as found clips do. The same files on every machine with the same ffmpeg.
"""

from dataclasses import dataclass
from pathlib import Path

from cogvx.data.cache import filled

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
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Scene:
    shape: str  # circle, square or triangle
    colour: str
    background: str
    direction: str
    width: int = 128  # pixels
    height: int = 128
    fps: int = 16
    seconds: float = 2.0

    def caption(self) -> str:
        return f"A {self.colour} {self.shape} moves {self.direction} over a {self.background} background."


SCENES = [
    Scene("circle", "red", "blue", "right"),
    Scene("square", "yellow", "purple", "left", width=176),
    Scene("triangle", "white", "green", "up", fps=24),
    Scene("circle", "orange", "grey", "down", height=160),
    Scene("square", "green", "white", "right", seconds=1.5),
    Scene("triangle", "purple", "yellow", "left", fps=8, seconds=3),
    Scene("circle", "white", "red", "up", width=160, height=90, fps=30),
    Scene("square", "blue", "orange", "down", fps=12),
    Scene("triangle", "red", "white", "right", height=176),
    Scene("circle", "green", "purple", "left", fps=25),
    Scene("square", "purple", "grey", "up", width=168, height=126),
    Scene("triangle", "yellow", "blue", "down", seconds=2.5),
]


NAME = "demo_1"  # of the folder: another one when the scenes change


def render(folder: Path) -> Path:
    """The folder with the clips, prompts.txt and videos.txt, rendered unless it is there."""
    return filled(folder, render_scenes)


def render_scenes(folder: Path) -> None:
    from cogvx.data.video import write_video

    names = [f"videos/{number:02d}.mp4" for number in range(1, len(SCENES) + 1)]
    for name, scene in zip(names, SCENES, strict=True):
        write_video(folder / name, draw(scene), fps=scene.fps)
    (folder / "prompts.txt").write_text("".join(f"{scene.caption()}\n" for scene in SCENES), encoding="utf-8")
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def draw(scene: Scene) -> list:
    """The frames, [H, W, 3] uint8 each."""
    import numpy
    from PIL import Image, ImageDraw

    frames, count, fine = [], round(scene.fps * scene.seconds), 4
    size = min(scene.width, scene.height) / 4
    dx, dy = DIRECTIONS[scene.direction]
    for frame in range(count):
        way = frame / (count - 1) - 0.5  # -0.5 ... 0.5 of the free path
        x = scene.width / 2 + dx * way * (scene.width - 2 * size)
        y = scene.height / 2 + dy * way * (scene.height - 2 * size)
        image = Image.new("RGB", (scene.width * fine, scene.height * fine), COLOURS[scene.background])
        pen, centre, radius = ImageDraw.Draw(image), (x * fine, y * fine), size * fine
        if scene.shape == "circle":
            pen.circle(centre, radius, fill=COLOURS[scene.colour])
        else:
            sides = {"square": 4, "triangle": 3}[scene.shape]
            pen.regular_polygon((centre, radius), sides, rotation=60 * way, fill=COLOURS[scene.colour])
        frames.append(numpy.asarray(image.resize((scene.width, scene.height), Image.Resampling.BOX)))
    return frames
