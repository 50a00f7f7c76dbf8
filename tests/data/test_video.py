"""Frames are chosen by timestamp and never stretched. Bad files are named."""

import subprocess

import imageio.v3
import imageio_ffmpeg
import numpy
import pytest

from cogvx.data.decoders import decoded_frames
from cogvx.data.footage import survey
from cogvx.data.video import BadClip, by_timestamp, read_clip


def data_of(compose, *overrides):
    return compose(*overrides).data


def test_frames_are_those_shown_at_each_moment():
    at_25 = [i / 25 for i in range(50)]  # 2 seconds
    assert by_timestamp(at_25, 25, 99) == list(range(50))
    assert by_timestamp(at_25, 12.5, 99) == list(range(0, 50, 2))
    assert by_timestamp(at_25, 8, 5) == [0, 3, 6, 9, 12]  # 0, 0.125, 0.25, 0.375, 0.5 seconds
    assert by_timestamp(at_25, 50, 5) == [0, 0, 1, 1, 2]
    assert by_timestamp(at_25, None, 7) == list(range(7))


def test_playback_speed_is_kept_for_uneven_frame_rates():
    stamps = [0, 0.1, 0.2, 1.0, 1.1, 1.2]
    assert by_timestamp(stamps, 10, 99) == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fps", "expected"), [(8, range(0, 90, 10)), (16, range(0, 45, 5)), (4, range(0, 180, 20))]
)
def test_a_clip_is_resampled_by_time(compose, make_clip, tmp_path, fps, expected):
    path = make_clip(tmp_path / "clip.mp4", frames=25, fps=8)
    clip = read_clip(path, data_of(compose, f"data.fps={fps}"))
    shown = ((clip.frames.mean(dim=(1, 2, 3)) + 1) * 127.5).tolist()
    times_8_fps = [round(value / 10) for value in shown]
    assert times_8_fps == [int(i * 8 / fps + 1e-6) for i in range(9)]
    assert clip.frames.shape == (9, 3, 64, 64)


def test_skipped_frames_are_skipped(compose, make_clip, tmp_path):
    path = make_clip(tmp_path / "clip.mp4", frames=16, fps=8)
    clip = read_clip(path, data_of(compose, "data.skip_frames_start=3", "data.skip_frames_end=2"))
    assert clip.indices == list(range(3, 12))
    with pytest.raises(BadClip, match="none is left after skipping"):
        read_clip(path, data_of(compose, "data.skip_frames_start=10", "data.skip_frames_end=10"))


def test_frames_are_4k_plus_1(compose, make_clip, tmp_path):
    data = data_of(compose)
    assert len(read_clip(make_clip(tmp_path / "8.mp4", frames=8), data).indices) == 5
    assert len(read_clip(make_clip(tmp_path / "30.mp4", frames=30), data).indices) == 9
    with pytest.raises(BadClip, match=r"too short: 4 frames at 8.0 fps"):
        read_clip(make_clip(tmp_path / "4.mp4", frames=4), data)


@pytest.mark.parametrize(("width", "height"), [(256, 128), (128, 256), (128, 128), (132, 240)])
def test_frames_are_cropped_never_stretched(compose, tmp_path, width, height):
    """A circle stays as wide as it is high, in every format."""
    y, x = numpy.mgrid[:height, :width]
    inside = (x - width / 2) ** 2 + (y - height / 2) ** 2 < 40**2
    picture = numpy.where(inside[..., None], 255, 0).astype(numpy.uint8).repeat(3, axis=2)
    imageio.v3.imwrite(
        tmp_path / "c.mp4", [picture] * 9, plugin="FFMPEG", fps=8, macro_block_size=2
    )
    frame = read_clip(tmp_path / "c.mp4", data_of(compose)).frames[4, 0] > 0
    wide, high = frame.any(dim=0).sum().item(), frame.any(dim=1).sum().item()
    assert abs(wide - high) <= 1 and 15 < wide < 45
    assert abs(frame.any(dim=0).nonzero().float().mean() - 31.5) < 1


@pytest.mark.slow
def test_clips_are_read_as_ffmpeg_reads_them(tmp_path):
    """Another FFmpeg than ours. Pixels, order and number of frames must be the same."""
    for number, (width, height) in enumerate([(176, 144), (320, 240), (162, 90), (128, 226)]):
        noise = numpy.random.default_rng(number).integers(
            0, 255, (9, height, width, 3), dtype=numpy.uint8
        )
        imageio.v3.imwrite(tmp_path / "n.mp4", noise, plugin="FFMPEG", fps=8, macro_block_size=2)
        ours = decoded_frames(survey(tmp_path / "n.mp4"), list(range(9)), 60)
        theirs = imageio.v3.imread(tmp_path / "n.mp4", plugin="FFMPEG")
        assert ours.shape == theirs.shape == noise.shape
        assert numpy.abs(ours.astype(int) - theirs).mean() < 2


@pytest.mark.slow
def test_a_small_width_is_read_right(make_clip, tmp_path, compose):
    data = data_of(compose)
    wide = read_clip(make_clip(tmp_path / "wide.mp4", width=128), data).frames
    for width in range(8, 168, 8):
        frames = read_clip(make_clip(tmp_path / f"{width}.mp4", width=width), data).frames
        assert frames.shape == wide.shape and (frames - wide).abs().max() < 0.03, width


def test_broken_files_are_named(compose, make_clip, tmp_path):
    data, whole = (
        data_of(compose),
        make_clip(tmp_path / "whole.mp4", frames=60, width=320, height=240),
    )
    for name, content, said in (
        ("empty.mp4", b"", "is empty"),
        ("text.mp4", b"not a video " * 100, "cannot be opened as a video"),
        ("cut.mp4", whole.read_bytes()[: whole.stat().st_size // 2], "is cut off"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadClip, match=said):
            read_clip(tmp_path / name, data)


def test_a_file_cut_in_its_frames_is_named(compose, tmp_path):
    """The index is at the front: the decoder would return fewer frames without an error."""
    noise = numpy.random.default_rng(0).integers(0, 255, (60, 128, 128, 3), dtype=numpy.uint8)
    imageio.v3.imwrite(tmp_path / "a.mp4", noise, plugin="FFMPEG", fps=8, macro_block_size=2)
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-loglevel",
        "error",
        "-i",
        str(tmp_path / "a.mp4"),
        "-c",
        "copy",
    ]
    subprocess.run([*command, "-movflags", "+faststart", str(tmp_path / "b.mp4")], check=True)
    whole = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) * 2 // 5])
    with pytest.raises(
        BadClip,
        match=f"is cut off: the last {len(whole) - len(whole) * 2 // 5} of its {len(whole)} bytes",
    ):
        read_clip(tmp_path / "b.mp4", data_of(compose, "data.max_num_frames=49"))
