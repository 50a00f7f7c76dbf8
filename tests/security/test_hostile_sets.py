"""Lists, tables and archives made to do harm lead nowhere else, and none grows without end."""

import gzip
import io
import os
import tarfile

import pytest

from cogvx.data import listed, tables, tars
from cogvx.data.load_dataset import SUFFIX
from cogvx.errors import UserError

SECRET = "a line of somebody's private file"


@pytest.fixture
def home(tmp_path, make_clip):
    """A private file and a clip outside of the set's folder, which holds a clip of its own."""
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.txt").write_text(SECRET)
    make_clip(tmp_path / "private.mp4", frames=9, width=32, height=32)
    make_clip(tmp_path / "set" / "a.mp4", frames=9, width=32, height=32)
    return tmp_path


@pytest.fixture
def read(compose, home):
    def start(option, *overrides):
        places = f"data.instance_data_root='{home}/set'", f"data.cache_dir='{home}/cache'"
        return compose(f"data={option}", *places, *overrides).data.read()

    return start


def refusal(read, *asked):
    with pytest.raises(UserError) as refused:
        read(*asked)
    said = str(refused.value)
    assert SECRET not in said
    return said


def lists(root, prompts, videos):
    (root / "prompts.txt").write_text(prompts)
    (root / "videos.txt").write_text(videos)


# -- links out of the folder -------------------------------------------------------------------


def test_a_clip_that_is_a_link_out_of_the_folder(read, home):
    root = home / "set"
    (root / "b.mp4").symlink_to(home / "private.mp4")
    lists(root, "x\n", "b.mp4\n")
    said = refusal(read, "text_files")
    assert f"videos.txt:1 names 'b.mp4', which is a link to {home}/private.mp4" in said
    assert "data.allow_outside_root=true" in said
    [found] = read("text_files", "data.allow_outside_root=true")
    assert found.video == root / "b.mp4"


def test_a_folder_that_is_a_link_out_of_the_folder(read, home):
    root = home / "set"
    (root / "in").symlink_to(home)
    lists(root, "x\n", "in/private.mp4\n")
    assert "which is a link to" in refusal(read, "text_files")
    (root / "prompts.txt").unlink()
    (root / "in").unlink()
    (home / "elsewhere").mkdir()
    (home / "private.mp4").rename(home / "elsewhere" / "c.mp4")
    (root / "in").symlink_to(home / "elsewhere")
    said = refusal(read, "folder", "data.caption=x")
    assert "in/c.mp4 is a link to" in said and "a.mp4 is a link" not in said


def test_captions_and_lists_that_are_links_to_private_files(read, home):
    root = home / "set"
    (root / "a.txt").symlink_to(home / "secret.txt")
    assert "a.txt is a link to" in refusal(read, "folder")
    (root / "a.txt").unlink()
    (root / "videos.txt").write_text("a.mp4\n")
    (root / "prompts.txt").symlink_to(home / "secret.txt")
    assert "prompts.txt is a link to" in refusal(read, "text_files")
    (root / "metadata.csv").symlink_to(home / "secret.txt")
    assert "metadata.csv is a link to" in refusal(read, "table")


def test_links_within_the_folder_and_a_folder_that_is_a_link_are_read(compose, home):
    root = home / "set"
    (root / "b.mp4").symlink_to("a.mp4")
    lists(root, "x\ny\n", "a.mp4\nb.mp4\n")
    (home / "again").symlink_to(root)
    data = compose("data=text_files", f"data.instance_data_root='{home}/again'").data
    assert len(data.read()) == 2


def test_a_snapshot_of_the_hubs_cache_is_read(compose, home):
    """Its files are links to blobs/ beside snapshots/."""
    repo = home / "datasets--me--clips"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (home / "private.mp4").rename(repo / "blobs" / "1")
    (snapshot / "a.mp4").symlink_to("../../blobs/1")
    data = compose("data=folder", "data.caption=x", f"data.instance_data_root='{snapshot}'").data
    assert len(data.read()) == 1


# -- what grows without end --------------------------------------------------------------------


def test_a_text_of_gigabytes_is_not_read(read, home, monkeypatch):
    monkeypatch.setattr(listed, "LARGEST_TEXT", 1000)
    lists(home / "set", "x" * 2000, "a.mp4\n")
    assert "prompts.txt has 2,000 bytes, too many for a text" in refusal(read, "text_files")


