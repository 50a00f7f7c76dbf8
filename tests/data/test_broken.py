"""Broken sets and broken files: each is named in one line, nothing hangs, and the others go on."""

import gzip
import io
import os
import signal
import struct
import tarfile
import wave
import zipfile
from pathlib import Path

import av
import numpy
import pytest

from cogvx.compose import quoted
from cogvx.data.footage import BadClip, require_usual_size, survey, wanted_frames
from cogvx.data.mp4 import write_video
from cogvx.data.video import read_clip
from cogvx.errors import UserError

SECONDS = 10  # for each


@pytest.fixture(autouse=True)
def never_hangs():
    def ring(*_: object):
        raise TimeoutError(f"it hangs: more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# -- sets ----------------------------------------------------------------------------------------


def write(name: str, content: str | bytes):
    def make(root: Path) -> None:
        raw = content if isinstance(content, bytes) else content.encode()
        (root / name).write_bytes(raw)

    return make


def lists(prompts: str | bytes, videos: str | bytes):
    def make(root: Path) -> None:
        write("prompts.txt", prompts)(root)
        write("videos.txt", videos)(root)

    return make


def named(name: str, put):
    """Two lists that name one clip, and put(path) in its place."""

    def make(root: Path) -> None:
        lists("x\n", f"{name}\n")(root)
        put(root / name)

    return make


def within(name: str, put):
    return lambda root: put(root / name)


def link_to(target: str):
    return lambda path: path.symlink_to(target)


def half_a_tar(root: Path) -> None:
    with tarfile.open(root / "0.tar", "w") as archive:
        for name in ("a.mp4", "a.txt", "b.mp4", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3000
            archive.addfile(info, io.BytesIO(b"x" * 3000))
    raw = (root / "0.tar").read_bytes()
    (root / "0.tar").write_bytes(raw[: 3584 * 3 - 1000])


def unencodable(root: Path) -> None:
    open(os.fsencode(root) + b"/\xff.mp4", "w").close()


LISTS, TABLE, FOLDER, TARS = "text_files", "table", "folder", "webdataset"
SAME = "data.caption=x"
# A name, the option of data, how it is made, what is said, and further settings.
SETS = [
    (
        "a UTF-16 list",
        LISTS,
        lists("cat\n".encode("utf-16"), "a.mp4\n"),
        "prompts.txt is not UTF-8 text, but UTF-16",
    ),
    (
        "UTF-16 without its mark",
        LISTS,
        lists("cat\n".encode("utf-16-le"), "a.mp4\n"),
        "prompts.txt:1 has a zero byte",
    ),
    (
        "a Latin-1 list",
        LISTS,
        lists(b"a\nM\xfcller\n", "a.mp4\nb.mp4\n"),
        "prompts.txt:2 is not UTF-8 text (byte 0xfc)",
    ),
    (
        "a zero byte in a path",
        LISTS,
        lists("a\nb\n", "a.mp4\nb\0.mp4\n"),
        "videos.txt:2 has a zero byte",
    ),
    (
        "a caption of 12 million characters",
        LISTS,
        lists("cat " * 3_000_000, "a.mp4\n"),
        "videos.txt:1 has a caption of 11999999 characters",
    ),
    (
        "100,000 lines, the last one wrong",
        LISTS,
        lists("cat\n" * 100_000, "a.mp4\n" * 99_999 + "c.mp4\n"),
        "videos.txt:100000 names 'c.mp4'",
    ),
    (
        "a line too few",
        LISTS,
        lists("a\nb\n", "a.mp4\n"),
        "The first line without a partner is prompts.txt:2",
    ),
    (
        "a line blank in one list",
        LISTS,
        lists("a\n\nc\n", "a.mp4\nb.mp4\na.mp4\n"),
        "prompts.txt:2 is blank, but videos.txt:2",
    ),
    (
        "a list that is a folder",
        LISTS,
        within("prompts.txt", Path.mkdir),
        "prompts.txt and videos.txt not found",
    ),
    (
        "a list that is a pipe",
        LISTS,
        within("videos.txt", os.mkfifo),
        "prompts.txt and videos.txt not found",
    ),
    (
        "a clip that is a pipe",
        LISTS,
        named("f.mp4", os.mkfifo),
        "f.mp4, which is no file, but a pipe or a device",
    ),
    ("a clip that is a folder", LISTS, named("f.mp4", Path.mkdir), "f.mp4, which is a folder"),
    (
        "a link in a circle",
        LISTS,
        named("f.mp4", link_to("f.mp4")),
        "which is a link to f.mp4, where no file is",
    ),
    (
        "a link to nowhere",
        LISTS,
        named("f.mp4", link_to("gone.mp4")),
        "which is a link to gone.mp4, where no file is",
    ),
    (
        "a clip that is a device",
        LISTS,
        named("f.mp4", link_to("/dev/zero")),
        "which is no file, but a pipe or a device",
    ),
    (
        "a name too long",
        LISTS,
        lists("x\n", "a" * 5000 + ".mp4\n"),
        "is longer than the name of a file can be",
    ),
    (
        "a path outside",
        LISTS,
        lists("x\n", "../../etc/passwd\n"),
        "videos.txt:1 names '../../etc/passwd', which is outside",
    ),
    ("a path of Windows", LISTS, lists("x\n", "C:\\clips\\a.mp4\n"), "a path of another machine"),
    (
        "brackets that search for files",
        LISTS,
        lists("x\n", "[ab].mp4\n"),
        "videos.txt:1 names '[ab].mp4'",
    ),
    (
        "one bad line of JSON",
        TABLE,
        write("metadata.jsonl", '{"text": "a", "video": "a.mp4"}\n{"text": "b", \n'),
        "metadata.jsonl:2 is not JSON",
    ),
    (
        "a line that is no object",
        TABLE,
        write("metadata.jsonl", '["a.mp4"]\n'),
        "metadata.jsonl:1 is no object",
    ),
    (
        "100,000 brackets",
        TABLE,
        write("metadata.jsonl", '{"text":' + "[" * 100_000),
        "metadata.jsonl:1 is not JSON",
    ),
    (
        "brackets in a list",
        TABLE,
        write("metadata.json", "[" * 100_000),
        "metadata.json is not JSON",
    ),
    (
        "half a character",
        TABLE,
        write("metadata.jsonl", '{"text": "a \\ud800", "video": "a.mp4"}'),
        "metadata.jsonl:1 has a caption with a character that is none",
    ),
    (
        "half a character in a path",
        TABLE,
        write("metadata.jsonl", '{"text": "a", "video": "\\ud800.mp4"}'),
        "metadata.jsonl:1 has a path with a character that is none",
    ),
    (
        "a caption that is NaN",
        TABLE,
        write("metadata.jsonl", '{"text": NaN, "video": "a.mp4"}'),
        "metadata.jsonl:1 has a caption that is not text",
    ),
    (
        "a caption that is an object",
        TABLE,
        write("metadata.jsonl", '{"text": {"en": "a"}, "video": "a.mp4"}'),
        "not text, but an object",
    ),
    (
        "captions that are numbers",
        TABLE,
        write("metadata.jsonl", '{"text": [1, 2], "video": "a.mp4"}'),
        "not text, but a list: [1, 2]",
    ),
    (
        "a row without a path",
        TABLE,
        write("metadata.json", '[{"text": "a", "video": "a.mp4"}, {"text": "b"}]'),
        "metadata.json:2 has no path",
    ),
    ("an empty list of rows", TABLE, write("metadata.json", "[]"), "has no column called caption"),
    (
        "an object instead of rows",
        TABLE,
        write("metadata.json", '{"a": 1}'),
        "must be a list of objects",
    ),
    (
        "a quote mark that never ends",
        TABLE,
        write("metadata.csv", 'text,video\na,a.mp4\n"b,b.mp4\nc,a.mp4\n'),
        "metadata.csv:3 has a text that begins with a quote mark and never ends",
    ),
    (
        "semicolons",
        TABLE,
        write("metadata.csv", "text;video\na;a.mp4\n"),
        "a .csv file has commas between its columns, and this line has semicolons",
    ),
    (
        "tabs in a csv",
        TABLE,
        write("metadata.csv", "text\tvideo\na\ta.mp4\n"),
        "this line has tabs",
    ),
    (
        "two columns of one name",
        TABLE,
        write("metadata.csv", "text,text,video\na,b,a.mp4\n"),
        "metadata.csv:1 has two columns called text",
    ),
    (
        "a comma too many",
        TABLE,
        write("metadata.csv", "text,video\na, b,a.mp4\n"),
        "metadata.csv:2 has more cells",
    ),
    (
        "a cell too few",
        TABLE,
        write("metadata.csv", "video,text\na.mp4\n"),
        "metadata.csv:2 has no caption",
    ),
    (
        "a table with its header alone",
        TABLE,
        write("metadata.csv", "text,video\n"),
        "has no column called",
    ),
    ("an empty table", TABLE, write("metadata.csv", ""), "Its columns: none"),
    (
        "Excel's own format",
        TABLE,
        write("metadata.csv", b"PK\x03\x04\x14\x00"),
        "metadata.csv is not UTF-8 text, but a zip or Excel file",
    ),
    (
        "a table that is a folder",
        TABLE,
        within("metadata.csv", Path.mkdir),
        "has none: choose the file",
    ),
    (
        "a table that is a pipe",
        TABLE,
        within("metadata.csv", os.mkfifo),
        "has none: choose the file",
    ),
    (
        "half a parquet file",
        TABLE,
        write("metadata.parquet", b"PAR1" + bytes(500)),
        "cannot be read as parquet",
    ),
    (
        "a line break in a name",
        TABLE,
        lambda r: (
            write("a\nb.mp4", "")(r),
            write("metadata.csv", 'text,video\nx,"a\nb.mp4"\n')(r),
        ),
        "has a line break in its name: rename it",
    ),
    (
        "a pipe among the clips",
        FOLDER,
        within("d.mp4", os.mkfifo),
        "'d.mp4' is no file, but a pipe",
        SAME,
    ),
    (
        "a link to nowhere among the clips",
        FOLDER,
        within("d.mp4", link_to("no")),
        "'d.mp4' is a link to no, where no file is",
        SAME,
    ),
    (
        "a link in a circle among the clips",
        FOLDER,
        within("d.mp4", link_to("d.mp4")),
        "where no file is",
        SAME,
    ),
    (
        "a name that is not UTF-8",
        FOLDER,
        unencodable,
        "has a name that is not UTF-8: rename it",
        SAME,
    ),
    (
        "a line break among the names",
        FOLDER,
        write("a\nb.mp4", ""),
        r"'a\nb.mp4' has a line break in its name",
        SAME,
    ),
    ("a caption that is a folder", FOLDER, within("a.txt", Path.mkdir), "a.txt is a folder", SAME),
    (
        "a caption that is a pipe",
        FOLDER,
        within("a.txt", os.mkfifo),
        "a.txt is no file, but a pipe",
        SAME,
    ),
    (
        "a caption that is a film",
        FOLDER,
        write("a.txt", "x " * 1_000_000),
        "a.mp4 has a caption of 1999999 characters",
        SAME,
    ),
    ("a caption in Latin-1", FOLDER, write("a.txt", b"\xfc"), "a.txt:1 is not UTF-8 text", SAME),
    ("clips without captions", FOLDER, lambda root: None, "2 of 2 clips"),
    (
        "endings that no file has",
        FOLDER,
        lambda root: None,
        "no file ends in .mkv",
        "data.video_column=.mkv",
    ),
    (
        "a root that is a file",
        FOLDER,
        write("f", ""),
        "f is a file, not a folder",
        "data.instance_data_root={root}/f",
    ),
    (
        "a root with an endless name",
        FOLDER,
        lambda root: None,
        "does not exist",
        f"data.instance_data_root={'a' * 5000}",
    ),
    ("half an archive", TARS, half_a_tar, "0.tar is cut off after 1 clip"),
    (
        "a page instead of an archive",
        TARS,
        write("0.tar", "<html>" * 300),
        "0.tar is no tar archive",
    ),
    ("an empty archive", TARS, write("0.tar", ""), "0.tar is no tar archive"),
]


def test_there_are_enough_of_them():
    assert len(SETS) + len(CLIPS) >= 90
    assert len({name for name, *_ in [*SETS, *CLIPS]}) == len(SETS) + len(CLIPS)


@pytest.mark.parametrize("broken", SETS, ids=[name for name, *_ in SETS])
def test_a_broken_set_is_named(broken, compose, tmp_path):
    _, option, make, said, *settings = broken
    root = tmp_path / "set"
    root.mkdir()
    write("a.mp4", "")(root)
    write("b.mp4", "")(root)
    make(root)
    overrides = [f"data.cache_dir={tmp_path}/cache", f"data.instance_data_root={root}"]
    overrides += [each.format(root=root) for each in settings]
    typed = [quoted(each, sweeping=False) for each in overrides]
    with pytest.raises(UserError) as raised:
        compose(f"data={option}", *typed).data.read()
    # A headline and a line for each problem, or one line. All can be printed.
    assert said in str(raised.value)
    assert all(len(line.encode()) < 1000 for line in str(raised.value).splitlines())


def test_what_this_user_may_not_read_is_named(compose, tmp_path_factory):
    """Root may read everything, so the test is another user for a moment."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        root.chmod(0o755)
        lists("x\n", "a.mp4\n")(root)
        write("a.mp4", "")(root)
        (root / "a.mp4").chmod(0)
        data = compose("data=text_files", f"data.instance_data_root='{root}'").data
        os.setresuid(65534, 65534, 0)
        try:
            with pytest.raises(UserError, match=r"videos.txt:1 names 'a.mp4', which this user may"):
                data.read()
        finally:
            os.setresuid(0, 0, 0)


# -- clips ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """An mp4 file of 16 frames of noise."""
    path = tmp_path_factory.mktemp("whole") / "whole.mp4"
    noise = numpy.random.default_rng(0).integers(0, 255, (16, 64, 64, 3)).astype(numpy.uint8)
    write_video(path, list(noise), fps=8)
    return path.read_bytes()


def encoded(ending: str, codec: str, frames: int = 16, size: tuple = (64, 64), pixels="yuv420p"):
    """A film by FFmpeg, as bytes."""
    height, width = size
    target = io.BytesIO()
    with av.open(target, "w", format=ending) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for number in range(frames):
            picture = numpy.full((height, width, 3), 10 * number, numpy.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return target.getvalue()


def changed(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


def zipped() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        file.writestr("a", "b" * 100)
    return target.getvalue()


def sound() -> bytes:
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    return target.getvalue()


def noise(count: int) -> bytes:
    return numpy.random.default_rng(1).bytes(count)


CUT, KIND = "is cut off", "of another kind"
LIST_OF_FILES = "is a list of other files, and no video"
# A name, what is made of a whole mp4 file, what is said.
CLIPS = [
    ("nothing", lambda w: b"", "is empty (0 bytes)"),
    ("one byte", lambda w: b"x", KIND),
    ("a text", lambda w: b"hello world" * 20, KIND),
    ("a web page", lambda w: b"<!DOCTYPE html><html>", "it is a text file, perhaps an error page"),
    ("a JSON answer", lambda w: b'{"error": "not found"}', "it is a text file"),
    (
        "a pointer of Git LFS",
        lambda w: b"version https://git-lfs.github.com/spec/v1\n",
        "git lfs pull",
    ),
    ("noise", lambda w: noise(20_000), KIND),
    ("zeros", lambda w: bytes(20_000), KIND),
    ("a zip archive", lambda w: zipped(), KIND),
    ("a compressed mp4", gzip.compress, KIND),
    ("a sound", lambda w: sound(), "holds no video"),
    ("a playlist", lambda w: b"#EXTM3U\n#EXTINF:2,\nother.mp4\n", LIST_OF_FILES),
    (
        "a playlist of the web",
        lambda w: b"#EXTM3U\n#EXTINF:2,\nhttp://10.255.255.1/x.ts\n",
        LIST_OF_FILES,
    ),
    ("a list to join", lambda w: b"ffconcat version 1.0\nfile other.mp4\n", LIST_OF_FILES),
    (
        "an address of a stream",
        lambda w: b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        LIST_OF_FILES,
    ),
    ("half an mp4", lambda w: w[: len(w) // 2], CUT),
    ("the first 40 bytes", lambda w: w[:40], "cannot be opened as a video"),
    ("without its first bytes", lambda w: w[100:], KIND),
    ("without its pictures", lambda w: changed(w, w.index(b"mdat") + 4, bytes(60_000)), "damaged"),
    (
        "noise in a picture",
        lambda w: changed(w, w.index(b"mdat") + 2000, noise(2000)),
        "is damaged: the frame at",
    ),
    (
        "noise in its index",
        lambda w: changed(w, w.index(b"moov") + 30, b"\xff" * 170),
        "holds no video",
    ),
    (
        "two thousand million frames",
        lambda w: changed(w, w.index(b"stts") + 12, struct.pack(">I", 2**31 - 1)),
        CUT,
    ),
    (
        "two thousand million sizes",
        lambda w: changed(w, w.index(b"stsz") + 12, struct.pack(">I", 2**31 - 1)),
        KIND,
    ),
    ("frames at the far end", lambda w: changed(w, w.index(b"stco") + 12, b"\x80\0\0\0" * 1), ""),
    (
        "a codec that nobody knows",
        lambda w: changed(w, w.rindex(b"avc1"), b"zzzz"),
        "has a codec that FFmpeg does not know",
    ),
    (
        "a codec without its settings",
        lambda w: changed(w, w.index(b"avcC") + 4, b"\xff" * 36),
        "damaged",
    ),
    ("frames that last no time", lambda w: changed(w, w.index(b"stts") + 16, bytes(4)), CUT),
    ("a clock that stands still", lambda w: changed(w, w.index(b"mdhd") + 16, bytes(4)), CUT),
    (
        "half an mkv",
        lambda w: (k := encoded("matroska", "libx264"))[: len(k) // 2],
        "has no frames",
    ),
    ("300 bytes of an mkv", lambda w: encoded("matroska", "libx264")[:300], KIND),
    ("half an avi", lambda w: (k := encoded("avi", "mpeg4"))[: len(k) // 2], KIND),
    ("half a webm", lambda w: (k := encoded("webm", "libvpx"))[: len(k) // 2], CUT),
    ("pictures without times", lambda w: encoded("h264", "libx264"), "has frames without a time"),
    (
        "1 frame",
        lambda w: encoded("matroska", "libx264", frames=1),
        "is a picture, a clip of 1 frame",
    ),
    ("4 frames", lambda w: encoded("matroska", "libx264", frames=4), "is too short: 4 frames"),
    (
        "1x1 pixels",
        lambda w: encoded("matroska", "ffv1", size=(1, 1), pixels="bgr0"),
        "has frames of 1x1: both sides need 8 pixels",
    ),
]


@pytest.fixture(scope="module")
def data(compose):
    return compose().data


@pytest.mark.parametrize("broken", CLIPS, ids=[name for name, *_ in CLIPS])
def test_a_broken_clip_is_named(broken, whole, data, tmp_path):
    _, make, said = broken
    (tmp_path / "other.mp4").write_bytes(whole)
    path = tmp_path / "broken.mp4"
    path.write_bytes(make(whole))
    with pytest.raises(BadClip) as raised:
        read_clip(path, data)
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, link_to("broken.mp4"), lambda path: None])
def test_what_is_no_file_is_no_clip(put, data, tmp_path):
    put(tmp_path / "broken.mp4")
    with pytest.raises(BadClip, match="is no file"):
        read_clip(tmp_path / "broken.mp4", data)


def test_frames_of_16000_pixels_are_read_and_larger_ones_named(tmp_path, monkeypatch):
    path = tmp_path / "wide.mkv"
    path.write_bytes(encoded("matroska", "mjpeg", 6, (16, 16384), "yuvj420p"))
    footage = survey(path)
    frames = dict(wanted_frames(footage, {footage.times[0], footage.times[5]}))
    assert [f.shape for f in frames.values()] == [(16, 16384, 3)] * 2
    monkeypatch.setattr("cogvx.data.footage.MOST_PIXELS", 200_000)
    with pytest.raises(BadClip, match=r"has frames of 16384x16, too large to be read"):
        require_usual_size(16384, 16)


@pytest.mark.parametrize("extra", [b"garbage" * 100, b"\0" * 8])
def test_what_follows_a_whole_clip_is_left_out(extra, whole, data, tmp_path):
    path = tmp_path / "whole.mp4"
    path.write_bytes(whole + extra)
    assert read_clip(path, data).file_frames == 16
