"""Checkpoints: weights, optimizer state and a step number, which with the pure draws are all that a resume needs.

RUN/checkpoints/step_000500/ is written under another name, its manifest last, and renamed when it is on disk; only then
are older ones removed. A folder without a fitting manifest is no checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvx.errors import UserError, listed
from cogvx.model import lora

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.pt"
HYPERPARAMETERS = ("betas", "eps", "weight_decay", "decoupled_weight_decay")  # as configured, not as stored


@dataclass(frozen=True)
class TrainingState:
    """What changes while training. `optimizer` and `scaler` are anything with state_dict and load_state_dict."""

    transformer: object
    optimizer: object
    scaler: object | None

    def save(self, folder: Path, step: int, losses: list[float]) -> None:
        """`losses`: of the steps not logged yet, so that a resumed run logs the same means."""
        lora.save(self.transformer, folder)
        scaler = None if self.scaler is None else self.scaler.state_dict()
        torch.save({"optimizer": self.optimizer.state_dict(), "scaler": scaler}, folder / OPTIMIZER)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(
            json.dumps({"step": step, "losses": losses, "files": sizes}, indent=2), encoding="utf-8"
        )
        for path in folder.iterdir():
            flush_to_disk(path)

    def load(self, folder: Path) -> tuple[int, list[float]]:
        """Restores everything; returns the number of optimizer steps done and the losses not logged yet."""
        lora.load(self.transformer, folder)
        stored = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        asked_for = [
            {name: group[name] for name in HYPERPARAMETERS if name in group} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(stored["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, asked_for, strict=True):
            group.update(settings)
        if self.scaler is not None and stored["scaler"] is not None:
            self.scaler.load_state_dict(stored["scaler"])
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest["step"], manifest["losses"]


def write(run_folder: Path, state: TrainingState, step: int, losses: list[float], *, limit: int | None) -> Path:
    """The checkpoint of this step, in place when this returns; then the oldest beyond `limit` are removed."""
    folder = run_folder / "checkpoints" / f"step_{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        state.save(partial, step, losses)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except Exception as error:  # torch and safetensors report a full disk as errors of their own
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {folder}: {error}. Older checkpoints are untouched. Free some space, then: "
            f"python launch.py train.resume={run_folder}"
        ) from error
    for old in all_complete(run_folder)[: -limit if limit else 0]:
        shutil.rmtree(old)
    return folder


def rehearse(run_folder: Path, state: TrainingState, *, kept: int) -> None:
    """Saves, reads back and compares before the first step, so that nothing unsavable trains for hours."""
    folder = run_folder / "checkpoints" / "rehearsal.partial"
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run
        folder.mkdir(parents=True)
        state.save(folder, 0, [])
        tensors, settings = lora.read(folder)
        differences = lora.compare(lora.state(state.transformer), tensors, values=True)
        trained = state.transformer.peft_config["default"]
        for name in ("r", "lora_alpha"):
            if settings.get(name) != getattr(trained, name):
                differences.append(f"{name} is {settings.get(name)}, expected {getattr(trained, name)}")
        if differences:
            raise UserError(listed(f"what was saved to {folder} does not read back as it is in memory:", differences))
        weights = (folder / lora.WEIGHTS).stat().st_size
        # The result; per checkpoint the weights and Adam's two moments, and one more checkpoint while it is written.
        needed = weights * (1 + 3 * (kept + 1))
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(
                f"{run_folder} has {free / 2**20:.0f} MiB free; {kept} checkpoint(s) of this run and its result need up to {needed / 2**20:.0f} MiB. "
                f"Free some, lower train.checkpoints_total_limit, or set output_dir to another disk"
            )
    except UserError:
        raise
    except Exception as error:  # torch and safetensors report a full disk as errors of their own
        raise UserError(f"cannot save into {run_folder}: {error}. Nothing was trained yet") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def newest(place: Path) -> Path:
    """The newest whole checkpoint of a run's folder, or `place` itself if it is a checkpoint. UserError if there is none."""
    if is_complete(place):
        return place
    found = all_complete(place)
    if found:
        return found[-1]
    there = sorted(p.name for p in (place / "checkpoints").glob("*")) if place.is_dir() else []
    what = f"only {', '.join(there)}, not complete" if there else "no checkpoint"
    raise UserError(
        f"train.resume={place}: {what if place.is_dir() else 'there is no such folder'}. Give a run's folder, or one of its checkpoints/step_*"
    )


def all_complete(run_folder: Path) -> list[Path]:
    """Oldest first."""
    found = (path for path in (run_folder / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name))
    return sorted(filter(is_complete, found), key=lambda path: int(path.name.removeprefix("step_")))


def is_complete(folder: Path) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
