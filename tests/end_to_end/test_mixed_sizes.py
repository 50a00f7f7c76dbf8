"""A run with clips of three shapes and two lengths, two clips at a time."""

import csv
import json
from collections import Counter

import pytest
from safetensors.torch import load_file

from cogvx.model import lora

CLIPS = [(160, 96, 20)] * 4 + [(96, 160, 20)] * 3 + [(160, 96, 7)] * 2 + [(128, 128, 20)]
MIXED = [
    *("model=nano_i2v", "data.buckets=auto", "data.fps=8", "train.train_batch_size=2"),
    *("train.max_train_steps=12", "train.checkpointing_steps=4", "train.logging_steps=1"),
    *("validation.heldout_steps=6", "data.max_bad_fraction=0.5"),
]
PREVIEW = ["validation.preview=latents", "validation.preview_steps=12"]


@pytest.fixture(scope="module")
def mixed_clips(make_clip, tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    for number, (width, height, frames) in enumerate(CLIPS):
        make_clip(root / f"{number}.mp4", width=width, height=height, frames=frames)
    # Too short for every bucket.
    make_clip(root / "10.mp4", frames=3)
    numbers = range(len(CLIPS) + 1)
    (root / "prompts.txt").write_text("".join(f"clip {n}\n" for n in numbers))
    (root / "videos.txt").write_text("".join(f"{n}.mp4\n" for n in numbers))
    return root


def table_of_buckets(said: str) -> list[str]:
    """With the numbers of clips, of steps and of uses."""
    lines = said.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("buckets"))
    return [line for line in lines[start:] if line.startswith(("buckets", "        "))][:6]


@pytest.mark.slow
def test_a_run_of_mixed_sizes_is_said_counted_and_resumed_exactly(run, stopped, mixed_clips, capfd):
    given = [f"data.instance_data_root='{mixed_clips}'", *MIXED, *PREVIEW]
    whole = run("whole", *given)
    said = capfd.readouterr().out
    assert "buckets bucket" in said and "a step takes 2 clips of one bucket" in said
    assert "New to it: 48x80, 80x48" in said and "10.mp4 is too short" in said
    with (whole / "dataset_report.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["size"]]
    sizes = Counter(row["size"] for row in rows)
    assert sizes == {"9x48x80": 4, "9x80x48": 3, "5x48x80": 2, "9x64x64": 1}
    assert {float(row["cropped"]) for row in rows} == {0}
    assert len(list((whole / "previews").glob("step_*/*.mp4"))) == 1
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] * line["seconds"] for line in lines if "seconds" in line]
    # Two clips with 32 tokens of text each.
    tokens = {2 * (32 + frames * 6 * 10) for frames in (2, 3)} | {2 * (32 + 3 * 64)}
    assert len(speeds) == 12
    assert all(min(abs(each / speed - 1) for each in tokens) < 0.02 for speed in speeds)

    run("look", "task=inspect", *given)
    looked = capfd.readouterr().out
    assert table_of_buckets(looked) == table_of_buckets(said) and len(table_of_buckets(said)) >= 5

    killed = stopped("killed", whole, 4)
    again = run("killed", *given)
    assert again == killed and "after step 4" in capfd.readouterr().out
    one, other = (load_file(folder / lora.WEIGHTS) for folder in (whole, again))
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


@pytest.mark.slow
def test_two_sources_share_the_steps_of_every_bucket(run, mixed_clips, capfd):
    sources = [
        f"data.sources.{name}.{setting}"
        for name, share in (("new", 0.75), ("old", 0.25))
        for setting in (
            "format=text_files",
            f"instance_data_root='{mixed_clips}'",
            f"id_token={name.upper()}",
            f"share={share}",
        )
    ]
    without = ["data.validation_fraction=0", "train.max_train_steps=6"]
    run("mix", "data=mix", *(f"++{each}" for each in sources), *MIXED, *without)
    rows = [line.split() for line in capfd.readouterr().out.splitlines() if "x48x80" in line]
    # The same clips twice. Those of one source are used three times as often.
    assert [row[1] for row in rows if row[0] == "9x48x80"] == ["8"]


@pytest.mark.slow
def test_without_buckets_a_batch_of_two_lengths_offers_them(run, mixed_clips, capfd):
    given = [f"data.instance_data_root='{mixed_clips}'", *MIXED, "data.buckets=null"]
    # The split could hold out all short clips.
    run("refused", *given, "data.validation_fraction=0", expect=2)
    assert "needs clips of one length" in (text := capfd.readouterr().err) and "auto" in text
