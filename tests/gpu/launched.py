"""Entries that run python launch.py as a user does, or its runs in this process."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import battery
from battery import Here
from entries import GIB
from settings import QUICK

PROJECT = battery.PROJECT
# Largest relative differences of losses between the CPU and the card.
LOSS_BOUNDS = {"no": 1e-4, "bf16": 1e-2}
# A resumed run on a card: flash attention's backward pass adds in any order.
RESUME_BOUND = 1e-2
STAGES = ("model", "encode", "data", "train", "result", "videos")


def command(here: Here, *overrides: str) -> list[str]:
    cache = f"data.cache_dir='{here.scratch}/cache'"
    return [sys.executable, str(PROJECT / "launch.py"), cache, *overrides]


def launch(here: Here, *overrides: str, device: str | None = None, **variables: str) -> list:
    """Runs it to its end. Returns its lines, each with the seconds since it began.

    RuntimeError with the first and the last line of its error.
    """
    began, lines = time.monotonic(), []
    process = subprocess.Popen(
        command(here, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=here.scratch,
        env=battery.environment(device or here.device) | variables,
    )
    for text in process.stdout:
        lines.append((time.monotonic() - began, text.rstrip()))
        print(f"{lines[-1][0]:6.1f} {lines[-1][1]}", flush=True)
    if process.wait() != 0:
        raise RuntimeError(complaint([text for _, text in lines], process.returncode))
    return lines


def complaint(lines: list[str], code: int) -> str:
    said = [line.strip() for line in lines if line.strip()]
    wrong = [line for line in said if re.search(r"error|Error|Traceback|CUDA", line)]
    first = next((line for line in wrong if "Traceback" not in line), "")
    return f"exit code {code}: {first}\n{said[-1] if said else 'it printed nothing'}"


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def metrics_of(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# -- the demo --------------------------------------------------------------------------------------


def demo(here: Here) -> None:
    folder, few = here.folder("run"), ["validation.scored_prompts=2"]
    steps = (
        ["train.max_train_steps=20", *few]
        if here.device == "cuda"
        else [
            "train.max_train_steps=4",
            "validation.num_inference_steps=2",
            "validation.scored_prompts=0",
            "validation.heldout_timesteps=2",
        ]
    )
    lines = launch(here, f"output_dir='{folder}'", *steps)
    found = summary_of(folder)
    good = found["status"] == "done"
    here.line("ended", found["status"], status="ok" if good else "failed")
    for name in ("heldout_loss_before", "heldout_loss_after", "seconds", "peak_memory_gib"):
        here.line(name, found.get(name))
    videos = len(list(folder.glob("validation/**/*.mp4")))
    here.line("videos", videos, status="ok" if videos else "failed")
    page = folder / "report.html"
    whole = page.is_file() and "<video" in page.read_text(encoding="utf-8")
    here.line("page with videos", whole, status="ok" if whole else "failed")
    first = next((at for at, text in lines if text.startswith("train ")), None)
    here.line("from the command to the first step", first, "s")
    speed = [text for _, text in lines if text.startswith("speed")]
    here.line("what it says of attention", *speed[-1:], note="; ".join(speed[:-1]))


# -- tiny checkpoints ------------------------------------------------------------------------------


def family(here: Here, name: str) -> None:
    import families

    folder = families.write(here.scratch / "families" / name, name)
    size = ["data.height=48", "data.width=64", "data.fps=8", "data.max_num_frames=9"]
    size += [f"model={name}", f"model.path='{folder}'", "train.mixed_precision=no"]
    size += [f"data.cache_dir='{here.scratch}/cache'", *QUICK]
    steps = ["train.max_train_steps=8", "train.checkpointing_steps=4"]
    kinds = {"LoRA": ["optimizer.learning_rate=5e-3"]}
    kinds["full"] = ["lora=null", "optimizer.learning_rate=3e-4"]
    for kind, own in kinds.items():
        shared = [each for each in size if kind == "LoRA" or not each.startswith("lora.")]
        whole = run_here(here.folder(f"{kind}_whole"), *shared, *steps, *own)
        before, after = (summary_of(whole)[f"heldout_loss_{when}"] for when in ("before", "after"))
        good = "ok" if after < before else "off"
        here.line(f"{kind}: held-out loss", after, status=good, note=f"before {before:.5f}")
        resumed = as_killed(whole, here.folder(f"{kind}_resumed"), step=4)
        run_here(resumed, *shared, *steps, *own)
        again = summary_of(resumed)["heldout_loss_after"]
        here.line(
            f"{kind}: resumed, difference of the held-out loss",
            abs(again - after) / after,
            "relative",
            most=RESUME_BOUND if here.device == "cuda" else 0.0,
        )


def run_here(folder: Path, *overrides: str) -> Path:
    """A run in this process."""
    from accelerate.state import AcceleratorState

    from cogvx.compose import compose_config
    from cogvx.records import record
    from cogvx.runs import processes

    AcceleratorState._reset_state(reset_partial_state=True)
    record.open_folder(compose_config([*overrides, f"output_dir='{folder}'"]))
    code = processes.run_here(folder)
    if code != 0:
        reason = summary_of(folder).get("reason", "") if (folder / "summary.json").exists() else ""
        raise RuntimeError(f"a run ended with exit code {code}: {reason}")
    return folder


def as_killed(whole: Path, copy: Path, *, step: int) -> Path:
    """A copy of a finished run, as a kill after this step leaves it."""
    shutil.copytree(whole, copy)
    for checkpoint in copy.glob("checkpoints/step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    (copy / "summary.json").unlink()
    return copy


# -- the same losses -------------------------------------------------------------------------------


def loss_fp32(here: Here) -> None:
    same_losses(here, "no")


def loss_bf16(here: Here) -> None:
    same_losses(here, "bf16")


def same_losses(here: Here, precision: str) -> None:
    """The held-out loss before, three steps, and the held-out loss after.

    The first run, on the CPU, puts latents and embeddings into the cache for both. Without TF32:
    convolutions in fp32 would be rounded to 10 bits, and the bound could not tell an error.
    """
    steps = ["train.max_train_steps=3", "train.logging_steps=1", "validation.heldout_steps=3"]
    same = [*QUICK, *steps, f"train.mixed_precision={precision}", "optimizer.learning_rate=1e-3"]
    folders = {device: here.folder(device) for device in ("cpu", here.device + "_again")}
    for name, folder in folders.items():
        device = name.removesuffix("_again")
        launch(here, f"output_dir='{folder}'", *same, device=device, NVIDIA_TF32_OVERRIDE="0")
    expected, found = (losses_of(folder) for folder in folders.values())
    bound = LOSS_BOUNDS[precision]
    for name, value in expected.items():
        difference = abs(found[name] / value - 1)
        note = f"CPU {value:.6f}, {here.device} {found[name]:.6f}"
        here.line(f"{name}: difference", difference, "relative", most=bound, note=note)


def losses_of(folder: Path) -> dict[str, float]:
    found = {}
    for line in metrics_of(folder):
        if "heldout_loss" in line:
            found[f"held-out loss after step {line['step']}"] = line["heldout_loss"]
        if "loss" in line:
            found[f"loss of step {line['step']}"] = line["loss"]
    if len(found) < 5:
        raise RuntimeError(f"metrics.jsonl has only {', '.join(found)}")
    return found


# -- what is interrupted ---------------------------------------------------------------------------


def killed(here: Here) -> None:
    folder = here.folder("run")
    steps = ["train.max_train_steps=40", "train.checkpointing_steps=5"]
    overrides = [*QUICK, *steps, "validation.heldout_steps=40", f"output_dir='{folder}'"]
    kill_after_a_checkpoint(here, folder, overrides)
    left = sorted(path.name for path in folder.glob("checkpoints/step_??????"))
    here.line("checkpoints after kill -9", ", ".join(left), status="ok")
    lines = launch(here, *overrides)
    resumed = [text for _, text in lines if text.startswith("resume")]
    here.line("the same command again", *resumed[:1], status="ok" if resumed else "failed")
    found = summary_of(folder)
    here.line("ended", found["status"], status="ok" if found["status"] == "done" else "failed")


def kill_after_a_checkpoint(here: Here, folder: Path, overrides: list[str]) -> None:
    """SIGKILL to the run and all that it started. RuntimeError if it has ended before."""
    process = subprocess.Popen(
        command(here, *overrides),
        cwd=here.scratch,
        env=battery.environment(here.device),
        start_new_session=True,
    )
    # One that is still being written has another name.
    while process.poll() is None and not list(folder.glob("checkpoints/step_??????/manifest.json")):
        time.sleep(0.02)
    if process.poll() is not None:
        raise RuntimeError(f"the run ended with exit code {process.poll()} before it was killed")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


STRICT = ["train.deterministic=true", "train.mixed_precision=bf16"]


def deterministic(here: Here) -> None:
    """A run that is killed and resumed, and one that is not: equal bit for bit?"""
    steps = ["train.max_train_steps=40", "train.checkpointing_steps=5", "train.logging_steps=5"]
    same = [*QUICK, *STRICT, *steps, "validation.heldout_steps=20"]
    whole, folder = here.folder("whole"), here.folder("run")
    launch(here, *same, f"output_dir='{whole}'")
    overrides = [*same, f"output_dir='{folder}'"]
    kill_after_a_checkpoint(here, folder, overrides)
    launch(here, *overrides)
    tell_same_bits(here, whole, folder)


def tell_same_bits(here: Here, whole: Path, again: Path) -> None:
    """A line for the weights and one for the losses."""
    for what, read in {"weights": bits_of_weights, "losses": losses_and_norms}.items():
        one, other = read(whole), read(again)
        equal = bool(one) and one == other
        found = "equal bit for bit" if equal else "they differ"
        here.line(f"{what} after kill -9 and resume", found, status="ok" if equal else "off")


def bits_of_weights(folder: Path) -> bytes:
    return (folder / "pytorch_lora_weights.safetensors").read_bytes()


def losses_and_norms(folder: Path) -> list[float]:
    names = ("loss", "heldout_loss", "grad_norm")
    return [line[name] for line in metrics_of(folder) for name in names if name in line]


def out_of_memory(here: Here) -> None:
    """A limit between what the held-out loss and what a step of 8 clips needs: the step fails."""
    import torch

    settings = [*QUICK, "train.train_batch_size=8", "train.max_train_steps=4"]
    settings += ["train.logging_steps=2", f"data.cache_dir='{here.scratch}/cache'"]
    peaks = summary_of(run_here(here.folder("enough"), *settings))["memory_by_phase"]
    if here.device == "cuda":
        low, high = (peaks[name]["reserved_gib"] for name in ("held-out loss", "train"))
        here.line("reserved by the held-out loss", low, "GiB")
        here.line("reserved by steps of 8 clips", high, "GiB")
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((low + high) / 2 * GIB / whole)
    folder = here.folder("too_little")
    try:
        reason = reason_of(folder, settings, planted=here.device != "cuda")
    finally:
        if here.device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    good = "is too small for this: it ended while training" in reason
    here.line("what it says", " / ".join(reason.split("\n")), status="ok" if good else "off")
    again = summary_of(run_here(folder, *settings))["status"]
    here.line("the same run with enough", again, status="ok" if again == "done" else "off")


def reason_of(folder: Path, settings: list[str], *, planted: bool) -> str:
    """Why the run failed. planted: where there is no card, memory ends in the first step."""
    import torch

    from cogvx.training import trainer

    real = trainer.training_losses
    if planted:
        trainer.training_losses = raising(torch.OutOfMemoryError("CUDA out of memory."))
    try:
        run_here(folder, *settings)
    except RuntimeError as error:
        return str(error)
    finally:
        trainer.training_losses = real
    return "it did not fail"


def raising(error: Exception):
    def fail(*given: object) -> None:
        raise error

    return fail


# -- several jobs ----------------------------------------------------------------------------------


def sweep(here: Here) -> None:
    folder, quick = here.folder("sweep"), [each for each in QUICK if "lora.rank" not in each]
    jobs = ["lora.rank=2,4", "seed=1,2", "train.max_train_steps=4"]
    many = "hydra.launcher.jobs=4" if here.device == "cuda" else "hydra.launcher.jobs=2"
    began = time.monotonic()
    lines = launch(here, "-m", *quick, *jobs, many, f"output_dir='{folder}'")
    ends = [summary_of(path.parent)["status"] for path in folder.glob("**/summary.json")]
    good = ends.count("done")
    here.line("jobs that are done", good, "of 4", status="ok" if good == 4 else "failed")
    here.line("seconds of four jobs", round(time.monotonic() - began, 1), "s")
    forked = [text for _, text in lines if "re-initialize CUDA" in text]
    here.line("errors of a forked CUDA", len(forked), status="failed" if forked else "ok")


def plan_measure(here: Here) -> None:
    real = ["model=2b", "memory=balanced", "data.max_num_frames=9", "task.card=h100_80gb"]
    overrides = ["model=nano"] if here.small else real
    for of in ("train", "generate"):
        folder = here.folder(f"plan_{of}")
        asked = ["task=plan", f"task.of={of}", "task.measure=true", *overrides]
        launch(here, *asked, f"output_dir='{folder}'")
        found = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["measured"]
        for name, row in found["phases"].items():
            measured, planned = row["measured_reserved_gib"], row["planned_reserved_gib"]
            here.line(f"{of}, {name}: reserved", measured, "GiB", note=f"planned {planned}")
        if found["seconds_per_step"] is not None:
            here.line("seconds per step", found["seconds_per_step"], "s")


# -- the real path of loading ----------------------------------------------------------------------


def loading_2b(here: Here) -> None:
    """Writes a random checkpoint in the files of a released one, and trains from it."""
    import checkpoint_files

    from cogvx.data.mp4 import write_video

    began = time.monotonic()
    folder = here.folder("CogVideoX-2b")
    size = checkpoint_files.write(folder, small=here.small)
    note = "random weights, in as many files as the released one has"
    here.line(
        "written", round(time.monotonic() - began, 1), "s", note=f"{size / GIB:.1f} GiB; {note}"
    )
    clips = here.folder("clips")
    height, width, frames = (48, 64, 9) if here.small else (480, 720, 49)
    for number in range(3):
        write_video(clips / f"{number}.mp4", moving(frames, height, width, number), fps=8)
    (clips / "prompts.txt").write_text("a red circle\n" * 3, encoding="utf-8")
    (clips / "videos.txt").write_text("0.mp4\n1.mp4\n2.mp4\n", encoding="utf-8")
    run = here.folder("run")
    overrides = ["model=2b", f"model.path='{folder}'", f"data.instance_data_root='{clips}'"]
    overrides += ["memory=low", "train.mixed_precision=bf16", "train.max_train_steps=3"]
    overrides += ["validation.num_inference_steps=2", "validation.heldout_timesteps=2"]
    if here.small:
        overrides += ["data.height=48", "data.width=64", "data.max_num_frames=9"]
    lines = launch(here, *overrides, f"output_dir='{run}'")
    for at, text in lines:
        if text.startswith(STAGES):
            here.line(f"`{text[:70]}`", round(at, 1), "s since the command")
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    found = summary_of(run)
    good = found["status"] == "done"
    here.line("ended", found["status"], status="ok" if good else "failed")
    here.line("whole run", found["seconds"], "s")
    here.line("RAM at most", round(most, 2), "GiB")
    here.line("reserved on the card at most", found.get("peak_memory_gib"), "GiB")


def moving(frames: int, height: int, width: int, number: int):
    """Pictures [H, W, 3] uint8 of stripes that move."""
    import numpy

    rows, columns = numpy.mgrid[:height, :width]
    for frame in range(frames):
        stripes = (rows + 3 * columns + 9 * frame + 40 * number) % 256
        yield numpy.stack([stripes, 255 - stripes, (stripes * 2) % 256], axis=-1).astype("uint8")
