"""The size that each clip is trained at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cogvx.data.sources import Data


@dataclass(frozen=True)
class Size:
    frames: int  # at most
    height: int  # pixels
    width: int  # pixels


def size_for(data: Data) -> Size:
    """The size that data.max_num_frames, data.height and data.width name."""
    return Size(data.max_num_frames, data.height, data.width)
