"""data=folder and data=table, and the names and cells that lists have in the wild."""

import csv
import json
import unicodedata

import pytest

from cogvx.compose import quoted
from cogvx.config import Wrong
from cogvx.errors import UserError


@pytest.fixture
def listing(compose, tmp_path):
    """A folder with empty files, for formats that only list. read(option, *overrides)."""
    root = tmp_path / "clips"

    class Listing:
        def __init__(self):
            self.root = root
            self.files("a.mp4", "b.mp4")

        def files(self, *names):
            for name in names:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).touch()

        def write(self, name, text):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")

        def data(self, option, *overrides):
            root_of = f"data.instance_data_root='{root}'"
            return compose(f"data={option}", root_of, *overrides).data

        def read(self, option, *overrides):
            return [
                (example.prompt, str(example.video.relative_to(root)))
                for example in self.data(option, *overrides).read()
            ]

        def refusal(self, option, *overrides) -> str:
            with pytest.raises(UserError) as raised:
                self.data(option, *overrides).read()
            return str(raised.value)

    return Listing()


# -- data=folder ---------------------------------------------------------------------------------


def test_a_folder_pairs_clips_with_caption_files_of_the_same_name(listing):
    listing.files("in/c.MOV", ".hidden.mp4", "._a.mp4", "__MACOSX/a.mp4", ".git/x.mp4")
    listing.write("a.txt", "a cat\n on a beach\n")
    listing.write("b.txt", "\ufeffa dog")
    listing.write("in/c.txt", "Ünïcode 🐇")
    assert listing.read("folder", "data.id_token=RABBIT") == [
        ("RABBIT a cat on a beach", "a.mp4"),
        ("RABBIT a dog", "b.mp4"),
        ("RABBIT Ünïcode 🐇", "in/c.MOV"),
    ]


def test_clips_without_captions_are_named_and_may_share_one(listing):
    listing.write("a.txt", "a cat")
    listing.write("b.txt", " \n")
    listing.files("c.mp4")
    said = listing.refusal("folder")
    assert "2 of 3 clips" in said and 'data.caption="..."' in said
    assert "b.mp4 has no caption: b.txt is blank" in said
    assert "c.mp4 has no caption: c.txt is not there" in said
    assert listing.read("folder", "data.caption='a film'") == [
        ("a cat", "a.mp4"),
        ("a film", "b.mp4"),
        ("a film", "c.mp4"),
    ]


def test_captions_without_a_clip_are_said_and_other_endings_can_be_chosen(listing):
    for name in ("a", "b", "lost"):
        listing.write(f"{name}.caption", name)
    data = listing.data("folder", "data.caption_column=.caption")
    assert [example.prompt for example in data.read()] == ["a", "b"]
    assert data.said == ("warning 1 caption file has no clip of the same name: lost.caption",)
    said = listing.refusal("folder", "data.video_column=.webm")
    assert "no file ends in .webm" in said and "Endings there now: .caption, .mp4" in said


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.caption_column=txt", "data.caption_column=txt: with data=folder it is the ending"),
        ("data.caption_column=a/.txt", "a dot and letters or digits, such as .txt"),
        ("data.video_column=.mp4,.mov", "data.video_column=.mp4,.mov: with data=folder"),
        ("data.video_column=' '", "a dot and letters or digits, such as .mp4"),
    ],
)
def test_an_ending_that_is_none_is_named_before_anything_starts(listing, setting, said):
    with pytest.raises(Wrong) as raised:
        listing.data("folder", quoted(setting, sweeping=False))
    assert said in str(raised.value)


def test_links_in_a_circle_end(listing):
    listing.write("a.txt", "a")
    listing.write("b.txt", "b")
    (listing.root / "again").symlink_to(listing.root)
    assert len(listing.read("folder")) == 2


def test_a_folder_has_first_images_beside_its_clips(listing):
    listing.files("a.png")
    how = ["model=nano_i2v", "data.caption=x", "data.image_column=.png"]
    said = listing.refusal("folder", *how)
    assert "1 of 2 clips" in said and "b.mp4: b.png is not there" in said
    listing.files("b.png")
    assert [e.image.name for e in listing.data("folder", *how).read()] == ["a.png", "b.png"]


