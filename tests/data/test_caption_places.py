"""Captions in tables of every kind: blank cells are filled, all else stays as it is."""

import json

import pytest

from cogvx.data.caption_places import InTable
from cogvx.data.written import RECORD, WrittenCaptions
from cogvx.errors import UserError


@pytest.fixture
def table(compose, tmp_path):
    """table("metadata.csv", bytes): the place that a data=table of it is."""
    for name in ("0.mp4", "1.mp4"):
        (tmp_path / name).write_bytes(b"a clip")

    def make(name: str, content: bytes, *overrides: str) -> InTable:
        (tmp_path / name).write_bytes(content)
        given = ["data=table", f"data.instance_data_root={tmp_path}", *overrides]
        return InTable(compose(*given, f"data.dataset_name={name}").data)

    return make


def fill(place: InTable, text: str = "new ü") -> list[str]:
    """Writes a caption for each clip that has none; the captions that were there."""
    found = place.clips()
    for clip in found:
        if not clip.caption:
            place.write(clip, text)
    place.finish()
    return [clip.caption for clip in found]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.csv", "video,text\n0.mp4,old\n1.mp4, \n", "video,text\n0.mp4,old\n1.mp4,new ü\n"),
        ("a.csv", "video\n0.mp4\n\n1.mp4\n", "video,caption\n0.mp4,new ü\n\n1.mp4,new ü\n"),
        (
            "a.csv",
            "\ufeffvideo,text,more\r\n0.mp4,,1\r\n1.mp4,old,2\r\n",
            "\ufeffvideo,text,more\r\n0.mp4,new ü,1\r\n1.mp4,old,2\r\n",
        ),
        (
            "a.csv",
            'text,video,n\n"two\nlines",0.mp4,1\n,1.mp4,2\n',
            'text,video,n\n"two\nlines",0.mp4,1\nnew ü,1.mp4,2\n',
        ),
        (
            "a.tsv",
            "video\tprompt\n0.mp4\told\n1.mp4\n",
            "video\tprompt\n0.mp4\told\n1.mp4\tnew ü\n",
        ),
        (
            "a.jsonl",
            '{"video": "0.mp4", "text":  "old"}\n\n{"video": "1.mp4", "n": [1]}\n',
            '{"video": "0.mp4", "text":  "old"}\n\n{"video": "1.mp4", "n": [1], "text": "new ü"}\n',
        ),
    ],
)
def test_blank_cells_are_filled_and_all_else_stays(table, tmp_path, name, before, after):
    captions = fill(table(name, before.encode()))
    assert (tmp_path / name).read_bytes().decode() == after
    assert (tmp_path / f"{name}.before_captions").read_bytes().decode() == before
    assert captions.count("") == after.count("new ü")
    assert (
        fill(table(name, after.encode())) and not (tmp_path / f"{name}.before_captions_2").exists()
    )


def test_a_list_and_a_parquet_file_are_written_too(table, tmp_path):
    rows = [{"file_name": "0.mp4", "text": "old", "n": 1}, {"file_name": "1.mp4", "text": None}]
    fill(table("a.json", json.dumps(rows).encode()))
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert found == [rows[0], {"file_name": "1.mp4", "text": "new ü"}]
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    for texts in ({"text": ["old", None]}, {}):
        cells = {"path": ["0.mp4", "1.mp4"], "n": [1, 2], **texts}
        parquet.write_table(pyarrow.table(cells), tmp_path / "a.parquet")
        fill(table("a.parquet", (tmp_path / "a.parquet").read_bytes()))
        found = parquet.read_table(tmp_path / "a.parquet").to_pydict()
        column = "text" if texts else "caption"
        assert found == cells | {column: ["old" if texts else "new ü", "new ü"]}


def test_captions_that_a_killed_task_did_not_get_into_the_table_are_not_lost(table, tmp_path):
    content = b"video,text\n0.mp4,\n1.mp4,\n"
    killed = table("a.csv", content)
    first = killed.clips()[0]
    killed.record.add(clip=first.name, caption="new")
    with (tmp_path / RECORD).open("ab") as file:
        file.write(b'{"clip": "a.csv: 1.mp4", "capt')
    again = table("a.csv", content)
    assert [clip.caption for clip in again.clips()] == ["new", ""]
    again.finish()
    assert (tmp_path / "a.csv").read_text() == "video,text\n0.mp4,new\n1.mp4,\n"
    emptied = table("a.csv", content)
    assert [clip.caption for clip in emptied.clips()] == ["", ""], "who empties a cell means it"


def test_a_changed_caption_is_a_persons(tmp_path):
    record = WrittenCaptions(tmp_path)
    record.add(clip="a.mp4", caption="A cat.", model="m")
    record.add(clip="b.mp4", caption="A dog.", model="m")
    again = WrittenCaptions(tmp_path)
    assert again.is_a_models("a.mp4", " A cat.\n") and not again.is_a_models("a.mp4", "A cat!")
    assert not again.is_a_models("b.mp4", "A cat.") and not again.is_a_models("c.mp4", "A cat.")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", "video,text\nnone.mp4,\n", r"a.csv:2 names 'none.mp4'"),
        ("a.csv", "clip,text\n0.mp4,\n", r"a.csv has no column called file_name"),
        (
            "a.jsonl",
            '{"video": "0.mp4", "text": ["a", "b"]}\n',
            r"a.jsonl:1 has a text that is not",
        ),
    ],
)
def test_a_table_that_cannot_be_captioned_is_named(table, name, content, text):
    with pytest.raises(UserError, match=text):
        table(name, content.encode()).clips()
