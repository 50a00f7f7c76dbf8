"""What can be measured of a clip's frames: whether something moves, hard cuts, black bars.

F frames, C channels, H height, W width.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from cogvx.data.video import Clip

# Frames are measured at this size, so that the noise of compression is averaged away.
MEASURED_SIDE = 64  # pixels of the longer side
# Levels of 0 to 255. A pixel moves if it changes by more than this within the clip.
MOVES = 12
# A cut: the mean change from a frame to the next is this large, and so many times the usual one.
LEAST_JUMP, TIMES_USUAL = 16, 4
# A row or column is black if 99 % of its pixels are below this in every frame that is looked at.
BLACK, LOOKED_AT = 20, 9
# The clip on the page of the data.
PREVIEW, QUALITY = 160, "28"  # pixels of the longer side; x264's crf


def measured(clip: Clip) -> dict[str, object]:
    """moving: the share of pixels that change; None for one frame.

    jumps: the file's frames before which there is a hard cut. bars: black rows at the top and
    bottom, black columns at the left and right.
    """
    small = shrunk(clip.frames, MEASURED_SIDE)
    jumps = [clip.indices[place] for place in hard_cuts(small)]
    return {"moving": moving(small), "jumps": jumps, "bars": black_bars(clip.frames)}


def shrunk(frames: Tensor, side: int) -> Tensor:
    """[F, C, H, W] in [-1, 1] -> [F, C, h, w] in 0 to 255. Sides are even."""
    import torch.nn.functional as F

    scale = min(1.0, side / max(frames.shape[2:]))
    size = [max(2, round(length * scale / 2) * 2) for length in frames.shape[2:]]
    return (F.interpolate(frames, size, mode="area") + 1) * 127.5


def moving(small: Tensor) -> float | None:
    """small: [F, C, h, w] in 0 to 255."""
    if len(small) == 1:
        return None
    change = (small.amax(0) - small.amin(0)).amax(0)  # [h, w]
    return round((change > MOVES).float().mean().item(), 4)


def hard_cuts(small: Tensor) -> list[int]:
    """The frames that begin a new scene. small: [F, C, h, w] in 0 to 255."""
    import numpy

    change = (small[1:] - small[:-1]).abs().mean((1, 2, 3)).numpy()
    # A frame that is shown twice says nothing of how fast things move.
    usual = numpy.median(change[change > 0]) if len(change) > 3 and change.any() else 0.0
    return [
        place + 1
        for place, found in enumerate(change.tolist())
        if found >= max(LEAST_JUMP, TIMES_USUAL * usual)
    ]


def black_bars(frames: Tensor) -> list[int]:
    """Pixels at the top, bottom, left and right. All 0 for a black picture."""
    import torch

    step = max(1, len(frames) // LOOKED_AT)
    brightest = ((frames[::step].amax((0, 1)) + 1) * 127.5).float()  # [H, W]
    sides = []
    for picture in (brightest, brightest.T):
        black = torch.quantile(picture, 0.99, dim=1) < BLACK
        if black.all():
            return [0, 0, 0, 0]
        lit = black.logical_not().nonzero()
        sides += [int(lit[0]), len(black) - 1 - int(lit[-1])]
    return sides


def preview(clip: Clip, fps: float) -> numpy.ndarray:
    """A small mp4 of the frames, as bytes."""
    import av
    import numpy

    frames = shrunk(clip.frames, PREVIEW).round().clamp(0, 255).byte()
    frames = frames.permute(0, 2, 3, 1).contiguous().numpy()  # [F, h, w, C]
    written = io.BytesIO()
    with av.open(written, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=max(1, round(fps)))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"crf": QUALITY, "preset": "veryfast", "threads": "1"}
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return numpy.frombuffer(written.getvalue(), numpy.uint8)
