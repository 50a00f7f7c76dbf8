"""The split: by content, so clips that come and go move no other; what was trained on stays so."""

import csv
import hashlib
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from cogvx.data import split
from cogvx.data.cache import Cache
from cogvx.data.looks import look_of, pairs_alike
from cogvx.data.mp4 import write_video
from cogvx.data.split import (
    HELD_OUT,
    LEFT_FROM_JUDGING,
    LEFT_FROM_TRAINING,
    TRAINED_ON,
    Earlier,
    earlier_split,
    run_around,
    split_clips,
)
from cogvx.data.world import draw_clip, scenes
from cogvx.errors import UserError


def files(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


def use_by_file(digests: list[str], data, **more) -> dict[str, str]:
    return dict(zip(digests, split_clips(digests, data, **more).uses, strict=True))


@pytest.mark.parametrize(
    ("count", "fraction", "fewest", "most"),
    [
        (1000, 0.01, 4, 20),
        (12, 0.15, 1, 5),
        (3, 0.0001, 1, 1),
        (2, 0.99, 1, 1),
        (4, 0.99, 1, 3),
        (1, 0.5, 0, 0),
        (9, 0, 0, 0),
        (999, 0.5, 20, 20),
    ],
)
def test_some_are_held_out_but_never_all(compose, count, fraction, fewest, most):
    data = compose(f"data.validation_fraction={fraction}").data
    found = split_clips(files(count), data)
    assert len(found.uses) == count and fewest <= len(found.places(HELD_OUT)) <= most
    assert len(found.places(HELD_OUT)) + len(found.places(TRAINED_ON)) == count
    assert found == split_clips(files(count), data)


def test_the_share_is_that_of_the_fraction_and_the_seed_draws_others(compose):
    one = compose("data.validation_fraction=0.15", "data.max_validation_clips=10000").data
    other = replace(one, validation_seed=1)
    first, second = (set(split_clips(files(4000), d).places(HELD_OUT)) for d in (one, other))
    assert 0.13 < len(first) / 4000 < 0.17 and 0.13 < len(second) / 4000 < 0.17
    assert len(first & second) < len(first) / 3


def test_clips_that_come_go_or_change_places_move_no_other(compose):
    data = compose("data.validation_fraction=0.15").data
    every = use_by_file(files(60), data)
    for seed in range(10):
        some = random.Random(seed).sample(files(60), 50)
        assert use_by_file(some, data) == {digest: every[digest] for digest in some}


def test_at_the_most_a_clip_that_comes_or_goes_moves_one_other(compose):
    data = compose("data.validation_fraction=0.5", "data.max_validation_clips=5").data
    every = use_by_file(files(60), data)
    assert list(every.values()).count(HELD_OUT) == 5
    for gone in files(60):
        fewer = use_by_file([each for each in files(60) if each != gone], data)
        moved = [digest for digest, use in fewer.items() if use != every[digest]]
        assert len(moved) == (every[gone] == HELD_OUT)


def test_examples_of_one_file_are_on_one_side(compose):
    """As sliding windows, other captions and files that are listed twice are."""
    data = compose("data.validation_fraction=0.3").data
    digests = [digest for digest in files(30) for _ in range(4)]
    random.Random(0).shuffle(digests)
    uses = split_clips(digests, data).uses
    assert len({*zip(digests, uses, strict=True)}) == 30
    assert 4 <= uses.count(HELD_OUT) <= 20 and uses.count(LEFT_FROM_JUDGING) == 0


def test_a_file_with_more_examples_than_may_be_judged(compose):
    data = compose("data.validation_fraction=0.5", "data.max_validation_clips=3").data
    digests = [digest for digest in files(8) for _ in range(5)]
    uses = split_clips(digests, data).uses
    assert uses.count(HELD_OUT) == 3 and uses.count(LEFT_FROM_JUDGING) == 2
    assert len({d for d, use in zip(digests, uses, strict=True) if use != TRAINED_ON}) == 1
    # A small file is held out rather than a part of a large one.
    uses = split_clips([*digests, *files(30)[8:]], data).uses
    assert uses.count(HELD_OUT) == 3 and uses.count(LEFT_FROM_JUDGING) == 0
    assert split_clips(files(1) * 9, data).uses == [TRAINED_ON] * 9


def test_clips_that_look_alike_are_on_one_side_wherever_they_are_listed(compose):
    data = compose("data.validation_fraction=0.3").data
    digests = files(40)
    alike = [(place, place + 20) for place in range(20)]
    found = split_clips(digests, data, alike=alike)
    assert found.uses[:20] == found.uses[20:] and 4 <= found.uses.count(HELD_OUT) <= 20
    assert found.first_alike == [None] * 20 + [*range(20)]
    assert use_by_file(digests[::-1], data, alike=alike) == use_by_file(digests, data, alike=alike)
    apart = split_clips(digests, data).uses
    assert apart[:20] != apart[20:]


def test_clips_that_all_look_alike_are_held_out_nevertheless_and_it_is_said(compose):
    data = compose("data.validation_fraction=0.3").data
    found = split_clips(files(9), data, alike=[(0, other) for other in range(1, 9)])
    assert found.uses == split_clips(files(9), data).uses and HELD_OUT in found.uses
    assert found.said[0].startswith("warning all clips look alike")


def test_more_train_clips_keep_the_fewer_and_the_held_out_ones_stay(compose):
    every = compose("data.max_train_clips=null").data
    fewer, more = (replace(every, max_train_clips=count) for count in (3, 7))
    few, many, all_of_them = (split_clips(files(12), data) for data in (fewer, more, every))
    out = all_of_them.places(HELD_OUT)
    assert few.places(HELD_OUT) == many.places(HELD_OUT) == out
    assert (len(few.places(TRAINED_ON)), len(many.places(TRAINED_ON))) == (3, 7)
    assert (
        {*few.places(TRAINED_ON)} < {*many.places(TRAINED_ON)} < {*all_of_them.places(TRAINED_ON)}
    )
    assert few.uses.count(LEFT_FROM_TRAINING) == 12 - 3 - len(out)
    with pytest.raises(
        UserError, match=r"data.max_train_clips=7, but only 4 clips can be trained on"
    ):
        split_clips(files(6), more)
    with pytest.raises(UserError, match=r"data.max_train_clips=0: must be 1 or more"):
        compose("data.max_train_clips=0")


# -- earlier runs --------------------------------------------------------------------------------


def test_what_was_trained_on_is_never_held_out(compose, tmp_path):
    """Whatever comes, goes, and is set anew."""
    data, cache = compose("data.validation_fraction=0.3").data, Cache(tmp_path / "cache")
    first = split_clips(files(30), data)
    first.write(tmp_path / "one")
    earlier = earlier_split([tmp_path / "one", tmp_path / "nothing"], cache)
    assert earlier.folders == (tmp_path / "one",)
    again = split_clips(files(30), data, earlier=earlier)
    assert again.uses == first.uses and again.said == []
    trained = {files(30)[place] for place in first.places(TRAINED_ON)}
    for seed in range(5):
        other = replace(data, validation_seed=seed, validation_fraction=0.6)
        found = split_clips(files(45)[5:], other, earlier=earlier)
        out = {files(45)[5:][place] for place in found.places(HELD_OUT)}
        assert out and not out & trained
    assert "stay in training instead of being held out" in found.said[0]


def test_a_clip_that_looks_like_one_that_was_trained_on_is_trained_on(compose):
    data = compose("data.validation_fraction=0.5").data
    aside = split_clips(files(20), data).places(HELD_OUT)[0]
    earlier = Earlier(trained_on=frozenset({files(21)[20][: split.SHORT_DIGEST]}))
    uses = split_clips(files(21), data, alike=[(aside, 20)], earlier=earlier).uses
    assert uses[aside] == uses[20] == TRAINED_ON and HELD_OUT in uses


def test_held_out_clips_stay_held_out_beside_new_ones_when_only_few_may_be(compose, tmp_path):
    data = compose("data.validation_fraction=0.5", "data.max_validation_clips=5").data
    first = split_clips(files(20), data)
    first.write(tmp_path)
    earlier = earlier_split([tmp_path], Cache(tmp_path))
    assert split_clips(files(400), data).uses[:20] != first.uses
    assert split_clips(files(400), data, earlier=earlier).uses[:20] == first.uses


def test_a_run_that_goes_on_remembers_clips_that_are_gone_and_come_back(compose, tmp_path):
    data, cache = compose("data.validation_fraction=0.4").data, Cache(tmp_path)
    first = split_clips(files(20), data)
    first.write(tmp_path)
    earlier = earlier_split([tmp_path], cache)
    kept = files(20)[10:]
    split_clips(kept, data, earlier=earlier).write(tmp_path)
    other = replace(data, validation_fraction=0.9)
    found = split_clips(files(20), other, earlier=earlier_split([tmp_path], cache))
    assert not {*found.places(HELD_OUT)} & {*first.places(TRAINED_ON)}


def test_all_were_trained_on(compose):
    data = compose("data.validation_fraction=0.3").data
    earlier = Earlier(trained_on=frozenset(digest[: split.SHORT_DIGEST] for digest in files(9)))
    assert split_clips(files(9), data, earlier=earlier).uses == [TRAINED_ON] * 9


def test_a_run_of_an_earlier_version_is_known_by_its_report(tmp_path):
    clips = [tmp_path / f"{number}.mp4" for number in range(2)]
    for clip in clips:
        clip.write_bytes(clip.name.encode())
    rows = [f"train,{clips[0]}", f"held out,{clips[1]}", f"train,{tmp_path / 'gone.mp4'}"]
    (tmp_path / "dataset_report.csv").write_text("\n".join(["use,video", *rows]))
    cache = Cache(tmp_path / "cache")
    assert earlier_split([tmp_path], cache) == Earlier()  # it never trained
    (tmp_path / "metrics.jsonl").write_text("{}")
    earlier = earlier_split([tmp_path], cache)
    trained, held_out = (cache.fingerprint(clip)[: split.SHORT_DIGEST] for clip in clips)
    assert (earlier.trained_on, earlier.held_out) == ({trained}, {held_out})


def test_the_run_of_a_file_that_a_lora_starts_from(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step_5"
    step.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    for place in (tmp_path / "run", tmp_path / "run" / "lora.safetensors", step, step / "a.bin"):
        assert run_around(place) == tmp_path / "run"
    assert run_around(tmp_path / "lora.safetensors") is None


# -- looks ---------------------------------------------------------------------------------------


def look(frames: numpy.ndarray) -> str:
    return look_of(frames[[0, len(frames) // 2, -1]])


@pytest.mark.slow
def test_a_clip_that_is_encoded_again_looks_alike_and_its_mirror_image_does_not(tmp_path):
    import av

    frames = draw_clip(scenes(1, seed=3)[0])
    write_video(tmp_path / "a.mp4", frames, fps=8)
    with av.open(str(tmp_path / "a.mp4")) as file:
        again = numpy.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    half = again[:, ::2, ::2]
    looks = [look(each) for each in (frames, again, half, frames[:, :, ::-1], frames[::-1])]
    assert len({*looks}) == 5
    assert {*pairs_alike(looks)} <= {(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)}
    assert len(pairs_alike(looks)) == 3


def test_different_clips_of_one_little_world_do_not_look_alike():
    looks = [look(draw_clip(scene)) for scene in scenes(60, seed=3)]
    assert pairs_alike(looks) == [] and pairs_alike([*looks, looks[7]]) == [(7, 60)]


def test_near_pairs_are_those_of_comparing_all_with_all_and_many_are_fast():
    generator = numpy.random.default_rng(0)
    values = generator.integers(0, 255, (1500, 144)).clip(60, 200)
    values[750:] = values[:750] + generator.integers(0, 9, (750, 1)) - 4
    looks = [bytes(row.tolist()).hex() for row in values]
    apart = [(a, a + 750) for a in range(750) if abs(values[a] - values[a + 750]).max() <= 2]
    found = {tuple(sorted(pair)) for pair in pairs_alike(looks)}
    assert found == set(apart) and 300 < len(apart) < 500
    started = time.monotonic()
    pairs_alike([bytes(row).hex() for row in generator.integers(0, 255, (8000, 144), numpy.uint8)])
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_a_run_that_starts_from_another_ones_lora_judges_on_none_of_its_clips(run, capfd):
    def files(folder: Path, use: str) -> set[str]:
        with (folder / "dataset_report.csv").open(encoding="utf-8") as file:
            return {row["video"] for row in csv.DictReader(file) if row["use"] == use}

    first = run("a", "train.max_train_steps=3")
    again = ["train.max_train_steps=3", "data.validation_seed=3", "data.validation_fraction=0.4"]
    second = run("b", *again, f"lora.init_from={first}")
    assert "in training instead of being held out: " in capfd.readouterr().out
    assert files(second, HELD_OUT) and files(first, HELD_OUT)
    assert not files(second, HELD_OUT) & files(first, TRAINED_ON)
    # Without the first run it would be otherwise.
    third = run("c", *again)
    assert files(third, HELD_OUT) & files(first, TRAINED_ON)


def test_each_source_of_a_mix_holds_out_a_clip(compose):
    data = compose("data.validation_fraction=0.05").data
    digests = files(60)
    alone = split_clips(digests, data)
    sources = ["many"] * 50 + ["few"] * 9 + ["one"]
    mixed = split_clips(digests, data, sources=sources)
    assert {*alone.places(HELD_OUT)} <= {*mixed.places(HELD_OUT)}
    assert {sources[place] for place in mixed.places(HELD_OUT)} == {"many", "few"}
    assert split_clips(digests, data, sources=[""] * 60) == alone
