"""A clip or a picture made to do harm costs one clip: not the machine's memory, not other files."""

import http.server
import io
import struct
import threading
import zlib
from fractions import Fraction

import av
import numpy
import pytest
from PIL import Image

from cogvx.data import decoders, footage
from cogvx.data.buckets import Size
from cogvx.data.cuts import Cut
from cogvx.data.decoders import decoded_frames, surveyed
from cogvx.data.footage import BadClip
from cogvx.data.sources import Reshape
from cogvx.data.video import fitted_to, read_image


def png(width, height, rows=b""):
    """A PNG whose header says this size."""

    def part(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", header)
        + part(b"IDAT", zlib.compress(rows))
        + part(b"IEND", b"")
    )


def gif(width, height):
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"


def webp(width, height):
    """An animated one: the size of its canvas stands in VP8X, in 24 bits, less one."""
    canvas = bytes([0x02, 0, 0, 0])
    canvas += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    parts = b"VP8X" + struct.pack("<I", 10) + canvas
    parts += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    parts += b"ANMF" + struct.pack("<I", 16) + bytes(16)
    return b"RIFF" + struct.pack("<I", 4 + len(parts)) + b"WEBP" + parts


def film(tmp_path, width, height, packets):
    """A film whose header says this size."""
    path = tmp_path / "film.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        for number, content in enumerate(packets):
            packet = av.Packet(content)
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base, packet.is_keyframe = Fraction(1, 8), True
            container.mux(packet)
    return path


def refusal(path, seconds=20, gigabytes=1.0):
    with pytest.raises(BadClip) as refused:
        found = surveyed(path, seconds, gigabytes)
        decoded_frames(found, [0, len(found.times) - 1], seconds, gigabytes)
    return str(refused.value)


def test_pictures_of_a_billion_pixels_are_not_decoded(tmp_path):
    bombs = {
        "png.png": png(60000, 60000),
        "gif.gif": gif(65535, 65535),
        "webp.webp": webp(16384, 16384),
    }
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name)
        cut = Cut(Size(9, 64, 96), 0)
        with pytest.raises(
            BadClip, match=r"has an image, .*(at most 67 million pixels|exceeds limit)"
        ):
            read_image(tmp_path / name, None, tmp_path, cut)


def test_frames_that_are_too_large_are_refused_before_one_is_decoded(
    tmp_path, make_clip, monkeypatch
):
    path = make_clip(tmp_path / "a.mp4", width=128, height=128)
    monkeypatch.setattr(footage, "MOST_PIXELS", 64 * 64)
    monkeypatch.setattr(footage, "decoded", None)
    with pytest.raises(BadClip, match="has frames of 128x128, too large to be read"):
        footage.survey(path)


def test_a_file_that_needs_more_memory_than_allowed_is_left_out_and_the_next_is_read(
    tmp_path, make_clip
):
    whole = make_clip(tmp_path / "whole.mp4")
    written = io.BytesIO()
    Image.new("RGB", (2048, 2048)).save(written, format="PNG")
    path = film(tmp_path, 2048, 2048, [written.getvalue()] * 2)
    assert refusal(path, gigabytes=0.005) == decoders.NEEDS_MEMORY
    assert "data.decode_gigabytes" in decoders.NEEDS_MEMORY
    assert len(decoded_frames(surveyed(whole, 20, 0.5), [0, 4], 20, 0.5)) == 2
    assert decoded_frames(surveyed(path, 60, 1), [0, 1], 60, 1).shape == (2, 2048, 2048, 3)
    # The frames of a clip are in memory together.
    with pytest.raises(BadClip, match="needs too much memory"):
        decoders.require_room(81, (4320, 7680, 3), 7.0)
    decoders.require_room(81, (4320, 7680, 3), 8.0)


def test_a_film_of_too_many_frames_is_refused(tmp_path, make_clip, monkeypatch):
    path = make_clip(tmp_path / "a.mp4", frames=20)
    monkeypatch.setattr(footage, "MOST_FRAMES", 10)
    with pytest.raises(BadClip, match="has more than 0 million frames: cut it into parts"):
        footage.survey(path)


@pytest.mark.parametrize(("shape", "aspect"), [((8, 80_000), 1.0), ((8, 8), 60_000.0)])
def test_a_shape_that_scaling_would_make_endless_is_refused(shape, aspect, tmp_path):
    pixels = numpy.zeros((1, *shape, 3), numpy.uint8)
    with pytest.raises(BadClip, match="one side may be 100 times as long as the other"):
        fitted_to(Cut(Size(1, 480, 720), 0), pixels, Reshape.center, tmp_path, aspect)


@pytest.fixture
def listener():
    """A server that nobody should ask; the paths that were asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield asked, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


LISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
    "m3u8 of files": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{file}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile '{file}'\n",
    "concat of the network": "ffconcat version 1.0\nfile '{url}'\n",
    "sdp": "\nv=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "dash": '<?xml version="1.0"?><MPD><Period><BaseURL>{url}</BaseURL></Period></MPD>',
    "smil": '<smil><body><video src="{url}"/></body></smil>',
    "svg": '<svg xmlns:l="http://www.w3.org/1999/xlink"><image l:href="{url}"/></svg>',
    "vobsub": "# VobSub index file, v7\nid: en, index: 0\ntimestamp: 00:00:00:000, filepos: 0\n",
    "text": "{url}",
}


@pytest.mark.parametrize("ending", [".mp4", ".m3u8"])
def test_a_list_of_other_files_is_no_clip_and_nothing_is_fetched(
    ending, tmp_path, make_clip, listener
):
    asked, url = listener
    file = make_clip(tmp_path / "secret.mp4")
    for kind, text in LISTS.items():
        path = tmp_path / f"clip{ending}"
        path.write_text(text.format(url=url, file=file))
        assert refusal(path), kind
    assert asked == []


def test_a_name_that_counts_opens_no_other_files_and_one_that_is_an_address_is_a_file(
    tmp_path, make_clip
):
    # FFmpeg would read f1.png and the following in its place.
    for number in (1, 2, 3):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"f{number}.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "f%d.png")
    assert refusal(tmp_path / "f%d.png").endswith("(no format that is read here)")
    for name in ("-y.mp4", "concat:a|b.mp4", "http:x.mp4", "pipe:0"):
        assert len(surveyed(make_clip(tmp_path / name), 20).times) == 16


def test_only_these_formats_are_opened():
    assert not {"hls", "concat", "sdp", "rtsp", "image2", "lavfi", "dash", "vobsub"} & {
        name for names in footage.FORMATS for name in names.split(",")
    }
    for names in footage.FORMATS:
        assert names.split(",")[0] in av.formats_available, names


def test_a_picture_for_which_pillow_would_start_a_program_is_none(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(BadClip, match="that is no picture"):
        read_image(path, None, tmp_path, Cut(Size(9, 64, 96), 0))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_many_streams_and_attachments_are_left_alone(name, tmp_path):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=8) for _ in range(20)]
        for number, stream in enumerate(streams):
            stream.width = stream.height = 64 if number == 7 else 32
            stream.pix_fmt = "yuv420p"
        for stream in streams:
            for _ in range(2):
                blank = numpy.zeros((stream.height, stream.width, 3), numpy.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(blank)))
            container.mux(stream.encode())
    found = surveyed(path, 20, 1)
    assert (found.stream, found.width, len(found.times)) == (7, 64, 2)
