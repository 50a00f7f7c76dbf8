"""data=webdataset: archives are read once, and half of one is not taken for a whole."""

import io
import json
import tarfile

import pytest

from cogvx.data.tars import in_braces
from cogvx.errors import UserError


def archive(path, members: dict, mode: str = "w") -> None:
    """members: names with texts, bytes, or a TarInfo of another kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                file.addfile(content)
                continue
            raw = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            file.addfile(info, io.BytesIO(raw))


@pytest.fixture
def tars(compose, tmp_path):
    """tars.read(*overrides), tars.root, and after a read tars.data."""

    class Tars:
        root, cache = tmp_path / "tars", tmp_path / "cache"

        def read(self, *overrides: str):
            places = f"data.instance_data_root='{self.root}'", f"data.cache_dir='{self.cache}'"
            self.data = compose("data=webdataset", *places, *overrides).data
            return self.data.read()

        def captions(self, *overrides: str):
            return [(e.prompt, e.video.read_bytes(), e.origin) for e in self.read(*overrides)]

        def refusal(self, *overrides: str) -> str:
            with pytest.raises(UserError) as raised:
                self.read(*overrides)
            return str(raised.value)

    return Tars()


def test_clips_and_captions_are_paired_in_any_order_and_archives_in_theirs(tars):
    archive(tars.root / "000.tar", {"a.mp4": "A", "b.mp4": "B", "a.txt": "a cat", "b.txt": "b"})
    archive(
        tars.root / "in/001.tar.gz", {"x/a.1.MKV": "C", "x/a.1.txt": "c", "._a.mp4": ""}, "w:gz"
    )
    assert tars.captions("data.id_token=ZORB") == [
        ("ZORB a cat", b"A", "000.tar:a"),
        ("ZORB b", b"B", "000.tar:b"),
        ("ZORB c", b"C", "001.tar.gz:x/a.1"),
    ]


def test_captions_may_stand_in_json_or_have_another_ending(tars):
    about = json.dumps({"caption": ["one", "two"], "long": "a long one"})
    archive(tars.root / "0.tar", {"a.json": about, "a.mp4": "A", "a.caption": "third"})
    assert tars.read()[0].captions == ("one", "two")
    assert tars.captions("data.caption_column=long")[0][0] == "a long one"
    assert tars.captions("data.caption_column=.caption")[0][0] == "third"


@pytest.mark.slow
def test_an_archive_is_read_once(tars, monkeypatch):
    archive(tars.root / "0.tar", {"a.mp4": "A", "a.txt": "a"})
    archive(tars.root / "1.tar", {"b.mp4": "B", "b.txt": "b"})
    first = tars.captions()
    opened, really = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: (opened.append(a[0]), really(*a, **k))[1])
    assert tars.captions() == first and opened == []
    # A clip that somebody removed from the cache is read again.
    tars.read()[1].video.unlink()
    assert tars.captions() == first and [path.name for path in opened] == ["1.tar"]


def test_a_broken_line_of_what_is_remembered_costs_no_clip(tars):
    """A power cut may break one in the middle. The archive is then read again."""
    archive(tars.root / "0.tar", {"a.mp4": "A", "a.txt": "a", "b.mp4": "B", "b.txt": "b"})
    first = tars.captions()
    [known] = (tars.cache / "arrived").glob("*.jsonl")
    lines = known.read_bytes().splitlines(keepends=True)
    known.write_bytes(b"".join([b"\0" * 8 + b"\n", *lines[1:]]))
    assert len(first) == 2 and tars.captions() == first


def test_archives_are_chosen_by_name(tars):
    for number in range(3):
        archive(tars.root / f"{number:03}.tar", {"a.mp4": f"{number}", "a.txt": f"{number}"})
    chosen = tars.captions("data.dataset_name='{001..002}.tar'")
    assert [caption for caption, *_ in chosen] == ["1", "2"]
    assert "003.tar not found" in tars.refusal("data.dataset_name='{002..003}.tar'")
    assert in_braces("{8..10}_{a,b}") == ["8_a", "8_b", "9_a", "9_b", "10_a", "10_b"]


def cut(path, share: float) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])


@pytest.mark.parametrize(
    ("share", "why"), [(0.4, "it has no end"), (0.35, "unexpected end of data")]
)
def test_half_an_archive_gives_its_whole_samples_and_is_said(tars, share, why):
    clip = b"x" * 5000
    for number in range(5):
        members = {
            f"{n}.{end}": clip if end == "mp4" else "t" for n in "abc" for end in ("mp4", "txt")
        }
        archive(tars.root / f"{number}.tar", members)
    cut(tars.root / "4.tar", share)
    found = tars.captions()
    assert len(found) == 13 and [o for *_, o in found][-1] == "4.tar:a"
    [said] = [line for line in tars.data.said if line.startswith("warning")]
    assert said.startswith(f"warning 4.tar is cut off after 1 clip ({why})")
    refused = tars.refusal("data.max_bad_fraction=0.1")
    assert "1 of 5 archives are cut off" in refused and "data.max_bad_fraction=1" in refused


def test_names_lead_nowhere_and_links_are_left_out(tars, tmp_path):
    link = tarfile.TarInfo("b.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    bad = {
        "../../evil.mp4": "E",
        "../../evil.txt": "e",
        "/abs.mp4": "F",
        "/abs.txt": "f",
        "b": link,
    }
    archive(tars.root / "0.tar", bad)
    assert all(e.video.parent == tars.cache / "videos" for e in tars.read())
    assert not (tmp_path / "evil.mp4").exists() and len(tars.read()) == 2


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.mp4": "A"}, "0.tar:a has no caption beside it"),
        ({"a.mp4": "A", "a.txt": " "}, "0.tar:a has no caption beside it"),
        ({"a.mp4": "A", "a.json": "{"}, "0.tar:a has a .json that is not JSON"),
        ({"a.mp4": "A", "a.json": '{"text": 7}'}, "has a caption that is not text, but a number"),
        ({"a.mp4": "A", "a.txt": b"M\xfcller"}, "0.tar:a has a caption (.txt) that is not UTF-8"),
        ({"a.mp4": "A", "a.mov": "B", "a.txt": "x"}, "0.tar:a comes twice in the archive"),
        ({"a.mp4": "A", "a.txt": "x" * 2_000_000}, "more than 1000000 bytes"),
        ({"a.txt": "x"}, "lists no clips"),
        ({}, "lists no clips"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(tars, members, said):
    archive(tars.root / "0.tar", members)
    assert said in tars.refusal()


@pytest.mark.slow
def test_what_is_no_archive_is_named(tars):
    tars.root.mkdir()
    assert "has no archive: no file ends in .tar" in tars.refusal()
    for content in (b"", b"<html>" * 300, b"\0" * 100):
        (tars.root / "0.tar").write_bytes(content)
        assert "0.tar is no tar archive" in tars.refusal()