def test_a_small_parquet_file_that_holds_gigabytes(read, home, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(tables, "LARGEST_TEXT", 10_000_000)
    path, videos = home / "set" / "metadata.parquet", ["a.mp4"] * 20_000
    parquet.write_table(pyarrow.table({"text": ["x" * 1000] * 20_000, "video": videos}), path)
    assert path.stat().st_size < 100_000
    assert "metadata.parquet holds more than" in refusal(read, "table")


def member(name, content=b"", **what):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in what.items():
        setattr(info, key, value)
    return info, content


def write_tar(path, members, opened=open):
    with opened(path, "wb") as raw, tarfile.open(fileobj=raw, mode="w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))


def test_members_that_lead_elsewhere_are_written_under_their_hash_or_not_at_all(read, home):
    root, clip = home / "set", (home / "private.mp4").read_bytes()
    write_tar(
        root / "0.tar",
        [
            member("../../out.mp4", clip),
            member("../../out.txt", b"a cat"),
            member("/tmp/absolute.mp4", clip + b"1"),
            member("/tmp/absolute.txt", b"a dog"),
            member("link.mp4", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            member("hard.mp4", type=tarfile.LNKTYPE, linkname="../../secret.txt"),
            member("device.mp4", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
            member("pipe.mp4", type=tarfile.FIFOTYPE),
        ],
    )
    before = {path for path in home.rglob("*") if "cache" not in path.parts}
    found = read("webdataset")
    assert [each.prompt for each in found] == ["a cat", "a dog"]
    assert all(each.video.parent == home / "cache" / "videos" for each in found)
    assert {path for path in home.rglob("*") if "cache" not in path.parts} == before


def test_a_file_with_holes_of_a_terabyte_is_not_written(read, home):
    """As GNU tar writes it: a map of what is there, and its size with the holes."""
    header = tarfile.TarInfo("b.mp4")
    header.size, header.type = 0, tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    size = 1 << 40
    block[483:495] = b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    caption = tarfile.TarInfo("b.txt")
    caption.size = 1
    raw = bytes(block) + caption.tobuf() + b"x".ljust(512, b"\0") + bytes(1024)
    (home / "set" / "0.tar").write_bytes(raw)
    assert "has a .mp4 with holes, which is not read" in refusal(read, "webdataset")


def test_a_header_of_gigabytes_is_not_read_into_memory(read, home):
    info = tarfile.TarInfo("long")
    info.size, info.type = 1 << 33, tarfile.XHDTYPE
    good, text = member("a.mp4", b"A"), member("a.txt", b"a")
    with gzip.open(home / "set" / "0.tar.gz", "wb") as file:
        for one, content in (good, text):
            file.write(one.tobuf() + content.ljust(512, b"\0"))
        file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    said = refusal(read, "webdataset")
    assert "is cut off after 1 clip (a header says that it has 8589934592 bytes)" in said


def test_an_archive_that_unpacks_to_many_times_its_size(read, home, monkeypatch):
    monkeypatch.setattr(tars, "ALWAYS_ALLOWED", 10_000)
    content = bytes(5_000_000)
    write_tar(home / "set" / "0.tar.gz", [member("a.mp4", content)], gzip.open)
    assert "(it unpacks to more than 100 times its size)" in refusal(read, "webdataset")


def test_other_packings_than_gzip_are_not_tried(read, home):
    """bz2 makes a million bytes of one."""
    import bz2

    write_tar(home / "set" / "0.tar", [member("a.mp4", b"A")], bz2.open)
    assert "0.tar is no tar archive" in refusal(read, "webdataset")


# -- data=dataset ------------------------------------------------------------------------------


def test_a_cell_with_bytes_keeps_only_the_ending_of_its_name(compose, home):
    data = compose("data=dataset", "data.dataset_name=me/x", f"data.cache_dir='{home}/c'").data
    for name in ("../../x.sh/", "x.mp4\x1b[2J", "x." + "a" * 300, "x.m/../../p"):
        path = data.path_of({"bytes": b"clip", "path": name})
        assert path.parent == home / "c" / "videos" and SUFFIX.fullmatch(path.suffix)
    assert data.path_of({"bytes": b"clip", "path": "a/b.webm"}).suffix == ".webm"


def test_a_folder_with_a_script_and_one_with_pickles_run_nothing(read, home, compose):
    pytest.importorskip("datasets")
    script, pickles, ran = home / "evil", home / "pickles", home / "ran"
    script.mkdir()
    pickles.mkdir()
    (script / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    (pickles / "train.pkl").write_bytes(f"cos\nsystem\n(S'touch {ran}'\ntR.".encode())
    for folder in (script, pickles):
        data = compose("data=dataset", f"data.dataset_name='{folder}'").data
        with pytest.raises(UserError, match="could not be read"):
            data.read()
    assert not ran.exists()


@pytest.mark.parametrize("option", ["folder", "table", "text_files"])
def test_a_pipe_in_the_place_of_a_list_does_not_hang(read, home, option):
    root = home / "set"
    for name in ("metadata.csv", "prompts.txt", "videos.txt", "a.txt"):
        os.mkfifo(root / name)
    assert refusal(read, option)
