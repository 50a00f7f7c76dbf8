"""Trackers mirror metrics.jsonl, tell how a run ended, and stop nothing."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from wandb_file import histories, records

from cogvx import config as configuration
from cogvx.files import read_json_lines, shown
from cogvx.options import tracking
from cogvx.training.metrics import Metrics

SHORT = [
    "train.max_train_steps=6",
    "train.checkpointing_steps=3",
    "validation.heldout_steps=6",
    "train.logging_steps=3",
]
VIDEO = ["validation.num_validation_videos=1", "validation.num_inference_steps=2"]
OFFLINE_WANDB = tracking.Wandb("cogvx", "offline", entity=None, group=None, tags=[])
OFFLINE = ["tracking=wandb", "tracking.mode=offline"]


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A user without a login, and a server that is not there."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def gif(tmp_path) -> Path:
    """The mp4 of a validation video, with its gif."""
    import numpy

    from cogvx.data.mp4 import write_video
    from cogvx.inference.pictures import write_gif

    frames = numpy.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), dtype=numpy.uint8)
    write_video(tmp_path / "01_seed42.mp4", frames, fps=8)
    write_gif(tmp_path / "01_seed42.gif", frames, fps=8)
    return tmp_path / "01_seed42.mp4"


def run_of(folder: Path):
    return next(each.run for each in records(folder) if each.HasField("run"))


def exit_code(folder: Path) -> int:
    return next(each.exit.exit_code for each in records(folder) if each.HasField("exit"))


def sessions(folder: Path) -> list:
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    content = found.PluginTagToContent("hparams")
    return [plugin_data_pb2.HParamsPluginData.FromString(content[name]) for name in sorted(content)]


def tracked(folder: Path, tracker, step: int = 0) -> Metrics:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model": "nano",
        "lora.rank": 4,
        "lora.target_modules": ["to_q", "to_k"],
        "train.resume": None,
    }
    return Metrics(folder, tracker, config, resumed_at=step)


# -- TensorBoard -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_has_the_numbers_the_videos_and_the_settings(tmp_path, gif):
    metrics = tracked(tmp_path / "run", tracking.TensorBoard())
    metrics.log(3, loss=0.5, highest_loss_clip="a clip")
    metrics.videos([gif], 3)
    metrics.finish("done")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.5)]
    [video] = events.Images("validation/01_seed42")
    assert (video.step, video.width, video.height) == (3, 48, 32)
    assert video.encoded_image_string == gif.with_suffix(".gif").read_bytes()
    end, start = sessions(tmp_path / "run")
    settings = start.session_start_info.hparams
    assert (settings["model"].string_value, settings["lora.rank"].number_value) == ("nano", 4)
    assert "to_q" in settings["lora.target_modules"].string_value
    assert end.session_end_info.status == api_pb2.STATUS_SUCCESS


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_tensorboard_tells_a_run_that_was_not_done(tmp_path, status):
    tracked(tmp_path, tracking.TensorBoard()).finish(status)
    assert sessions(tmp_path)[0].session_end_info.status == api_pb2.STATUS_FAILURE


def test_tensorboard_takes_back_what_a_resumed_run_does_again(tmp_path):
    for step, loss in ((0, 0.5), (2, 0.25)):
        metrics = tracked(tmp_path, tracking.TensorBoard(), step)
        for at in range(step + 1, 5):
            metrics.log(at, loss=loss)
        metrics.finish("done")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.25),
        (4, 0.25),
    ]


# -- wandb -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wandb_has_the_numbers_the_videos_and_the_settings(tmp_path, gif, capsys):
    folder = tmp_path / "run"
    metrics = tracked(folder, OFFLINE_WANDB)
    metrics.log(3, loss=0.5, highest_loss_clip="a clip")
    metrics.videos([gif], 3)
    metrics.log(6, loss=0.25)
    metrics.finish("done")
    first, second = histories(folder)
    assert (first["loss"], second["loss"], first["_step"], second["_step"]) == (0.5, 0.25, 3, 6)
    assert first["validation/01_seed42/_type"] == "video-file"
    [video] = folder.glob("wandb/offline-run-*/files/media/videos/validation/*.mp4")
    assert video.read_bytes() == gif.read_bytes()
    run = run_of(folder)
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["lora.rank"] == 4 and settings["lora.target_modules"] == ["to_q", "to_k"]
    assert (run.display_name, run.run_group) == ("run", "")
    assert exit_code(folder) == 0
    assert "to send it later:  wandb sync " in capsys.readouterr().out


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("interrupted", 255)])
def test_wandb_is_told_how_a_run_ended(tmp_path, status, code):
    tracked(tmp_path, OFFLINE_WANDB).finish(status)
    assert exit_code(tmp_path) == code


def test_a_job_is_in_the_group_of_its_sweep_under_its_own_name(tmp_path):
    (tmp_path / "ranks_1f2e").mkdir()
    (tmp_path / "ranks_1f2e" / "sweep.json").write_text("{}")
    tracked(tmp_path / "ranks_1f2e" / "rank-4", OFFLINE_WANDB).finish("done")
    run = run_of(tmp_path / "ranks_1f2e" / "rank-4")
    assert (run.run_group, run.display_name) == ("ranks_1f2e", "rank-4")


def test_wandb_gets_the_group_the_team_and_the_tags_that_are_asked_for(tmp_path):
    asked = tracking.Wandb("cogvx", "offline", entity="lab", group="rabbits", tags=["a", "b"])
    tracked(tmp_path, asked).finish("done")
    run = run_of(tmp_path)
    assert (run.entity, run.run_group, list(run.tags)) == ("lab", "rabbits", ["a", "b"])


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_run_to_wandb(tmp_path):
    for name in ("one", "one", "other"):
        tracked(tmp_path / name, OFFLINE_WANDB).finish("done")
        time.sleep(1.1)  # wandb names its folders by the second
    ids = {tracking.id_of(tmp_path / "one")} | {
        path.name.rpartition("-")[2] for path in (tmp_path / "one").glob("wandb/offline-run-*")
    }
    assert len(list((tmp_path / "one").glob("wandb/offline-run-*"))) == 2 and len(ids) == 1
    assert (
        tracking.id_of(tmp_path / "other") not in ids and tracking.id_of(tmp_path / "none") is None
    )


def test_a_missing_login_is_said_before_anything_is_loaded(run, capfd):
    folder = run("a", "tracking=wandb", expect=2)
    said = capfd.readouterr()
    assert "log in with  wandb login" in said.err and "tracking.mode=offline" in said.err
    assert (
        "model " not in said.out
        and json.loads((folder / "summary.json").read_text())["status"] == "failed"
    )


@pytest.mark.slow
def test_a_server_that_does_not_answer_stops_nothing(run, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(tracking, "PATIENCE", 4)
    import wandb

    tried, init = [], wandb.init

    def noted_init(**how):
        tried.append((how["mode"], how["settings"].init_timeout, how["settings"].finish_timeout))
        return init(**how)

    monkeypatch.setattr(wandb, "init", noted_init)
    folder = run("a", *SHORT, "tracking=wandb")
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
    assert tried == [("online", 4, 4), ("offline", 4, 4)], (
        "nothing waits longer than the patience, and once"
    )
    said = capfd.readouterr().out
    assert said.count("warning wandb does not answer") == 1 and "wandb sync " in said
    [offline] = folder.glob("wandb/offline-run-*")
    assert f"wandb sync {shown(offline)}" in said
    assert [line["loss"] for line in histories_of(offline)] == losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandbs_own_variable_comes_before_the_setting(run, capfd, monkeypatch, mode):
    """It needs no login, and is how people work offline."""
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    folder = run(mode, *SHORT, "tracking=wandb")
    said = capfd.readouterr().out
    assert "wandb   disabled" in said if mode == "disabled" else "wandb   offline; to send" in said
    assert bool([*folder.glob("wandb/offline-run-*")]) is (mode == "offline")


def histories_of(offline: Path) -> list[dict]:
    """Without the lines that only have the held-out loss."""
    import shutil

    for other in offline.parent.glob("run-*"):
        shutil.rmtree(other)
    return [line for line in histories(offline.parent.parent) if "loss" in line]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_json_lines(folder / "metrics.jsonl") if "loss" in line]


# -- trackio ---------------------------------------------------------------------------------------


class ScriptedTrackio:
    """What of trackio 0.43 is used, with the parameters that it has there."""

    def __init__(self):
        self.said = []

    def init(
        self, project, *, name, group, space_id, config, resume, embed, auto_log_gpu, auto_log_cpu
    ):
        self.said.append((project, name, group, space_id, config["model"], resume))
        return self

    def Video(self, value):
        return f"video {Path(value).name}"

    def log(self, metrics, step=None):
        self.said.append((metrics, step))

    def finish(self):
        self.said.append("finished")


@pytest.fixture
def trackio(monkeypatch):
    scripted = ScriptedTrackio()
    monkeypatch.setitem(sys.modules, "trackio", scripted)
    return scripted


def test_trackio_has_the_numbers_the_videos_and_the_settings(tmp_path, gif, trackio):
    asked = tracking.Trackio("rabbits", group=None, space_id=None)
    metrics = tracked(tmp_path / "run", asked)
    metrics.log(3, loss=0.5, highest_loss_clip="a clip")
    metrics.videos([gif], 3)
    metrics.finish("done")
    assert trackio.said == [
        ("rabbits", "run", None, None, "nano", "never"),
        ({"loss": 0.5}, 3),
        ({"validation/01_seed42": "video 01_seed42.mp4"}, 3),
        "finished",
    ]
    trackio.said.clear()
    tracked(tmp_path / "run", asked, step=3)
    assert trackio.said[0][-1] == "allow", "a run that goes on is the same run"


def test_jobs_of_two_sweeps_are_two_groups_of_runs_in_trackio(tmp_path, trackio):
    for sweep in ("one", "two"):
        (tmp_path / sweep).mkdir()
        (tmp_path / sweep / "sweep.json").write_text("{}")
        tracked(tmp_path / sweep / "rank-4", tracking.Trackio("p", group=None, space_id=None))
    assert [said[1:3] for said in trackio.said] == [("one_rank-4", "one"), ("two_rank-4", "two")]


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs trackio")
def test_the_real_trackio_keeps_what_it_is_given(tmp_path, gif, monkeypatch):
    import trackio

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    metrics = tracked(tmp_path / "run", tracking.Trackio("rabbits", group=None, space_id=None))
    metrics.log(3, loss=0.5)
    metrics.videos([gif], 3)
    metrics.finish("done")
    assert not metrics.failed
    [found] = [run for run in trackio.Api().runs("rabbits") if run.name == "run"]
    assert found is not None


# -- any -------------------------------------------------------------------------------------------


class Broken(tracking.Tracking):
    def log(self, metrics, step):
        raise ConnectionError("no route to host\nmore")

    finish = videos = log


def test_a_tracker_that_fails_is_said_once_and_stops_nothing(tmp_path, capsys):
    metrics = tracked(tmp_path, Broken())
    for step in (1, 2, 3):
        metrics.log(step, loss=0.5)
    metrics.finish("done")
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and "tracking=broken failed: no route to host;" in said
    assert losses(tmp_path) == [0.5] * 3


@pytest.mark.slow
def test_a_run_tells_its_tracker_how_it_ended(run, monkeypatch):
    from cogvx.training import trainer

    ended = []
    monkeypatch.setattr(tracking.TensorBoard, "finish", lambda self, status: ended.append(status))
    settings = [*SHORT, "tracking=tensorboard"]
    run("a", *settings)

    def spoilt(self, **how):
        raise configuration.UserError("the weights are spoilt")

    def stopped(self, **how):
        raise KeyboardInterrupt

    for name, evaluate, code in (("b", spoilt, 2), ("c", stopped, 130)):
        monkeypatch.setattr(trainer.Trainer, "evaluate", evaluate)
        run(name, *settings, expect=code)
    monkeypatch.setattr(trainer.Trainer, "evaluate", lambda self, **how: None)
    looked = iter(range(10))

    def asked(ranks):
        return 15 if next(looked) == 3 else None

    monkeypatch.setattr(trainer.REQUESTS, "asked", asked)
    run("d", *settings, expect=143)
    assert ended == ["done", "failed", "interrupted", "interrupted"]


@pytest.mark.slow
def test_a_plan_is_not_tracked(run, nano_folder):
    small = ["data.max_num_frames=9", "data.height=64", "data.width=64", "data.fps=8"]
    folder = run(
        "a", "task=plan", "model=2b", f"model.path='{nano_folder}'", *small, "tracking=wandb"
    )
    assert (folder / "plan.json").is_file() and not (folder / "wandb").exists()
