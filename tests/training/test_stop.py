"""How a run is asked to stop: in every phase, with a second signal, by a file."""

import contextlib
import json
import os
import signal
import subprocess
import time

import pytest
from settings import QUICK

from cogvx.files import read_json_lines
from cogvx.model import lora
from cogvx.training import checkpoint as checkpoints
from cogvx.training import stop
from cogvx.training.stop import REQUESTS, Stopped

ME = os.getpid


class OneRank:
    def highest(self, number: int) -> int:
        return number


def test_outside_of_the_step_loop_the_work_ends_where_it_is():
    for number in stop.ASKING:
        with pytest.raises(Stopped) as raised, REQUESTS.listening(None):
            os.kill(ME(), number)
            time.sleep(5)
        assert raised.value.number == number
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_in_the_step_loop_the_first_signal_is_noted_and_the_second_ends_it(capsys, monkeypatch):
    with pytest.raises(Stopped), REQUESTS.listening(None), REQUESTS.after_the_step():
        assert REQUESTS.asked(OneRank()) is None
        os.kill(ME(), signal.SIGUSR1)
        assert REQUESTS.asked(OneRank()) == signal.SIGUSR1
        assert "after this step, with a checkpoint (SIGUSR1)" in capsys.readouterr().err
        # Slurm and the process above may both pass on the same signal.
        os.kill(ME(), signal.SIGTERM)
        monkeypatch.setattr(stop, "SAME_WITHIN", 0.0)
        os.kill(ME(), signal.SIGTERM)
        pytest.fail("the second one ends it")


def test_a_second_ctrl_c_never_waits():
    with pytest.raises(Stopped), REQUESTS.listening(None), REQUESTS.after_the_step():
        os.kill(ME(), signal.SIGINT)
        os.kill(ME(), signal.SIGINT)
        pytest.fail("the second one ends it")


class StruckAtItsEnd:
    def __del__(self):
        os.kill(ME(), signal.SIGTERM)


@pytest.mark.parametrize("within_steps", [False, True])
def test_a_signal_within_a_destructor_is_not_lost(within_steps):
    deferred = REQUESTS.after_the_step() if within_steps else contextlib.nullcontext()
    with pytest.raises(Stopped) as raised, REQUESTS.listening(None), deferred:
        if within_steps:
            os.kill(ME(), signal.SIGINT)
            stop.REQUESTS.received_at -= stop.SAME_WITHIN
        StruckAtItsEnd()
        time.sleep(20)
        pytest.fail("it was lost")
    assert raised.value.number == signal.SIGTERM


def test_what_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with REQUESTS.listening(None):
            os.kill(ME(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_files_ask_as_signals_do(tmp_path, monkeypatch):
    monkeypatch.setattr(stop, "LOOK_FOR_FILES", 0.02)
    with REQUESTS.listening(tmp_path), REQUESTS.after_the_step():
        (tmp_path / "save").touch()
        wait_for(lambda: REQUESTS.asked(OneRank()) == stop.SAVE)
        assert REQUESTS.asked(OneRank()) is None, "one file asks once"
        (tmp_path / "stop").touch()
        wait_for(lambda: REQUESTS.asked(OneRank()) == signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []


def wait_for(holds, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_before_the_first_step_leaves_a_summary_and_says_how_to_go_on(
    launching, tmp_path, number
):
    """Two processes of one run, and one."""
    for name, more in (("one", []), ("two", ["parallel=ddp", "parallel.num_processes=2"])):
        folder = tmp_path / name
        process = launching(
            f"output_dir={folder}", f"data.cache_dir={tmp_path / name}c", *more, **PIPES
        )
        wait_for_file(folder / "progress.json", process)
        process.send_signal(number)
        said = "".join(process.communicate(timeout=60))
        assert process.returncode == 128 + number, said
        assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
        assert "Traceback" not in said and "type the same command again" in said


@pytest.mark.slow
def test_a_run_saves_and_stops_when_a_file_says_so(launching, cache, tmp_path):
    folder = tmp_path / "run"
    many = ["train.max_train_steps=5000", "train.checkpointing_steps=5000"]
    own = [f"output_dir={folder}", f"data.cache_dir={cache}", "train.logging_steps=1"]
    process = launching(*own, *QUICK, *many, **PIPES)
    wait_for_file(folder / "metrics.jsonl", process)
    (folder / "save").touch()
    saved = folder / "checkpoints"
    wait_for(lambda: [path for path in saved.glob("step_*") if path.suffix == ""], 240)
    (folder / "stop").touch()
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 143 and "a checkpoint is saved" in said
    assert "saved   a checkpoint after step" in said
    assert sum(1 for path in saved.iterdir()) == 2


def wait_for_file(path, process) -> None:
    deadline = time.monotonic() + 90
    while not path.is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


SHOWN = [
    "train.max_train_steps=6",
    "train.checkpointing_steps=6",
    "train.logging_steps=1",
    "validation.heldout_steps=2",
    "validation.validation_steps=2",
    "validation.preview=latents",
    "validation.preview_steps=2",
    "validation.num_validation_videos=2",
    "validation.num_inference_steps=3",
    "validation.validation_prompt='a circle'",
    *("data.height=32", "data.width=32", "data.max_num_frames=5"),
]


@pytest.mark.slow
def test_a_signal_cuts_validation_short_and_the_resumed_run_is_the_same(
    run, trained, tmp_path, monkeypatch
):
    """First in the held-out loss of step 2, then in the second video of step 4."""
    whole, polled = trained(*SHOWN), stop.StopRequests.cut_short_if_asked
    first_video = tmp_path / "cut" / "validation" / "step_000004" / "01_seed42.mp4"
    for holds, missing in (
        (lambda: True, ["held-out loss", "preview", "videos"]),
        (first_video.is_file, ["videos"]),
    ):

        def poll(self, holds=holds):
            if self.deferred and self.received is None and holds():
                os.kill(ME(), signal.SIGUSR1)
            polled(self)

        monkeypatch.setattr(stop.StopRequests, "cut_short_if_asked", poll)
        cut = run("cut", *SHOWN, expect=128 + signal.SIGUSR1)
        [newest, *_] = reversed(checkpoints.complete_checkpoints(cut))
        assert checkpoints.read_manifest(newest)["missing"] == missing
    assert not first_video.with_name("01_seed43.mp4").exists()
    monkeypatch.setattr(stop.StopRequests, "cut_short_if_asked", polled)
    run("cut", *SHOWN)
    assert lora.compare(*(lora.read_adapter(each)[0] for each in (whole, cut)), values=True) == []
    measured = ("step", "loss", "grad_norm", "heldout_loss", "heldout_by_clip")
    lines = [read_json_lines(each / "metrics.jsonl") for each in (whole, cut)]
    kept, found = ([{k: v for k, v in n.items() if k in measured} for n in x] for x in lines)
    assert kept == found
    shown = [
        {
            path.relative_to(each): path.read_bytes()
            for kind in ("validation", "previews")
            for path in each.glob(f"{kind}/step_*/*.*")
        }
        for each in (whole, cut)
    ]
    assert shown[0] == shown[1] and len(shown[0]) >= 20
