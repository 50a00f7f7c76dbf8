"""What is measured and flagged of clips and captions, on clips with known right answers."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from browser import CHROMIUM, Browser

from cogvx.data.buckets import Size
from cogvx.data.encode import NO_VAE, cache_of, encode_clips
from cogvx.data.flags import (
    FLAG_KINDS,
    estimate,
    flags_of_caption,
    flags_of_clip,
    flags_of_likeness,
    other_language,
)
from cogvx.data.inspect import Texts, inspected, write_dataset, write_report
from cogvx.data.looks import pairs_alike
from cogvx.data.measures import black_bars, hard_cuts, measured, moving, preview, shrunk
from cogvx.data.mp4 import write_video
from cogvx.data.sources import Example
from cogvx.data.split import split_clips
from cogvx.data.video import read_clip
from cogvx.records.dataset import write_dataset_page

ABOUT = {
    "frames": 9,
    "own_frames": 9,
    "first_frame": 0,
    "last_frame": 8,
    "repeated": 0,
    "file_frames": 9,
    "file_fps": 8.0,
    "file_width": 64,
    "file_height": 64,
    "cropped": 0.0,
    "moving": 0.3,
    "jumps": [],
    "bars": [0, 0, 0, 0],
}
EXAMPLE = Example("a cat on a beach", Path("a.mp4"), "prompts.txt:1")


def scene(frames: int, seed: int, *, height: int = 128, width: int = 192, moves: int = 3):
    """[F, H, W, 3] uint8: noise of large squares, with a bright square that moves."""
    generator = numpy.random.default_rng(seed)
    coarse = generator.integers(40, 200, (height // 16, width // 16, 3), numpy.uint8)
    picture = coarse.repeat(16, 0).repeat(16, 1)
    found = numpy.stack([picture] * frames)
    for number, frame in enumerate(found):
        left = (10 + moves * number) % (width - 40)
        frame[40:80, left : left + 40] = (250, 250, 40)
    return found


def pixels(frames: numpy.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def data(compose):
    sizes = ["data.height=128", "data.width=192", "data.max_num_frames=33", "data.fps=8"]
    return compose(*sizes).data


def clip_in(data, path: Path, frames: numpy.ndarray, fps: float = 8):
    write_video(path, frames, fps=fps)
    return read_clip(path, data)


# -- measures ------------------------------------------------------------------------------------


def test_a_clip_in_which_nothing_moves(data, tmp_path):
    still = measured(clip_in(data, tmp_path / "still.mp4", scene(33, 1, moves=0)))
    moves = measured(clip_in(data, tmp_path / "moves.mp4", scene(33, 1)))
    assert still["moving"] < 0.001 and 0.1 < moves["moving"] < 0.5
    assert still["jumps"] == moves["jumps"] == []
    assert moving(torch.zeros(1, 3, 4, 4)) is None, "a picture"


def test_a_hard_cut_is_found_at_its_frame(data, tmp_path):
    frames = numpy.concatenate([scene(20, 1), scene(13, 2)])
    clip = clip_in(data, tmp_path / "cut.mp4", frames)
    assert measured(clip)["jumps"] == [20]
    # At 16 frames per second every second frame is used: the new scene begins at frame 40.
    frames = numpy.concatenate([scene(40, 1), scene(26, 2)])
    assert measured(clip_in(data, tmp_path / "fast.mp4", frames, fps=16))["jumps"] == [40]


def test_fast_motion_and_slow_transitions_are_no_hard_cut():
    fast = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255
    assert hard_cuts(fast) == []
    fade = torch.linspace(0, 255, 33)[:, None, None, None].expand(33, 3, 32, 32)
    assert hard_cuts(fade) == []
    assert hard_cuts(fade[:1]) == hard_cuts(torch.zeros(9, 3, 8, 8)) == []


@pytest.mark.parametrize("sides", [(40, 40, 0, 0), (0, 0, 24, 26), (8, 0, 0, 0), (0, 0, 0, 0)])
def test_black_bars_have_their_size(data, tmp_path, sides):
    top, bottom, left, right = sides
    frames = scene(9, 1)
    frames[:, :top] = frames[:, 128 - bottom :] = 0
    frames[:, :, :left] = frames[:, :, 192 - right :] = 0
    found = measured(clip_in(data, tmp_path / "bars.mp4", frames))["bars"]
    # Compression blurs the edge.
    assert all(abs(one - other) <= 2 for one, other in zip(found, sides, strict=True)), found
    kinds = {flag.kind for flag in flags(data, bars=found)}
    assert ("black bars" in kinds) == (min(top, bottom) > 0 or min(left, right) > 0)


def test_a_black_clip_has_no_bars():
    assert black_bars(-torch.ones(5, 3, 32, 32)) == [0, 0, 0, 0]


def test_the_preview_plays_the_frames_of_the_clip(data, tmp_path):
    import av

    clip = clip_in(data, tmp_path / "a.mp4", scene(33, 1))
    (tmp_path / "preview.mp4").write_bytes(preview(clip, 8).tobytes())
    with av.open(str(tmp_path / "preview.mp4")) as file:
        assert file.streams.video[0].average_rate == 8
        found = numpy.stack([each.to_ndarray(format="rgb24") for each in file.decode(video=0)])
    assert found.shape == (33, 106, 160, 3)
    expected = shrunk(clip.frames, 160).permute(0, 2, 3, 1).numpy()
    assert abs(found - expected).mean() < 6
    assert (tmp_path / "preview.mp4").stat().st_size < 60_000


# -- flags ---------------------------------------------------------------------------------------


def flags(data, model_fps: float = 8, **about):
    return flags_of_clip(ABOUT | about, Size(33, 128, 192), data, EXAMPLE, model_fps)


@pytest.mark.parametrize(
    ("about", "kind", "said", "mend"),
    [
        ({"moving": 0.001}, "nothing moves", "Less than 0.5%", "skip_frames_start"),
        ({"jumps": [20]}, "hard cut", "at frame 20 of the file", "data.long_files=scenes"),
        ({"cropped": 0.6}, "cropped", "60% of the picture (64x64)", "data.buckets=auto"),
        ({"file_frames": 90}, "mostly unused", "frames 0 to 8 of 90", "data.long_files=sliding"),
        ({"repeated": 4, "file_fps": 4.2}, "frames repeated", "the file has 4.2", "data.fps=4"),
        ({"repeated": 4, "file_fps": 16}, "frames repeated", "at uneven times", "nothing"),
        ({"repeated": 4, "own_frames": 5}, "frames repeated", "file is shorter", "short_files"),
    ],
)
def test_each_flag_says_what_it_is_and_what_to_type(data, about, kind, said, mend):
    [flag] = flags(data, **about)
    assert flag.kind == kind and kind in FLAG_KINDS
    assert said in flag.said and mend in flag.mend


def test_a_good_clip_has_no_flag_nor_has_one_of_an_older_cache(data):
    assert flags(data) == []
    old = {name: ABOUT[name] for name in ABOUT if name not in ("moving", "jumps", "bars")}
    assert flags_of_clip(old, Size(33, 128, 192), data, EXAMPLE, 8) == []


def test_a_clip_that_plays_at_another_speed(data):
    every_frame = replace(data, fps=None)
    [flag] = flags_of_clip(ABOUT | {"file_fps": 24}, Size(33, 1, 1), every_frame, EXAMPLE, 8)
    assert flag.kind == "other speed" and "3 times slower" in flag.said
    assert flag.mend == "data.fps=8" and flags(data, model_fps=8.5) == []


def test_of_two_equal_clips_the_split_decides_what_is_said():
    names = ["a.mp4", "b.mp4"]
    [flag] = flags_of_likeness(1, ["train", "train"], 0, None, names)
    assert (flag.kind, flag.said) == ("same file", "It is the same file as a.mp4.")
    [flag] = flags_of_likeness(1, ["train", "train"], None, 0, names)
    assert flag.kind == "looks alike"
    [flag] = flags_of_likeness(1, ["held out", "train"], None, 0, names)
    assert flag.kind == "seen in training" and "that one is held out" in flag.said
    assert flags_of_likeness(1, ["held out", "train"], None, None, names) == []


def kinds_of(data, caption: str, text: dict | None = None, others: int = 0) -> list[str]:
    text = text or {"tokens": 9}
    found = flags_of_caption(replace(EXAMPLE, prompt=caption), text, data, 226, others)
    return [flag.kind for flag in found]


def test_captions_are_flagged(data):
    assert kinds_of(data, "a cat") == []
    assert kinds_of(data, "  ") == ["no caption"]
    assert kinds_of(data, "a cat", others=2) == ["same caption"]
    assert kinds_of(data, "a cat", {"tokens": 227}) == ["long caption"]
    assert kinds_of(data, "a cat", {"tokens": 226}) == []
    assert kinds_of(data, "a \N{CAT FACE}", {"tokens": 3, "unknown": ["\N{CAT FACE}"]}) == [
        "unknown letters"
    ]
    named = replace(data, id_token="RABBIT")
    assert kinds_of(named, "RABBIT RABBIT hops") == ["id_token"]
    assert kinds_of(named, "RABBIT hops") == [] and kinds_of(named, "RABBIT ") == ["no caption"]


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("A cat sits on the table in the evening sun", None),
        ("Eine Katze sitzt auf dem Tisch und schaut in die Sonne", "German"),
        ("Un chat est assis sur la table dans le soleil du soir", "French"),
        ("Un gato est\u00e1 sentado en la mesa y mira el sol", "Spanish"),
        ("\u4e00\u53ea\u732b\u5750\u5728\u684c\u5b50\u4e0a", "in other letters than English"),
        (
            "\u041a\u043e\u0448\u043a\u0430 \u0441\u0438\u0434\u0438\u0442",
            "in other letters than English",
        ),
        ("cat, table, evening, sun, film grain, close up", None),
        ("La La Land", None),
        ("A man from Rio de Janeiro plays the guitar on a beach", None),
    ],
)
def test_the_language_of_a_caption(caption, language):
    assert other_language(caption) == language


def test_tokens_are_estimated_where_no_tokenizer_is_at_hand():
    """T5's own tokenizer is not here: about 1.3 tokens for a word of English."""
    text = "A rabbit hops over a green meadow, filmed from the side; it stops and looks around."
    assert 17 <= estimate(text)["tokens"] <= 30 and estimate(text)["estimated"]


