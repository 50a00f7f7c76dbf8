"""Several captions for a clip, the word for what is learned, and tags in other orders."""

import json
from types import SimpleNamespace

import pytest

from cogvx.compose import quoted
from cogvx.data.phrasing import other_orders, require_readable
from cogvx.errors import UserError


@pytest.fixture
def read(compose, tmp_path):
    """read(option, caption, *overrides): the examples of a table with one clip for each caption."""

    def examples(captions: list, *overrides: str):
        rows = []
        for number, caption in enumerate(captions):
            (tmp_path / f"{number}.mp4").touch()
            rows.append(json.dumps({"text": caption, "video": f"{number}.mp4"}))
        (tmp_path / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
        data = compose(
            "data=table",
            f"data.instance_data_root='{tmp_path}'",
            *(quoted(each, sweeping=False) for each in overrides),
        ).data
        examples.data = data
        return data.read()

    return examples


def captions_of(examples) -> list[tuple[str, ...]]:
    return [example.captions for example in examples]


def test_a_cell_may_hold_several_captions(read):
    found = captions_of(read([["a cat", " a pet "], "a dog"], "data.id_token=ZORB"))
    assert found == [("ZORB a cat", "ZORB a pet"), ("ZORB a dog",)]
    found = captions_of(read(["a cat | a pet|", "a dog"], "data.caption_split=|"))
    assert found == [("a cat", "a pet"), ("a dog",)]


@pytest.mark.parametrize("cell", [["a", 7], [1, 2], [], [["a"]], ["a", "  "]])
def test_a_list_of_other_things_is_refused(read, cell):
    with pytest.raises(UserError, match=r"metadata.jsonl:1 has (a caption that is not|no caption)"):
        read([cell])


def test_lines_of_a_caption_file_may_be_captions(compose, tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("a cat\n\n  on a beach\n")
    root = f"data.instance_data_root='{tmp_path}'"
    [joined] = compose("data=folder", root).data.read()
    [several] = compose("data=folder", root, "data.caption_split=lines").data.read()
    assert joined.captions == ("a cat on a beach",)
    assert several.captions == ("a cat", "on a beach")


@pytest.mark.parametrize(
    ("position", "caption", "expected", "plain"),
    [
        ("start", "a dog", "ZORB a dog", "a dog"),
        ("end", "a dog", "a dog ZORB", "a dog"),
        ("{}", "a {} dog", "a ZORB dog", "a dog"),
        ("[V]", "a [V] dog, [V]", "a ZORB dog, ZORB", "a dog,"),
        ("dog", "a dog, no dogma", "a ZORB, no dogma", "a dog, no dogma"),
    ],
)
def test_the_word_stands_where_it_is_asked_for(read, position, caption, expected, plain):
    word = ["data.id_token=ZORB", f"data.id_token_position={position}"]
    [always] = read([caption], *word)
    assert always.pairs == [(expected, expected)] and always.plain_share == 0
    [often] = read([caption], *word, "data.id_token_share=0.75")
    assert often.pairs == [(expected, plain)] and often.plain_share == 0.25


def test_captions_without_the_place_of_the_word_are_named(read):
    said = r"id_token_position={}: 1 of 2 captions do not have this text.*such as 'a cat'"
    with pytest.raises(UserError, match=said):
        read(["a {} dog", "a cat"], "data.id_token=ZORB", "data.id_token_position={}")


def test_captions_that_have_the_word_already_are_said(read):
    read(["ZORB runs", "a ZORBIT", "a zorb"], "data.id_token=ZORB")
    [line] = [line for line in read.data.said if line.startswith("warning")]
    assert "warning 1 of 3 captions have ZORB already, such as 'ZORB runs'" in line
    assert "take it out of the captions" in line


def test_tags_come_in_other_orders_and_the_first_ones_stay(read):
    tags = "cat, grass, rain, night, wind"
    [example] = read([tags], "data.tag_shuffles=20", "data.keep_tags=2", "data.id_token=ZORB")
    assert example.prompt == f"ZORB {tags}" and len(example.captions) == 6
    assert all(caption.startswith("ZORB cat, grass, ") for caption in example.captions)
    assert all(set(c[5:].split(", ")) == set(tags.split(", ")) for c in example.captions)
    assert other_orders(tags, 3, 0) == other_orders(tags, 3, 0) != other_orders(tags[:-1], 3, 0)
    assert other_orders("one sentence", 3, 0) == other_orders("a, b", 3, 1) == []


class Letters:
    """A tokenizer that knows a few letters."""

    pieces = ("<unk>", "\u2581", *"zorb1*")
    unk_token_id = 0

    def __call__(self, text: str, *, add_special_tokens: bool):
        known = [self.pieces.index(c) if c in self.pieces else 0 for c in text]
        return SimpleNamespace(input_ids=[1, *known])

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[number] for number in ids]


@pytest.mark.parametrize("word", ["犬", "{}", "x", "\U0001f407"])
def test_a_word_of_which_nothing_is_left_is_refused(word):
    require_readable(["zorb", "犬1", "***"], Letters())
    with pytest.raises(UserError, match=r"knows none of its letters.*data.id_token=RABBIT"):
        require_readable(["zorb", word], Letters())


@pytest.mark.parametrize(
    "setting",
    [
        "data.id_token_share=0",
        "data.id_token_share=1.5",
        "data.tag_shuffles=-1",
        "data.keep_tags=-1",
        "data.id_token_position=''",
        "data.caption_split=''",
    ],
)
def test_settings_of_captions_have_limits(compose, setting):
    with pytest.raises(UserError, match="must be"):
        compose(setting)
