"""task=generate makes the videos that training would make, and a page of them."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from cogvx.errors import UserError
from cogvx.evaluation import enhancing, gallery, wanted
from cogvx.evaluation.wanted import Wanted
from cogvx.options import tasks

BF16 = "train.mixed_precision=bf16"
SHORT = ["train.max_train_steps=4", "train.checkpointing_steps=2"]
VIDEOS = ["validation.num_validation_videos=1", "validation.num_inference_steps=2"]


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nano", "nano_i2v"])
def test_the_videos_of_validation_come_out_again_bit_for_bit(run, trained, model):
    first = trained(*SHORT, *VIDEOS, f"model={model}")
    made = run("g", "task=generate", f"task.run={first}", *VIDEOS, f"model={model}")
    validation = first / "validation"
    for theirs, ours in (("base", "base"), ("step_000004", "result")):
        expected = (validation / theirs / "01_seed42.mp4").read_bytes()
        assert (made / "videos" / ours / "001_seed42.mp4").read_bytes() == expected
    assert (made / "videos.png").is_file()


@pytest.mark.slow
def test_strengths_checkpoints_and_seeds_stand_beside_each_other(run, trained, monkeypatch):
    first = trained(*SHORT, *VIDEOS)
    asked = ["task=generate", f"task.run={first}", *VIDEOS, "task.prompt=one:::two"]
    asked += ["task.strengths=[0.5,1.0]", "task.checkpoints=true", "task.seeds=[1,2]"]
    folder = run("g", *asked)
    names = ["base"]
    names += [f"{n}{s}" for n in ("step_000002", "step_000004", "result") for s in (" x 0.5", "")]
    index = json.loads((folder / "videos.json").read_text())
    assert [(row["prompt"], row["seed"]) for row in index] == [
        ("one", 1),
        ("one", 2),
        ("two", 1),
        ("two", 2),
    ]
    assert [label for label, _ in index[0]["videos"]] == names
    assert len(files(folder)) == 4 * len(names)
    result = folder / "videos" / "result"
    assert len({path.read_bytes() for path in result.glob("*.mp4")}) == 4, "seeds and prompts tell"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<video") == 4 * len(names) and "two (seed 2)" in page
    assert page.count('class="row"') == 4 * 3, "each checkpoint begins a row"
    # A run that was interrupted makes only what is missing.
    (folder / "summary.json").unlink()
    whole = (result / "003_seed1.mp4").read_bytes()
    (result / "003_seed1.mp4").unlink()
    made, generate = [], gallery.VideoGenerator.generate
    monkeypatch.setattr(
        gallery.VideoGenerator,
        "generate",
        lambda self, *given: made.append(given[2:4]) or generate(self, *given),
    )
    run("g", *asked)
    assert made == [("two", 1)] and (result / "003_seed1.mp4").read_bytes() == whole


@pytest.mark.slow
def test_the_base_model_alone_and_a_checkpoint_alone(run, trained):
    first = trained(*SHORT, *VIDEOS)
    folder = run("g", "task=generate", *VIDEOS, "task.prompt=one")
    assert files(folder) == ["videos/base/001_seed42.mp4"]
    checkpoint = first / "checkpoints" / "step_000002"
    asked = ["task.prompt=one", "task.base=false", f"task.run={checkpoint}"]
    folder = run("h", "task=generate", *VIDEOS, *asked)
    assert files(folder) == ["videos/result/001_seed42.mp4"]
    folder = run("i", "task=generate", *VIDEOS, *asked, "task.strengths=[0,1]")
    assert files(folder) == ["videos/base/001_seed42.mp4", "videos/result/001_seed42.mp4"]


def task(**given) -> tasks.GenerateTask:
    usual = dict.fromkeys(field.name for field in dataclasses.fields(tasks.GenerateTask))
    return tasks.GenerateTask(**usual | {"prompt_separator": ":::"} | given)


def test_prompts_from_files(tmp_path):
    (tmp_path / "p.txt").write_text("a cat, (sitting)\n\n a dog \na dog\n", encoding="utf-8")
    found = wanted.wanted_prompts(task(prompts_file=tmp_path / "p.txt"))
    assert found == [Wanted("a cat, (sitting)"), Wanted("a dog")]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "image": "x.png"}\n\n{"prompt": "b"}\n')
    assert wanted.wanted_prompts(task(prompts_file=tmp_path / "p.jsonl")) == [
        Wanted("a", tmp_path / "x.png"),
        Wanted("b"),
    ]
    (tmp_path / "p.csv").write_text('image,prompt\n,"a, b"\ny.png,c\n')
    assert wanted.wanted_prompts(task(prompts_file=tmp_path / "p.csv")) == [
        Wanted("a, b"),
        Wanted("c", tmp_path / "y.png"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "\n \n", "holds no prompt: give at least one"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', r"p.jsonl:2 is not JSON"),
        ("p.jsonl", '["a"]', r"p.jsonl:1 is no object"),
        ("p.csv", "text\na\n", r"p.csv:2 has no text called prompt"),
    ],
)
def test_files_that_are_no_prompts_are_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        wanted.wanted_prompts(task(prompts_file=tmp_path / name))


def test_the_prompts_of_a_run(trained, tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "inference.json").write_text('{"call": {"prompt": "the example"}}')
    assert wanted.wanted_prompts(task(run=tmp_path)) == [Wanted("the example")]
    names = {"01_seed1": "a", "01_seed2": "a", "02_seed1": "b"}
    (tmp_path / "validation" / "prompts.json").write_text(json.dumps(names))
    assert wanted.wanted_prompts(task(run=tmp_path)) == [Wanted("a"), Wanted("b")]
    shutil.rmtree(tmp_path / "validation")
    (tmp_path / "inference.json").unlink()
    with pytest.raises(UserError, match=r"task\.prompt"):
        wanted.wanted_prompts(task(run=tmp_path))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "task.prompt must be given, or task.prompts_file, or task.run"),
        (["task.prompt=a", "task.prompts_file=p.txt"], "are set together: give one of them"),
        (["task.held_out_clips=2"], "task.held_out_clips is of a run"),
        (["task.prompt=a", "task.video_strength=0"], "above 0 .the clip itself. and at most 1"),
        (["task.prompt=a", "task.video_strength=1.1"], "task.video_strength=1.1"),
        (["task.prompt=a", "task.enhancer_url=http://x"], "give the model's name on that server"),
        (["task.prompt=a", "task.enhancer=x", "task.enhancer_url=x:1"], "must begin with http://"),
        (["task.prompt=a", "task.seeds=[]"], "task.seeds"),
        (["task.prompt=a", "task.strengths=[-1]"], "must be numbers of 0 .the base model. or more"),
        (["task.prompt=a", "parallel=ddp", "parallel.num_processes=2"], "one process"),
    ],
)
def test_wrong_settings_are_said(compose, asked, said):
    with pytest.raises(UserError, match=said):
        compose("task=generate", *asked)


def test_a_kernel_that_this_machine_lacks_is_refused(run, capfd):
    run("a", "task=generate", "task.prompt=a", "train.attention=fa3", BF16, expect=2)
    said = capfd.readouterr().err
    assert "train.attention=fa3: it needs an NVIDIA GPU" in said and "Traceback" not in said


@pytest.mark.slow
def test_images_that_are_missing_or_not_wanted(run, tmp_path, capfd):
    asked = ["task=generate", "task.prompt=a", *VIDEOS]
    run("a", *asked, "model=nano_i2v", expect=2)
    assert "image-to-video needs the first frame of 'a'. Give one" in capfd.readouterr().err
    run("b", *asked, "model=nano_i2v", f"task.image={tmp_path / 'x.png'}", expect=2)
    assert "x.png does not exist. Give one: task.image=" in capfd.readouterr().err
    (tmp_path / "text.png").write_text("no picture")
    run("d", *asked, "model=nano_i2v", f"task.image={tmp_path / 'text.png'}", expect=2)
    assert "the prompt 'a' has an image" in (said := capfd.readouterr().err)
    assert "text.png, that is no picture (10 bytes)" in said
    run("c", *asked, f"task.image={tmp_path / 'x.png'}", expect=2)
    assert "is for image-to-video, and this is text-to-video" in capfd.readouterr().err


@pytest.mark.slow
def test_held_out_captions_stand_beside_their_clips(run, trained):
    first = trained(*SHORT, *VIDEOS)
    folder = run("g", "task=generate", f"task.run={first}", *VIDEOS, "task.held_out_clips=2")
    with (first / "dataset_report.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["use"] == "held out"]
    index = json.loads((folder / "videos.json").read_text())
    assert [row["prompt"] for row in index] == [row["prompt"] for row in rows[:2]]
    assert [label for label, _ in index[0]["videos"]] == ["held-out clip", "base", "result"]
    assert len(files(folder)) == 6
    assert "held-out clip" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_written_out_prompts(run, tmp_path, make_clip, monkeypatch):
    """The same prompt twice, with two clips. The model is asked only once."""
    answers = iter(["A cat walks.", "A dog walks."])
    monkeypatch.setattr(enhancing, "written_out", lambda *given: next(answers))
    clips = [make_clip(tmp_path / f"{n}.mp4", frames=9 + 8 * n) for n in range(2)]
    rows = [{"prompt": "walk", "video": clip.name} for clip in clips]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["task=generate", f"task.prompts_file={tmp_path / 'p.jsonl'}", *VIDEOS]
    asked += ["task.enhancer=small", "task.enhancer_url=http://127.0.0.1:9"]
    folder = run("g", *asked)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "walk (seed 42), written out: A cat walks." in page and "source clip" in page
    (folder / "summary.json").unlink()
    (folder / "videos" / "base" / "002_seed42.mp4").unlink()
    (tmp_path / "p.jsonl").write_text('{"prompt": "another"}\n')
    run("g", *asked)
    index = json.loads((folder / "videos.json").read_text())
    assert [(row["asked"], row["prompt"]) for row in index] == [
        ("walk", "A cat walks."),
        ("walk", "A dog walks."),
    ]


def test_the_captions_of_a_run_that_held_nothing_out(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="held out no clip"):
        wanted.wanted_prompts(task(run=tmp_path, held_out_clips=2))
    report = 'use,prompt,video\ntrain,a,a.mp4\nheld out,"b,\nc",b.mp4\nheld out,d,d.mp4\n'
    (tmp_path / "dataset_report.csv").write_text(report)
    found = wanted.wanted_prompts(task(run=tmp_path, held_out_clips=5))
    assert [(each.prompt, each.held_out.name) for each in found] == [
        ("b,\nc", "b.mp4"),
        ("d", "d.mp4"),
    ]


@pytest.mark.slow
def test_a_sweep_of_sampling_settings_shows_its_videos(launch, trained, tmp_path):
    first = trained(*SHORT, *VIDEOS)
    asked = ["task=generate", f"task.run={first}", *VIDEOS, "task.prompt=one"]
    ran = launch("-m", *asked, "validation.guidance_scale=1,4", f"output_dir={tmp_path / 's'}")
    assert ran.returncode == 0, ran.stderr
    assert "no held-out loss" in (page := (tmp_path / "s" / "report.html").read_text("utf-8"))
    for scale in (1, 4):
        for label in ("base", "result"):
            assert f"<figcaption>guidance_scale {scale}: {label}</figcaption>" in page
    assert page.count("<video") == 4 and "one (seed 42)" in page


def test_held_out_clips_start_from_the_images_that_they_were_trained_with(tmp_path):
    report = tmp_path / "dataset_report.csv"
    report.write_text(
        "origin,video,image,use,prompt\n"
        "v:1,/clips/a.mp4,/clips/a.png,held out,one\n"
        "v:2,/clips/b.mp4,,held out,two\n"
        "v:3,/clips/c.mp4,,train,three\n"
    )
    one, two = wanted.held_out_captions(tmp_path, 9)
    assert (one.prompt, one.image, one.held_out) == (
        "one",
        Path("/clips/a.png"),
        Path("/clips/a.mp4"),
    )
    assert (two.prompt, two.image) == ("two", None)
    # The report of an earlier version.
    report.write_text("origin,video,use,prompt\nv:1,/clips/a.mp4,held out,one\n")
    assert wanted.held_out_captions(tmp_path, 9)[0].image is None