# -- all together --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looked(data, tmp_path_factory):
    """Five files: a clip, the same encoded again, its mirror image, a still one, and a text."""
    tmp_path = tmp_path_factory.mktemp("looked")
    frames = scene(33, 1)
    files = {
        "one": frames,
        "again": frames[:, ::2, ::2],
        "mirror": frames[:, :, ::-1],
        "still": scene(33, 5, moves=0),
    }
    for name, those in files.items():
        write_video(tmp_path / f"{name}.mp4", numpy.ascontiguousarray(those), fps=8)
    (tmp_path / "bad.mp4").write_text("no video")
    long = "many words " * 200
    captions = ["a <b>cat</b>", "a cat", "a dog", long, "none"]
    examples = [
        Example(caption, tmp_path / f"{name}.mp4", f"list:{number}")
        for number, (name, caption) in enumerate(zip([*files, "bad"], captions, strict=True))
    ]
    data = replace(data, max_bad_fraction=1.0)
    cache = cache_of(data)
    clips, rejected = encode_clips(examples, data, cache, NO_VAE, lambda line: None)
    digests = [cache.fingerprint(clip.example.video) for clip in clips]
    split = split_clips(digests, data, alike=pairs_alike([clip.look() for clip in clips]))
    return inspected(clips, split, rejected, data, Texts.estimated_of(clips, 226), 8)


