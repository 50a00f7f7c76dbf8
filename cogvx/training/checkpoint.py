"""Checkpoints: weights, optimizer state and a step number, which with the pure draws are all that a resume needs.

RUN/checkpoints/step_000500/ is written under another name, its manifest last, and renamed when it is on disk; only then
are older ones removed. A folder without a fitting manifest is no checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvx.errors import UserError, listed
from cogvx.model.trained_weights import FullWeights, LoraWeights
from cogvx.options import optimizers
from cogvx.training.on_cpu import Masters
from cogvx.training.torch_optimizer import unwrapped

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.pt"
AVERAGED = "averaged"  # a folder with the averaged weights, where those are judged and delivered


@dataclass(frozen=True)
class TrainingState:
    """What changes while training.

    `optimizer` and `scaler` are anything with state_dict and load_state_dict; `average` is a
    diffusers EMAModel.
    """

    transformer: object
    weights: LoraWeights | FullWeights
    parameters: list[torch.nn.Parameter]
    optimizer: object
    settings: optimizers.Optimizer  # the optimizer's own
    scaler: object | None
    average: object | None
    masters: Masters | None = None  # the parameters, where the transformer holds but copies of them

    def save(self, folder: Path, step: int, pending: list, heldout_loss: float | None) -> None:
        """`pending`: the losses of the steps not logged yet, so that a resumed run logs the same means."""
        with self.trained_weights():
            self.weights.save(self.transformer, folder)
        if self.delivers_an_average():
            with self.averaged(), self.trained_weights():
                self.weights.save(self.transformer, folder / AVERAGED)
        scaler, average = (
            (None if part is None else part.state_dict()) for part in (self.scaler, self.average)
        )
        states = {"optimizer": self.optimizer.state_dict(), "scaler": scaler, "average": average}
        torch.save(states, folder / OPTIMIZER)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        about = {
            "step": step,
            "pending": pending,
            "heldout_loss": heldout_loss,
            "optimizer": self.optimizer_name(),
        }
        about["files"] = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in files
        }
        (folder / MANIFEST).write_text(json.dumps(about, indent=2), encoding="utf-8")
        for path in [*files, folder / MANIFEST]:
            flush_to_disk(path)

    def base_model(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the transformer is the base model."""
        return self.weights.base_model(self.transformer)

    def require_fit(self, folder: Path) -> None:
        """UserError when a checkpoint is not one of this model and configuration."""
        found = self.differences(folder, values=False)
        trained_with = manifest(folder)["optimizer"]
        if trained_with != self.optimizer_name():
            found.append(
                f"its optimizer is {trained_with}, not {self.optimizer_name()}; to go on from the weights of a LoRA alone: "
                f"lora.init_from={folder}"
            )
        if found:
            raise UserError(listed(f"{folder} does not fit this model and these settings:", found))

    def differences(self, folder: Path, *, values: bool) -> list[str]:
        with self.trained_weights():
            return self.weights.differences(self.transformer, folder, values=values)

    def trained_weights(self):
        return contextlib.nullcontext() if self.masters is None else self.masters.in_their_place()

    def load(self, folder: Path) -> None:
        with self.trained_weights():
            self.weights.load(self.transformer, folder)
        stored = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        asked_for = [
            {name: group[name] for name in self.settings.configured}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(stored["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, asked_for, strict=True):
            group.update(settings)
        if self.scaler is not None and stored["scaler"] is not None:
            self.scaler.load_state_dict(stored["scaler"])
        if self.average is not None and stored["average"] is not None:
            decay = self.average.decay
            self.average.load_state_dict(stored["average"])
            self.average.to(self.parameters[0].device)
            self.average.decay = decay
        elif self.average is not None:  # it begins here
            self.average.shadow_params = [
                parameter.detach().clone() for parameter in self.parameters
            ]

    def optimizer_name(self) -> str:
        kind = type(unwrapped(self.optimizer))
        return f"{kind.__module__.split('.')[0]} {kind.__name__}"

    def delivers_an_average(self) -> bool:
        return self.average is not None or self.settings.averages_weights

    @contextlib.contextmanager
    def averaged(self):
        """With the weights that are judged and delivered, where those are an average; afterwards each trained bit is back."""
        if not self.delivers_an_average():
            yield
            return
        schedule_free = self.average is None
        trained = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]
        if schedule_free:
            unwrapped(self.optimizer).eval()
        else:
            self.average.copy_to(self.parameters)
        if self.masters is not None:
            self.masters.push()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, trained, strict=True):
                    parameter.copy_(value)
            if schedule_free:
                for group in self.optimizer.param_groups:
                    group["train_mode"] = True
            if self.masters is not None:
                self.masters.push()


def write(
    run_folder: Path,
    state: TrainingState,
    step: int,
    pending: list,
    heldout_loss: float | None = None,
    *,
    limit: int | None,
) -> Path:
    """The checkpoint of this step, in place when this returns; then the oldest beyond `limit` are removed, but not the one of
    the lowest held-out loss."""
    folder = run_folder / "checkpoints" / f"step_{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        state.save(partial, step, pending, heldout_loss)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except Exception as error:  # torch and safetensors report a full disk as errors of their own
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {folder}: {error}. Older checkpoints are untouched. Free some space, then: "
            f"python launch.py train.resume={run_folder}"
        ) from error
    kept = best(run_folder)
    for old in all_complete(run_folder)[: -limit if limit else 0]:
        if old != kept:
            shutil.rmtree(old)
    return folder


def best(run_folder: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss, the earliest of equals; None when none has one."""
    losses = {path: manifest(path)["heldout_loss"] for path in all_complete(run_folder)}
    return min((path for path in losses if losses[path] is not None), key=losses.get, default=None)


def rehearse(run_folder: Path, state: TrainingState, *, kept: int) -> None:
    """Saves, reads back and compares before the first step, so that nothing unsavable trains for hours."""
    folder = run_folder / "checkpoints" / "rehearsal.partial"
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run
        folder.mkdir(parents=True)
        state.save(folder, 0, [], None)
        found = state.differences(folder, values=True)
        if found:
            raise UserError(
                listed(f"what was saved to {folder} does not read back as it is in memory:", found)
            )
        (folder / OPTIMIZER).unlink()
        shutil.rmtree(folder / AVERAGED, ignore_errors=True)
        weights = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        # The result; per checkpoint the weights, Adam's two moments, an average and its result; one more checkpoint while it is
        # written, and the best one.
        needed = weights * (1 + (5 if state.delivers_an_average() else 3) * (kept + 2))
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(
                f"{run_folder} has {free / 2**20:.0f} MiB free; {kept} checkpoint(s) of this run and its result need up to {needed / 2**20:.0f} MiB. "
                f"Free some, lower train.checkpoints_total_limit, or set output_dir to another disk"
            )
    except UserError:
        raise
    except Exception as error:  # torch and safetensors report a full disk as errors of their own
        raise UserError(
            f"cannot save into {run_folder}: {error}. Nothing was trained yet"
        ) from error
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
    found = (
        path
        for path in (run_folder / "checkpoints").glob("step_*")
        if re.fullmatch(r"step_\d+", path.name)
    )
    return sorted(filter(is_complete, found), key=lambda path: int(path.name.removeprefix("step_")))


def manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def is_complete(folder: Path) -> bool:
    try:
        files = manifest(folder)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
