"""Lists of clips are read as meant, or refused: with the line, and with what to do."""

import csv

import pytest

from cogvx.errors import UserError


def read(compose, root, *overrides):
    return compose(f"data.instance_data_root='{root}'", *overrides).data.read()


def refusal(compose, root, *overrides) -> str:
    with pytest.raises(UserError) as raised:
        read(compose, root, *overrides)
    return str(raised.value)


@pytest.mark.slow
def test_line_i_belongs_to_line_i(compose, clips):
    examples = read(compose, clips, "data.id_token=RABBIT")
    assert [e.prompt for e in examples] == [f"RABBIT clip number {n}" for n in range(6)]
    assert [e.video.name for e in examples] == [f"{n}.mp4" for n in range(6)]
    assert examples[3].origin == "videos.txt:4"


@pytest.mark.slow
def test_crlf_bom_and_blank_lines_do_not_shift_the_pairing(compose, clips):
    prompts = ["clip number 0", "", "clip number 1", "Ünïcode 🐇 2", ""]
    videos = ["videos/0.mp4", "", "videos/1.mp4", "videos/2.mp4"]
    (clips / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(prompts).encode())
    (clips / "videos.txt").write_bytes(("\n".join(videos) + "\n\n\n").encode())
    found = [(e.prompt, e.video.name) for e in read(compose, clips)]
    assert found == [
        ("clip number 0", "0.mp4"),
        ("clip number 1", "1.mp4"),
        ("Ünïcode 🐇 2", "2.mp4"),
    ]


@pytest.mark.slow
def test_a_line_blank_in_one_file_only_is_named(compose, clips):
    (clips / "prompts.txt").write_text("a\n\nc\nd\ne\nf\n")
    assert "prompts.txt:2 is blank, but videos.txt:2 names videos/1.mp4" in refusal(compose, clips)


@pytest.mark.slow
def test_different_line_counts_name_the_first_line_without_a_partner(compose, clips):
    (clips / "videos.txt").write_text("videos/0.mp4\nvideos/1.mp4\n")
    said = refusal(compose, clips)
    assert (
        "prompts.txt has 6 lines, videos.txt 2" in said
        and "prompts.txt:3 ('clip number 2')" in said
    )


def test_a_missing_root_is_named(compose, tmp_path):
    assert "does not exist" in refusal(compose, tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in refusal(compose, tmp_path / "file")


@pytest.mark.slow
def test_missing_lists_are_named_with_what_is_there(compose, clips):
    (clips / "prompts.txt").rename(clips / "captions.txt")
    said = refusal(compose, clips)
    assert "prompts.txt not found" in said and "captions.txt" in said


@pytest.mark.slow
def test_paths_that_do_not_exist_are_all_named_with_line_and_place(compose, clips):
    (clips / "videos.txt").write_text(
        "videos/0.mp4\nvideos/9.mp4\n2.mp4\nvideos\nvideos/4.mp4\n../x.mp4\n"
    )
    said = refusal(compose, clips)
    assert f"videos.txt:2 names 'videos/9.mp4'; looked for {clips / 'videos/9.mp4'}" in said
    assert "videos.txt:3 names '2.mp4'" in said and "there is videos/2.mp4" in said
    assert "is a folder" in said
    assert "videos.txt:6 names '../x.mp4', which is outside of" in said
    assert "4 of 6 clips" in said


@pytest.mark.slow
def test_a_doubled_videos_folder_is_noticed(compose, clips):
    (clips / "videos" / "prompts.txt").write_text("a\n")
    (clips / "videos" / "videos.txt").write_text("videos/0.mp4\n")
    said = refusal(compose, clips / "videos")
    assert "videos/ is doubled" in said and "set the root one folder higher" in said


@pytest.mark.slow
def test_an_empty_list_is_refused(compose, clips):
    (clips / "prompts.txt").write_text("\n")
    (clips / "videos.txt").write_text("")
    assert "lists no clips" in refusal(compose, clips)


@pytest.mark.slow
def test_text_that_is_not_utf8_names_its_line(compose, clips):
    (clips / "prompts.txt").write_bytes(b"one\ntwo\nM\xfcller\n")
    assert "prompts.txt:3 is not UTF-8" in refusal(compose, clips)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.slow
def test_csv_with_quotes_commas_and_newlines(compose, clips):
    write_csv(
        clips / "metadata.csv",
        [["text", "video"], ["a, b", "videos/0.mp4"], ['say "hi"\nthere', "videos/1.mp4"]],
    )
    examples = read(compose, clips, "data=csv")
    assert [e.prompt for e in examples] == ["a, b", 'say "hi"\nthere']


@pytest.mark.slow
def test_the_seeds_triple_quoted_sample_reads_without_its_quotes(compose, clips):
    (clips / "metadata.csv").write_text('text,video\n"""A clip, quoted""","""videos/0.mp4"""\n')
    [example] = read(compose, clips, "data=csv")
    assert (example.prompt, example.video.name) == ("A clip, quoted", "0.mp4")


@pytest.mark.slow
def test_csv_mistakes_are_named(compose, clips):
    assert "Tables in" in refusal(compose, clips, "data=csv")
    write_csv(clips / "metadata.csv", [["texts", "path"], ["a", "videos/0.mp4"]])
    said = refusal(compose, clips, "data=csv")
    assert (
        "has no column text or video; did you mean texts?" in said
        and "Its columns: texts, path" in said
    )
    write_csv(
        clips / "metadata.csv", [["text", "video"], ["", "videos/0.mp4"], ["b", "videos/0.mp4"]]
    )
    assert "metadata.csv:2 has no caption" in refusal(compose, clips, "data=csv")


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_dataset_from_a_local_table(compose, clips, streaming):
    write_csv(
        clips / "metadata.csv", [["text", "video"], ["a", "videos/0.mp4"], ["b", "videos/1.mp4"]]
    )
    table = f"data.dataset_name='{clips / 'metadata.csv'}'"
    examples = read(compose, clips, "data=dataset", table, f"data.streaming={streaming}")
    assert [(e.prompt, e.video.name) for e in examples] == [("a", "0.mp4"), ("b", "1.mp4")]


@pytest.mark.slow
def test_a_dataset_that_holds_the_videos_themselves(compose, clips, tmp_path):
    """The rows hold the clips' bytes, as those of data sets on the hub do."""
    import datasets

    rows = {
        "text": ["a"],
        "video": [{"path": "0.mp4", "bytes": (clips / "videos/0.mp4").read_bytes()}],
    }
    features = datasets.Features(
        {"text": datasets.Value("string"), "video": datasets.Video(decode=False)}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "clips.parquet"))
    [example] = compose(
        "data=dataset", f"data.dataset_name='{tmp_path / 'clips.parquet'}'"
    ).data.read()
    assert example.video.read_bytes() == (clips / "videos/0.mp4").read_bytes()


def test_a_dataset_that_is_not_in_the_cache_offline(compose):
    with pytest.raises(UserError, match=r"nothing-here is no folder here and not whole in the"):
        compose("data=dataset", "data.dataset_name=nobody/nothing-here").data.read()
