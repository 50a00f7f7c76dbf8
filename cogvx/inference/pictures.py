"""Videos beside each other, as mp4, GIF and a strip of frames.   F frames, H height, W width."""

from __future__ import annotations

from pathlib import Path

import numpy

from cogvx.files import replacing

# Pixels: lower videos are enlarged; the space between panels; the height of their titles.
SMALL, GAP, TITLE = 160, 6, 18


def side_by_side(panels: dict[str, numpy.ndarray]) -> numpy.ndarray:
    """Titles and videos [F, H, W, 3] uint8 -> one video, as long as the shortest of them."""
    from PIL import Image, ImageDraw

    from cogvx.data.lettering import font

    frames, (height, width) = min(map(len, panels.values())), next(iter(panels.values())).shape[1:3]
    times = -(-SMALL // height) if height < SMALL else 1
    size = (width * times, height * times)
    made = []
    for number in range(frames):
        sheet = Image.new("RGB", (len(panels) * (size[0] + GAP) - GAP, size[1] + TITLE), "white")
        pen = ImageDraw.Draw(sheet)
        for place, (title, video) in enumerate(panels.items()):
            left = place * (size[0] + GAP)
            pen.text((left + 2, 2), title, "black", font=font(12))
            frame = Image.fromarray(video[number]).resize(size, Image.Resampling.BICUBIC)
            sheet.paste(frame, (left, TITLE))
        made.append(numpy.asarray(sheet))
    # H.264 needs an even height and width.
    height, width = made[0].shape[0] // 2 * 2, made[0].shape[1] // 2 * 2
    return numpy.stack(made)[:, :height, :width]


def write_gif(path: Path, frames: numpy.ndarray, fps: float) -> None:
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    with replacing(path) as partial:
        pictures[0].save(
            partial,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=round(1000 / fps),
            loop=0,
        )


def write_strip(path: Path, frames: numpy.ndarray, count: int = 4) -> None:
    """`count` frames of a side_by_side() video under each other, as one picture."""
    from PIL import Image

    chosen = frames[numpy.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
    # The titles stand above the first frame only.
    rows = [chosen[0], *(frame[TITLE:] for frame in chosen[1:])]
    spaced = [numpy.pad(row, ((0, 4), (0, 0), (0, 0)), constant_values=255) for row in rows]
    with replacing(path) as partial:
        Image.fromarray(numpy.concatenate(spaced)).save(partial, format="PNG")
