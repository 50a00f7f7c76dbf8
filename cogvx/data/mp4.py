"""Frames to an mp4 file that every browser plays."""

from pathlib import Path


def write_video(path: Path, frames, fps: float) -> None:
    """An mp4 of frames [H, W, 3] uint8, playable in browsers."""
    import imageio.v3

    path.parent.mkdir(parents=True, exist_ok=True)
    # H.264 with 4:2:0 colour is what every browser plays; macro_block_size 2 because that format wants even sizes.
    imageio.v3.imwrite(
        path,
        list(frames),
        plugin="FFMPEG",
        fps=fps,
        codec="libx264",
        pixelformat="yuv420p",
        macro_block_size=2,
        output_params=[
            "-crf",
            "12",
            "-threads",
            "1",
            "-fflags",
            "+bitexact",
            "-flags:v",
            "+bitexact",
        ],
        ffmpeg_log_level="error",
    )