# -- data=table ----------------------------------------------------------------------------------

ROWS = [{"file_name": "a.mp4", "text": "one, two"}, {"file_name": "b.mp4", "text": "drei ü"}]


def write_table(root, name):
    path = root / name
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix in (".json", ".jsonl"):
        lines = "\n".join(json.dumps(row) for row in ROWS)
        path.write_text(json.dumps(ROWS) if path.suffix == ".json" else f"{lines}\n\n")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, ["file_name", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_table_is_found_and_its_columns_are_recognised(listing, ending):
    write_table(listing.root, f"metadata.{ending}")
    data = listing.data("table")
    assert [(e.prompt, e.video.name) for e in data.read()] == [
        ("one, two", "a.mp4"),
        ("drei ü", "b.mp4"),
    ]
    assert data.said == (f"list    metadata.{ending}: captions from text, clips from file_name",)


@pytest.mark.slow
def test_a_table_that_cannot_be_chosen_is_named(listing):
    assert "Tables in" in listing.refusal("table")
    write_table(listing.root, "metadata.csv")
    write_table(listing.root, "metadata.jsonl")
    assert "has metadata.csv and metadata.jsonl" in listing.refusal("table")
    assert len(listing.read("table", "data.dataset_name=metadata.jsonl")) == 2
    listing.write("list.xlsx", "")
    assert "ends in .csv, .tsv" in listing.refusal("table", "data.dataset_name=list.xlsx")
    listing.write("metadata.csv", "name,words\nx,y\n")
    said = listing.refusal("table", "data.dataset_name=metadata.csv")
    assert "no column called caption, text or prompt. Its columns: name, words" in said
    assert "data.caption_column=NAME" in said


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metadata.jsonl", '{"text": "a"}\n{"text": \n', "metadata.jsonl:2 is not JSON"),
        ("metadata.jsonl", '["a.mp4"]\n', "metadata.jsonl:1 is no object"),
        ("metadata.json", '{"text": "a"}', "must be a list of objects"),
        ("metadata.json", '{"text": "a"}\n{"text": "b"}', "One object per line is a .jsonl file"),
        ("metadata.csv", "text,video\na,b.mp4,c\n", "metadata.csv:2 has more cells"),
        ("metadata.csv", f"text,video\n{'x' * 200_000},a.mp4\n", "metadata.csv:2 cannot be read"),
        ("metadata.parquet", "PAR1", "cannot be read as parquet"),
        ("metadata.jsonl", "", "no column called"),
    ],
)
def test_a_broken_table_is_named_with_its_line(listing, name, text, said):
    listing.write(name, text)
    assert said in listing.refusal("table")


# -- cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        (["a", 2], "a caption that is not text, but a list: ['a', 2]"),
        ({"en": "a"}, "a caption that is not text, but an object"),
        (7, "a caption that is not text, but a number: 7"),
        (float("nan"), "a caption that is not text, but a number: nan"),
        (True, "a caption that is not text, but true or false"),
        (None, "metadata.jsonl:1 has no caption"),
        ("  ", "metadata.jsonl:1 has no caption"),
    ],
)
def test_a_caption_that_is_no_text_is_refused(listing, caption, said):
    listing.write("metadata.jsonl", json.dumps({"text": caption, "video": "a.mp4"}))
    assert said in listing.refusal("table")