@pytest.mark.slow
def test_the_table_and_the_page_say_what_is_odd(looked, tmp_path):
    kinds = {Path(row["video"]).stem: {f.kind for f in row["flags"]} for row in looked.rows}
    assert kinds == {
        "one": set(),
        "again": {"looks alike"},
        "mirror": set(),
        "still": {"nothing moves", "long caption"},
        "bad": {"left out"},
    }
    assert list(looked.counts()) == ["left out", "nothing moves", "looks alike", "long caption"]
    write_report(tmp_path, looked)
    assert "nothing moves; long caption" in (tmp_path / "dataset_report.csv").read_text()
    write_dataset(tmp_path, looked)
    text = write_dataset_page(tmp_path).read_text()
    assert text.count("<article") == 5 and text.count("data-src=") == 4
    assert "5 clips: " in text and "a &lt;b&gt;cat" in text and "<b>cat</b>" not in text
    assert "http://" not in text and "https://" not in text
    assert {path.name for path in (tmp_path / "dataset").iterdir()} == {
        f"{number:05d}.mp4" for number in range(1, 5)
    }


def test_of_very_many_clips_those_with_flags_are_shown_and_the_page_says_so(
    looked, tmp_path, monkeypatch
):
    from cogvx.data import inspect

    monkeypatch.setattr(inspect, "MOST_LISTED", 3)
    monkeypatch.setattr(inspect, "MOST_PLAYED", 1)
    write_dataset(tmp_path, looked)
    text = write_dataset_page(tmp_path).read_text()
    assert text.count("<article") == 3 and text.count("data-src=") == 1
    assert "3 of 5 clips are on this page, those with flags first" in text
    assert "1 of these 2 clips play here" in text


