"""Where a file jumps from one scene to the next. Found by PySceneDetect."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from cogvx.data.cache import Cache, claimed, content_key
from cogvx.data.footage import Footage, shown_frames, survey
from cogvx.files import write_text
from cogvx.progress import heartbeat

VERSION_OF_SCENES = 1  # raise it when a change finds other scenes in the same file
# PySceneDetect shrinks frames to about this width before it compares them.
COMPARED_WIDTH = 256


def scenes_of(path: Path, threshold: float, cache: Cache) -> list[tuple[int, int]]:
    """The first frame of each scene, and the one after its last. Remembered in the cache.

    threshold: a scene ends where hue, saturation and brightness (0 to 255) change by more from one
    frame to the next, on average over the picture. BadClip if the file cannot be used.
    """
    key = content_key(VERSION_OF_SCENES, cache.fingerprint(path), threshold)
    remembered = cache.folder / "scenes" / f"{key}.json"
    with claimed(remembered, wait=True):
        with contextlib.suppress(OSError, ValueError):
            return [(start, end) for start, end in json.loads(remembered.read_text())]
        with heartbeat(f"scenes  still looking for scenes in {path.name}"):
            footage = survey(path)
            starts = [0, *jumps(footage, threshold)]
        found = list(zip(starts, [*starts[1:], len(footage.times)], strict=True))
        write_text(remembered, json.dumps(found))
    return found


def jumps(footage: Footage, threshold: float) -> Iterator[int]:
    """The number of each frame that begins a new scene.

    PySceneDetect gets the frames that training gets. Its own way of reading counts others in some
    files.
    """
    from scenedetect import ContentDetector, FrameTimecode

    # Without a shortest scene: it would join short scenes with their neighbours.
    detector = ContentDetector(threshold, min_scene_len=0)
    numbers = {time: number for number, time in enumerate(footage.times)}
    for time, frame in shown_frames(footage):
        if time not in numbers:
            continue
        width = min(COMPARED_WIDTH, frame.width)
        height = max(1, round(frame.height * width / frame.width))
        pixels = frame.to_ndarray(format="bgr24", width=width, height=height)
        # The rate is not used: without a shortest scene no time is measured.
        at = FrameTimecode(numbers[time], fps=25.0)
        yield from (found.frame_num for found in detector.process_frame(at, pixels))
