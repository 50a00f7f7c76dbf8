"""Writes frames to an mp4 file that every browser plays."""

from pathlib import Path

from cogvx.files import replacing


def write_video(path: Path, frames, fps: float) -> None:
    """frames: [F, H, W, 3] uint8. The same frames give the same bytes."""
    import imageio.v3

    quality, one_thread = ["-crf", "12"], ["-threads", "1"]
    same_bytes = ["-fflags", "+bitexact", "-flags:v", "+bitexact"]
    with replacing(path) as partial:
        imageio.v3.imwrite(
            partial,
            list(frames),
            plugin="FFMPEG",
            extension=".mp4",
            fps=fps,
            codec="libx264",
            # Every browser plays H.264 with 4:2:0 colour. That needs even sizes.
            pixelformat="yuv420p",
            macro_block_size=2,
            output_params=[*quality, *one_thread, *same_bytes, "-f", "mp4"],
            ffmpeg_log_level="error",
        )
