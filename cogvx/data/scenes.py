"""Where a file jumps from one scene to the next. Found by PySceneDetect."""

from __future__ import annotations

from collections.abc import Iterator

from cogvx.data.footage import Footage, shown_frames

# PySceneDetect shrinks frames to about this width before it compares them.
COMPARED_WIDTH = 256


def jumps(footage: Footage, threshold: float) -> Iterator[int]:
    """The number of each frame that begins a new scene. The first frame of the file is not named.

    threshold: a scene ends where hue, saturation and brightness (0 to 255) change by more from one
    frame to the next, on average over the picture. BadClip if the file is damaged.
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
