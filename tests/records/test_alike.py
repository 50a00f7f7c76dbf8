"""Runs whose held-out losses measure unlike things are never ranked together."""

from dataclasses import replace
from pathlib import Path

import pytest

from cogvx.data.buckets import Size
from cogvx.data.cache import Cache
from cogvx.data.cuts import Cut
from cogvx.data.encode import EncodedClip, EncodedCut
from cogvx.data.sources import Example
from cogvx.records import comparison, record
from cogvx.records.alike import JUDGED_PARTS, OTHER_BASE_LOSS, Groups, Judged
from cogvx.records.folders import list_folders
from cogvx.records.sweep import groups_of
from cogvx.runs import grid
from cogvx.training.judging import what_is_judged

OURS = {"clips": "a", "captions": "b", "noise": "8 timesteps, 2 noises"}


@pytest.fixture
def sweep(tmp_path):
    """sweep(judged, ...): a finished sweep of one job for each; the first has the lowest loss."""

    def make(*judged: dict, base_losses: tuple = ()) -> grid.Sweep:
        values = ",".join(str(number) for number in range(4, 4 + len(judged)))
        given = [f"data.fps={values}", f"output_dir={tmp_path / 'sweep'}"]
        made, jobs, _ = grid.sweep_of(given, grid.Composer())
        made.freeze(jobs, ["launch.py", "-m", given[0]])
        for number, (job, _) in enumerate(jobs):
            record.note(made.folder / job.name, steps=9, **judged[number])
            summary = {"status": "done", "objective": 0.05 + number / 100, "seconds": 1.0}
            if base_losses:
                summary["heldout_loss_before"] = base_losses[number]
            record.finish(made.folder / job.name, {**summary, "heldout_noise_floor": 0.02})
        return made

    return make


def places(rows):
    return [(row["folder"], row["group"], row["place"], row["tie"]) for row in rows]


@pytest.mark.slow
def test_places_and_ties_count_among_runs_that_are_judged_on_the_same(sweep, capsys):
    other = {"judged": OURS | {"captions": "c"}}
    made = sweep({"judged": OURS}, other, other, {"judged": OURS}, other)
    assert places(made.leaderboard()) == [
        ("fps-5", 1, 1, None),
        ("fps-6", 1, 2, True),
        ("fps-8", 1, 3, False),
        ("fps-4", 2, 1, None),
        ("fps-7", 2, 2, False),
    ]
    comparison.conclude(made)
    said = capsys.readouterr().out
    assert "2 groups of runs measures unlike things (other captions of held-out clips)" in said
    assert said.count("best    group ") == said.count("repeat the best:") == 2
    page = (made.folder / "report.html").read_text(encoding="utf-8")
    assert "Not all of these runs are comparable" in page and "Best is" not in page
    assert "Best of group 1 is fps 5" in page and "Best of group 2 is fps 4" in page
    assert page.count('<tr class="best">') == 2 and "By setting" not in page
    list_folders(made.folder.parent)
    assert "not comparable" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_that_are_judged_on_the_same_have_one_best(sweep, capsys):
    made = sweep({"judged": OURS}, {"judged": OURS})
    comparison.conclude(made)
    said = capsys.readouterr().out
    assert "comparable" not in said and said.count("best    ") == 1
    assert "Best is fps 4" in (made.folder / "report.html").read_text(encoding="utf-8")


def test_records_of_earlier_versions_are_told_apart_by_the_loss_before_training(sweep):
    made = sweep({}, {}, {}, base_losses=(0.1160, 0.1166, 0.1302))
    assert [row["group"] for row in made.leaderboard()] == [1, 1, 2], "fp8 beside fp32 is alike"


def test_other_models_noises_and_losses_before_training_are_named():
    known = {
        "a": Judged(OURS | {"model": "1"}, 0.1),
        "b": Judged(OURS | {"model": "2"}, 0.1),
        "c": Judged(OURS | {"model": "1", "noise": "4 timesteps, 2 noises"}, 0.1),
        "d": Judged(OURS | {"model": "1"}, 0.2),
        "to come": Judged({}, None),
    }
    found = Groups.of(known)
    assert len({*found.numbers.values()}) == 4 and found.numbers["to come"] == 1
    for said in ("another base model", "number of noises", "another held-out loss before"):
        assert said in found.in_words
    assert Groups.of({}).in_words is None


@pytest.mark.slow
def test_what_is_judged_follows_clips_frames_sizes_captions_and_noise_alone(compose, tmp_path):
    cache, videos = Cache(tmp_path / "cache"), [tmp_path / name for name in ("0.mp4", "1.mp4")]
    for path in videos:
        path.write_bytes(path.name.encode())
    shapes = {"latent_moments": [32, 3, 8, 8]}
    about = {"first_frame": 0, "last_frame": 8, "frames": 9, "repeated": 0, "shapes": shapes}
    cut = Cut(Size(9, 64, 64), first=0)

    def clip_of(video, latents="fp32", cut=cut, prompt="a cat", **facts):
        example = Example(prompt, video, f"list:{latents}")
        return EncodedClip(example, (EncodedCut(cut, Path(latents), about | facts),))

    clips = [clip_of(path) for path in videos]

    def judged(clips=clips, *overrides):
        return what_is_judged(clips, compose(*overrides), cache)

    ours = judged()
    moved = tmp_path / "elsewhere.mp4"
    moved.write_bytes(videos[0].read_bytes())
    same = [clip_of(moved, "bf16"), clips[1]]
    assert judged(same, "train.mixed_precision=bf16", "memory=low", "seed=3") == ours
    smaller = {"latent_moments": [32, 3, 8, 4]}
    for other in (
        [clips[1], clips[0]],
        clips[:1],
        [clip_of(videos[0], last_frame=7), clips[1]],
        [clip_of(videos[0], shapes=smaller), clips[1]],
        [clip_of(videos[0], cut=replace(cut, flipped=True)), clips[1]],
    ):
        assert judged(other)["clips"] != ours["clips"]
    captioned = judged([clip_of(videos[0], prompt="CAT a cat"), clips[1]])
    assert captioned["captions"] != ours["captions"] and captioned["clips"] == ours["clips"]
    for setting in ("heldout_timesteps=4", "heldout_draws=2"):
        assert judged(clips, f"validation.{setting}")["noise"] != ours["noise"]


@pytest.mark.slow
def test_runs_record_what_they_are_judged_on(run):
    one = ["train.max_train_steps=1", "scheduler.lr_warmup_steps=0"]
    runs = {
        "fp32": run("fp32", *one),
        "bf16": run("bf16", *one, "train.mixed_precision=bf16", "seed=3"),
        "other words": run("words", *one, "data.id_token=CAT"),
        "tiles": run("tiles", *one, "memory.vae_tiling=true"),
    }
    found = groups_of(runs)
    assert found.numbers == {"fp32": 1, "bf16": 1, "other words": 2, "tiles": 3}
    assert found.reasons == [JUDGED_PARTS["captions"], OTHER_BASE_LOSS]