def test_the_same_holds_for_a_dataset_and_bytes_are_written_out(compose, tmp_path):
    datasets = pytest.importorskip("datasets")

    def read(**columns):
        datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "rows.parquet"))
        return compose("data=dataset", f"data.dataset_name='{tmp_path}/rows.parquet'").data.read()

    with pytest.raises(UserError, match=r"row 0 has a caption that is not text, but a list"):
        read(text=[[1, 2]], video=["a.mp4"])
    [example] = read(text=["a"], video=[b"\x00\x01bytes of a clip"])
    assert example.video.read_bytes() == b"\x00\x01bytes of a clip"


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_may_be_spelt_as_another_system_spells_it(listing, form):
    listing.files("clips/Früh ling.mp4", unicodedata.normalize(form, "clips/é.mp4"))
    names = ["clips\\Früh ling.mp4", "clips/Fr%C3%BCh%20ling.mp4", "clips/é.mp4"]
    names += [unicodedata.normalize("NFD", "clips/é.mp4")]
    listing.write("videos.txt", "\n".join(names))
    listing.write("prompts.txt", "\n".join("abcd"))
    found = [unicodedata.normalize("NFC", video) for _, video in listing.read("text_files")]
    assert found == [*["clips/Früh ling.mp4"] * 2, *["clips/é.mp4"] * 2]


def test_a_file_with_the_name_as_listed_comes_first(listing):
    listing.files("a%20b.mp4", "a b.mp4")
    listing.write("videos.txt", "a%20b.mp4")
    listing.write("prompts.txt", "x")
    assert listing.read("text_files") == [("x", "a%20b.mp4")]


def test_names_that_cannot_be_meant_have_a_hint(listing):
    listing.files(" lead.mp4")
    listing.write("videos.txt", "lead.mp4\nD:\\clips\\a.mp4\n")
    listing.write("prompts.txt", "x\ny\n")
    said = listing.refusal("text_files")
    assert "there is ' lead.mp4', with a blank at its start or end: rename it" in said
    assert "a path of another machine: write paths that start from" in said


def test_paths_outside_of_the_root_need_a_word(listing, tmp_path):
    (tmp_path / "other.mp4").touch()
    listing.write("videos.txt", f"../other.mp4\n{tmp_path / 'other.mp4'}\na.mp4\n")
    listing.write("prompts.txt", "x\ny\nz\n")
    said = listing.refusal("text_files")
    assert said.count("or data.allow_outside_root=true") == 2
    data = listing.data("text_files", "data.allow_outside_root=true")
    assert [e.video.name for e in data.read()] == ["other.mp4", "other.mp4", "a.mp4"]


# -- rows that arrive one after the other --------------------------------------------------------


@pytest.fixture
def streamed(compose, tmp_path, monkeypatch):
    """streamed(): captions and bytes of streamed rows; streamed.fetched: captions that came."""
    datasets = pytest.importorskip("datasets")
    table = tmp_path / "rows.parquet"

    def write(*captions: str) -> None:
        videos = [caption.encode() for caption in captions]
        rows = datasets.Dataset.from_dict({"text": captions, "video": videos})
        rows.to_parquet(str(table))

    def read() -> list:
        read.fetched = []
        places = f"data.dataset_name='{table}'", f"data.cache_dir='{tmp_path}/cache'"
        data = compose("data=dataset", *places, "data.streaming=true").data
        values = type(data).values

        def noted(self, row):
            read.fetched.append(row["text"])
            return values(self, row)

        with monkeypatch.context() as patched:
            patched.setattr(type(data), "values", noted)
            return [(e.prompt, e.video.read_bytes()) for e in data.read()]

    write("a", "b", "c")
    read.write, read.cache = write, tmp_path / "cache"
    return read


def test_streamed_rows_are_fetched_once(streamed):
    rows = [("a", b"a"), ("b", b"b"), ("c", b"c")]
    assert streamed() == rows and streamed.fetched == ["a", "b", "c"]
    assert streamed() == rows and streamed.fetched == []
    streamed.write("a", "d")
    assert streamed() == [("a", b"a"), ("d", b"d")] and streamed.fetched == ["a", "d"]


def test_a_stream_that_was_stopped_goes_on_where_it_was(streamed):
    rows = streamed()
    [known] = streamed.cache.glob("arrived/*.jsonl")
    lines = known.read_text().splitlines(keepends=True)
    # After the line of the source and two rows it was killed, in the middle of a line.
    known.write_text("".join(lines[:3]) + lines[3][:10])
    assert streamed() == rows and streamed.fetched == ["c"]
    next(streamed.cache.glob("videos/*")).unlink()
    assert streamed() == rows and streamed.fetched == ["a", "b", "c"]
