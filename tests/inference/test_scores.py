"""The base and the tuned model in pairs: differences, intervals, and the files."""

import csv
import json

import numpy
import pytest

from cogvx.data import demo, world
from cogvx.inference import scores
from cogvx.inference.scores import VideoRequest, VideoScores


def scored(kind, values) -> list[VideoScores]:
    return [
        VideoScores(VideoRequest(kind, f"p{i}", i), {scores.NEW_MEASURE: value, "all": value})
        for i, value in enumerate(values)
    ]


def test_a_sure_difference_has_a_narrow_interval_and_none_holds_zero():
    [sure, _] = scores.comparisons(scored("taught", [0.0] * 20), scored("taught", [1.0] * 20))
    assert (sure.base, sure.tuned, sure.difference, sure.low, sure.high) == (0, 1, 1, 1, 1)
    [same, _] = scores.comparisons(scored("taught", [0, 1] * 10), scored("taught", [0, 1] * 10))
    assert (same.difference, same.low, same.high) == (0, 0, 0), "of pairs, not of two samples"


def test_the_interval_is_the_bootstraps():
    generator = numpy.random.default_rng(5)
    base, tuned = generator.normal(0, 1, 400), generator.normal(0, 1, 400) + 0.3
    found = scores.comparison("taught", "x", numpy.stack([base, tuned], axis=1))
    error = (tuned - base).std(ddof=1) / 20
    assert found.difference == pytest.approx((tuned - base).mean())
    assert (found.low, found.high) == pytest.approx(
        (found.difference - 1.96 * error, found.difference + 1.96 * error), abs=0.02
    )


def test_a_video_is_judged_by_what_its_prompt_asks_for():
    scene = demo.zorb(world.Scene("square", "red", "blue", "left", width=64, height=64))
    frames = world.draw_clip(scene)
    right = scores.measure_video(frames, scene.caption())
    assert all(right[name] == 1 for name in ("shape", "colour", "direction", "background", "all"))
    other = scores.measure_video(frames, "A green circle moves up over a blue background.")
    assert [other[name] for name in ("shape", "colour", "direction", "background", "all")] == [
        0,
        0,
        0,
        1,
        0,
    ]
    assert set(scores.measure_video(frames, "a rabbit")) == {"motion", "saturation"}
    assert scores.motion_of(frames) > 0.01 and scores.motion_of(frames[:1].repeat(9, axis=0)) == 0


def test_what_is_written_can_be_read(tmp_path):
    base, tuned = scored("taught", [0, 0, 1]), scored("taught", [1, 1, 1])
    found = scores.comparisons(base, tuned)
    scores.write_evaluation(
        tmp_path, {"base": base, "result": tuned}, {"result": found}, {"heldout_loss": 0.5}
    )
    rows = list(csv.DictReader((tmp_path / "evaluation.csv").open()))
    assert len(rows) == 6 and {row["variant"] for row in rows} == {"base", "result"}
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["heldout_loss"] == 0.5 and written["comparisons"]["result"][0]["tuned"] == 1
    assert "new concept   colour" in scores.comparison_table(found)
    assert scores.score_line(found) == "" and scores.summary_scores(found) == {}, (
        "without the other kind"
    )
    both = scores.comparisons([*base, *scored("other", [1, 1])], [*tuned, *scored("other", [1, 0])])
    assert "100% of 3 videos show it (base model 33%)" in scores.score_line(both)
    assert scores.summary_scores(both)["score_other"] == 0.5
