"""Checkpoints: trained weights, optimizer states and a step number.

Random numbers are functions of the step, so nothing else is needed to resume. A checkpoint is
written to RUN/checkpoints/step_000500.partial/, its manifest last, and renamed when it is on disk.
Only then are older ones removed. The manifest has the SHA-256 of every file. Before a run is
resumed they are compared. A damaged checkpoint is set aside as step_000500.damaged/.

[no torch at import: task=doctor reads checkpoints]
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.errors import UserError, listed
from cogvx.files import flush_to_disk, flush_tree, shown, write_json
from cogvx.options.train import Train
from cogvx.progress import counted
from cogvx.records.record import HOW_TO_TRAIN_ON, is_imported
from cogvx.training.out_of_memory import lack_of

if TYPE_CHECKING:
    from cogvx.training.state import TrainingState

MANIFEST = "manifest.json"
STEP = re.compile(r"step_\d+")
# Endings of folders that are no checkpoints: being written, and found damaged.
PARTIAL, DAMAGED = ".partial", ".damaged"


def write_checkpoint(
    run_folder: Path,
    state: TrainingState,
    step: int,
    pending: list,
    heldout_loss: float | None = None,
    *,
    limit: int | None,
    missing: Sequence[str] = (),
) -> Path:
    """Writes the checkpoint of this step, then removes the oldest beyond `limit`.

    The one with the lowest held-out loss stays. `pending`: the losses of the steps that are not
    logged yet, so that a resumed run logs the same means. `missing`: what a signal cut short after
    this step, so that a resumed run makes it. UserError if the disk is full.
    """
    folder = run_folder / "checkpoints" / f"step_{step:06d}"
    partial = folder.with_name(folder.name + PARTIAL)
    if is_complete(folder):
        # A signal came while this step's checkpoint was written: it is the one asked for.
        return folder
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_whole(state, partial, step, pending, heldout_loss, missing)
        give_name(partial, folder)
    # torch and safetensors report a full disk as errors of their own.
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if lack_of(error) is not None:
            raise
        raise UserError(
            f"cannot write the checkpoint {folder}: {error}. Older checkpoints are untouched. "
            f"Free some space, then: python launch.py train.resume={run_folder}"
        ) from error
    best = best_checkpoint(run_folder)
    for old in complete_checkpoints(run_folder)[: -limit if limit else 0]:
        if old != best:
            remove_checkpoint(old)
    return folder


def save_whole(
    state: TrainingState,
    folder: Path,
    step: int,
    pending: list,
    heldout_loss: float | None,
    missing: Sequence[str] = (),
) -> None:
    """Everything a checkpoint holds, on disk when this returns."""
    state.save(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = {
        "step": step,
        "pending": pending,
        "heldout_loss": heldout_loss,
        "missing": list(missing),
        "optimizer": state.optimizer_name(),
        "files": {path.relative_to(folder).as_posix(): facts_of_file(path) for path in files},
    }
    write_json(folder / MANIFEST, manifest)
    flush_tree(folder)


def note_in_manifest(folder: Path, **facts: object) -> None:
    write_json(folder / MANIFEST, {**read_manifest(folder), **facts}, durable=True)


def facts_of_file(path: Path) -> dict:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def give_name(whole: Path, name: Path) -> None:
    """Renames a folder that is on the disk. What has the name now is no whole checkpoint."""
    shutil.rmtree(name, ignore_errors=True)
    whole.rename(name)
    flush_to_disk(name.parent)


def remove_checkpoint(folder: Path) -> None:
    """Its name goes first: what a kill leaves of it is removed by tidy() at the next start."""
    aside = folder.with_name(f"{folder.name}.removed{PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def best_checkpoint(run_folder: Path) -> Path | None:
    """The earliest checkpoint with the lowest held-out loss; None if none has a loss."""
    losses = {
        path: read_manifest(path)["heldout_loss"] for path in complete_checkpoints(run_folder)
    }
    losses = {path: loss for path, loss in losses.items() if loss is not None}
    return min(losses, key=losses.get) if losses else None


def rehearse(run_folder: Path, state: TrainingState, *, kept: int) -> None:
    """Saves, reads back and compares before the first step.

    So a run does not train for hours and then fail to save. `kept`: the number of checkpoints that
    the run will keep. UserError if something cannot be saved, or there is too little disk space.
    """
    folder = run_folder / "checkpoints" / "rehearsal.partial"
    try:
        # A killed run may have left one.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_whole(state, folder, 0, [], None)
        found = state.differences(folder, values=True)
        if found:
            headline = f"what was saved to {folder} reads back differently:"
            raise UserError(listed(headline, found))
        require_space(run_folder, folder, state, kept)
    except UserError:
        raise
    # torch and safetensors report a full disk as errors of their own.
    except Exception as error:
        if lack_of(error) is not None:
            raise
        raise UserError(
            f"cannot save into {run_folder}: {error}. Nothing was trained yet"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_space(run_folder: Path, rehearsal: Path, state: TrainingState, kept: int) -> None:
    from cogvx.training.state import AVERAGED, OPTIMIZER

    (rehearsal / OPTIMIZER).unlink()
    shutil.rmtree(rehearsal / AVERAGED, ignore_errors=True)
    weights = sum(path.stat().st_size for path in rehearsal.rglob("*") if path.is_file())
    # A checkpoint: the weights and Adam's two moments; with an average, also the average and its
    # result. One more checkpoint exists while it is written, and the best one is kept.
    sizes = 5 if state.delivers_an_average() else 3
    # A resumed run has some of them on the disk already.
    there = min(kept, len(complete_checkpoints(run_folder)))
    needed = weights * (1 + sizes * (kept + 2 - there))
    free = shutil.disk_usage(rehearsal).free
    if free < needed:
        raise UserError(
            f"{run_folder} has {free / 2**20:.0f} MiB free; {counted(kept, 'checkpoint')} of this "
            f"run and its result need up to {needed / 2**20:.0f} MiB. Free some, "
            f"lower train.checkpoints_total_limit, or set output_dir to another disk"
        )


def number_kept(steps: int, train: Train) -> int:
    """How many checkpoints a run of `steps` steps leaves."""
    written = -(-steps // train.checkpointing_steps)
    limit = train.checkpoints_total_limit
    return written if limit is None else min(limit, written)


def resume_source(resume: str | None, run_folder: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: the newest of this run's folder, else the one asked for.

    One that is damaged is named, and the one before it is taken.
    """
    tidy(run_folder)
    for folder in reversed(step_folders(run_folder)):
        damage = damage_of(folder)
        if damage is None:
            return folder
        aside = folder.with_name(folder.name + DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        say(f"warning {shown(folder)} is damaged: {damage}. It is {aside.name} now, and not used")
    return None if resume in (None, "auto") else newest_checkpoint(Path(resume), say)


def tidy(run_folder: Path) -> None:
    """Ends what a killed run has begun: a whole checkpoint gets its name, half a one is removed."""
    for partial in (run_folder / "checkpoints").glob(f"*{PARTIAL}"):
        name = partial.with_name(partial.name.removesuffix(PARTIAL))
        whole = STEP.fullmatch(name.name) and damage_of(partial) is None
        if whole and not is_complete(name):
            give_name(partial, name)
        else:
            shutil.rmtree(partial, ignore_errors=True)


def newest_checkpoint(place: Path, say: Callable[[str], None] = print) -> Path:
    """The newest whole checkpoint of a run's folder, or `place` itself if it is a checkpoint.

    Damaged ones are named. UserError if there is none.
    """
    if is_complete(place):
        if (damage := damage_of(place)) is None:
            return place
        raise UserError(
            f"train.resume={place} is damaged: {damage}. Give the run's folder, to go on from "
            f"the newest checkpoint that is whole"
        )
    for folder in reversed(step_folders(place)):
        if (damage := damage_of(folder)) is None:
            return folder
        say(f"warning {shown(folder)} is not used, it is damaged: {damage}")
    if is_imported(place):
        raise UserError(
            f"train.resume={place}: it was imported, and an import brings no optimizer state to "
            f"resume from. To train on: {HOW_TO_TRAIN_ON}"
        )
    if not place.is_dir():
        what = "there is no such folder"
    else:
        there = sorted(path.name for path in (place / "checkpoints").glob("*"))
        what = f"only {', '.join(there)}, not complete" if there else "no checkpoint"
    raise UserError(
        f"train.resume={place}: {what}. Give a run's folder, or one of its checkpoints/step_*"
    )


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """Oldest first. Their files have the right sizes; damage_of() reads them."""
    return [path for path in step_folders(run_folder) if is_complete(path)]


def step_folders(run_folder: Path) -> list[Path]:
    """Oldest first, whole or not."""
    places = (run_folder / "checkpoints").glob("step_*")
    named = [path for path in places if STEP.fullmatch(path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step_")))


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def is_complete(folder: Path) -> bool:
    return misfit_of(folder) is None


def misfit_of(folder: Path) -> str | None:
    """What a checkpoint lacks, as far as the sizes of its files tell."""
    try:
        files = read_manifest(folder)["files"]
    except OSError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, facts in files.items():
        size = facts["size"] if isinstance(facts, dict) else facts
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole. Reads all of it.

    The manifests of earlier versions have sizes and no SHA-256.
    """
    if misfit := misfit_of(folder):
        return misfit
    for name, facts in read_manifest(folder)["files"].items():
        if isinstance(facts, dict) and facts != facts_of_file(folder / name):
            return f"the bytes of {name} are not those that were written"
    return None


def fault_of_file(path: Path, facts: dict) -> str | None:
    """What is wrong with a file whose facts_of_file() were recorded."""
    if not path.is_file():
        return "it is missing"
    if facts_of_file(path) != facts:
        return "its bytes are not those that were written"
    return None
