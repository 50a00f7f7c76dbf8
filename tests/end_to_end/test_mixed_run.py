"""Two sources in one run: a folder with several captions for a clip, and an archive of others."""

import csv
import io
import json
import tarfile

import pytest

from cogvx.data import world
from cogvx.files import read_json_lines


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """new/: six clips, each with a sentence and a line of tags. old/0.tar: six, and one is junk."""
    root = tmp_path_factory.mktemp("sources")
    place = world.render_clips(root / "made", world.scenes(12, 1), "clips")
    captions = (place / "prompts.txt").read_text().splitlines()
    videos = [place / name for name in (place / "videos.txt").read_text().splitlines()]
    (root / "new").mkdir()
    (root / "old").mkdir()
    with tarfile.open(root / "old/0.tar", "w") as archive:
        for number, (video, caption) in enumerate(zip(videos, captions, strict=True)):
            raw = b"junk" if number == 9 else video.read_bytes()
            if number < 6:
                (root / f"new/{number}.mp4").write_bytes(raw)
                (root / f"new/{number}.txt").write_text(f"{caption}\na shape, one, two, three\n")
                continue
            for ending, content in (("mp4", raw), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return root


@pytest.mark.slow
def test_a_mix_trains_and_judges_each_source_apart(sources, run):
    settings = {
        "new.instance_data_root": sources / "new",
        "new.id_token": "ZORB",
        "new.id_token_share": 0.5,
        "new.caption_split": "lines",
        "new.tag_shuffles": 2,
        "old.format": "webdataset",
        "old.instance_data_root": sources / "old",
        "old.share": 0.3,
    }
    typed = [f"data.sources.{key}='{value}'" for key, value in settings.items()]
    typed = [
        each if "share" not in each and "shuff" not in each else each.replace("'", "")
        for each in typed
    ]
    more = ["data.validation_fraction=0.4", "train.max_train_steps=6", "train.logging_steps=1"]
    folder = run("mix", "data=mix", *typed, *more)
    judged = [line for line in read_json_lines(folder / "metrics.jsonl") if "heldout_loss" in line]
    assert [set(line["heldout_by_source"]) for line in judged] == [{"new", "old"}] * 2
    assert "By source: new from " in (folder / "report.html").read_text()
    with (folder / "dataset_report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    [junk] = [row for row in rows if row["use"].startswith("left out")]
    assert len(rows) == 12 and junk["origin"] == "old 0.tar:9"
    assert all(row["prompt"].startswith("ZORB ") == row["origin"].startswith("new") for row in rows)
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