def test_what_the_model_does_not_see_of_a_caption_is_struck_through(looked, tmp_path):
    write_dataset(tmp_path, looked)
    found = json.loads((tmp_path / "dataset.json").read_text())
    found["rows"][3] |= {"prompt": "a long caption <i>", "cut_off": "caption <i>"}
    (tmp_path / "dataset.json").write_text(json.dumps(found))
    text = write_dataset_page(tmp_path).read_text()
    assert ">caption &lt;i&gt;</s>" in text and ">a long <s" in text


def test_looking_again_takes_what_is_known(looked, data, monkeypatch):
    examples = [clip.example for clip in looked.clips]
    monkeypatch.setattr("cogvx.data.encode.read_clip", None)
    data = replace(data, max_bad_fraction=1.0)
    clips, _ = encode_clips(examples, data, cache_of(data), NO_VAE, lambda line: None)
    assert [clip.about for clip in clips] == [clip.about for clip in looked.clips]


@pytest.mark.slow
def test_task_inspect_loads_no_model_and_says_what_it_found(run, clips, make_clip, capfd):
    make_clip(clips / "videos" / "0.mp4", width=300)
    (clips / "videos" / "5.mp4").write_text("no video")
    folder = run("look", "task=inspect", "model=5b", f"data.instance_data_root={clips}")
    said = capfd.readouterr().out
    assert "6 clips: " in said and "1 left out" in said and "encode" not in said
    lines = said.splitlines()
    page = next(line for line in lines if line.startswith("page    ") and "dataset.html" in line)
    assert lines.index(page) > next(n for n, line in enumerate(lines) if "cropped" in line)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["clips"] == 5 and summary["flags"]["left out"] == 1
    text = (folder / "dataset.html").read_text()
    assert "Numbers of tokens are estimates" in text
    with (folder / "dataset_report.csv").open(encoding="utf-8") as file:
        sizes = {row["size"] for row in csv.DictReader(file) if row["size"]}
    assert sizes == {"13x480x720"}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_the_clips_in_sight_play_and_can_be_filtered(looked, tmp_path):
    write_dataset(tmp_path, looked)
    page = write_dataset_page(tmp_path)
    with Browser(tmp_path / "profile", "--autoplay-policy=no-user-gesture-required") as browser:
        browser.open(page.as_uri())
        browser.until("document.querySelector('video').currentTime > 0")
        shown = "[...document.querySelectorAll('.clip')].filter(card => !card.hidden).length"
        assert browser.ask(shown) == 5
        browser.ask("document.querySelector('[data-kind=nothing_moves]').click()")
        assert browser.ask(shown) == 1
        browser.ask("document.querySelector('[data-kind=\"\"]').click()")
        browser.ask("order.value = 'moving'; order.onchange()")
        assert browser.ask("document.querySelector('.clip').dataset.name") == "still.mp4"
        assert browser.errors == []
