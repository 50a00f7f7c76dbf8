"""task=export: a run's result in the form that another program reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from cogvx.config import Config
from cogvx.data.cache import content_key
from cogvx.data.filled import fill_under_another_name
from cogvx.errors import UserError
from cogvx.export.low_rank import (
    Update,
    Updates,
    added,
    at_rank,
    nearest_update,
    of_one_rank,
    read_updates,
    renamed,
    require_fit,
    save_adapter,
    share_kept,
)
from cogvx.export.publish import publish, relative
from cogvx.export.result import AVERAGED
from cogvx.files import read_json, remove_left_over_of, shown, write_json
from cogvx.hub_client import COMMITS, pinned
from cogvx.hub_upload import Upload
from cogvx.model import full, lora
from cogvx.model.hub import local_adapter
from cogvx.model.naming import NAMING_OF_FORMAT
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.trained_weights import weights_of
from cogvx.options.tasks import ExportTask, Format
from cogvx.progress import bar
from cogvx.records import record
from cogvx.records.usage import INFERENCE_SETTINGS

ABOUT = "export.json"
# The last line of an export, by format.
HOW_TO = {
    Format.diffusers: "in diffusers:  pipe.load_lora_weights({folder!r})",
    Format.folded: "in diffusers:  pipe.load_lora_weights({folder!r})",
    Format.comfyui: "copy {file} to ComfyUI/models/loras; node Load LoRA, strength_model 1.0",
    Format.comfyui_wrapper: (
        "copy {file} to ComfyUI/models/CogVideo/loras; node CogVideo LoRA Select, strength 1.0"
    ),
    Format.merged: "in diffusers:  pipe = {pipeline}.from_pretrained({folder!r})",
}
HOW_TO_TRANSFORMER = (
    "in diffusers:  CogVideoXTransformer3DModel.from_pretrained({folder!r}, "
    "subfolder='transformer')"
)


def export_result(config: Config, task: ExportTask) -> Path:
    """Writes the result of task.run, says how to use it, and returns the written folder.

    UserError if there are no weights, if the format cannot hold them, or if the folder exists.
    """
    source, run = weights_folder(config, task.run), run_of(task.run)
    folder, upload = task.to or run / "export" / task.format.name, upload_of(task)
    remove_left_over_of(folder)
    again = upload is not None and read_json(folder / ABOUT).get("asked") == asked_of(task)
    if folder.exists() and not again:
        raise UserError(
            f"{folder} exists already: remove it, or write to another folder: task.to=..."
        )
    require_holdable(config, task)
    if upload is not None:
        upload.require_writer()
    print(f"export  {shown(source)} as {task.format.name}", flush=True)
    if not again:
        fill_under_another_name(folder, lambda partial: write(config, task, source, partial))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"result  {shown(folder)}, {size / 1e6:,.1f} MB")
    whole = is_full(config) and task.format is Format.diffusers and task.rank is None
    pipeline = read_json(run / INFERENCE_SETTINGS).get("pipeline", "CogVideoXPipeline")
    how = HOW_TO_TRANSFORMER if whole else HOW_TO[task.format]
    file = lora_file(task)
    print(f"use     {how.format(folder=str(folder), pipeline=pipeline, file=file)}")
    if upload is not None:
        files, about = relative(sorted(folder.rglob("*")), folder), read_json(folder / ABOUT)
        summary = read_json(run / record.SUMMARY)
        publish(config, run, upload, files, task.format, about, summary)
    return folder


def upload_of(task: ExportTask) -> Upload | None:
    if task.hub_repo_id is None:
        return None
    return Upload(task.hub_repo_id, task.hub_private, task.hub_checkpoints, "task.hub_repo_id")


def asked_of(task: ExportTask) -> str:
    """What decides the contents of an export, as a hash: paths are in it."""
    places = ("hub_repo_id", "hub_private", "hub_checkpoints", "to")
    return content_key({k: str(v) for k, v in sorted(vars(task).items()) if k not in places})


def is_full(config: Config) -> bool:
    """Whether the run trained every weight."""
    return not weights_of(config.lora).has_strength


def run_of(place: Path) -> Path:
    """The run's folder, also of one of its checkpoints."""
    return place if (place / record.CONFIG).is_file() else place.parent.parent


def weights_folder(config: Config, place: Path) -> Path:
    """The folder of the delivered weights of a run, or of a checkpoint."""
    result = weights_of(config.lora).result
    for folder in (place / AVERAGED, place):
        if (folder / result).exists():
            return folder
    raise UserError(
        f"task.run={place} has no result ({result}): let the run finish, or give one of its "
        f"checkpoints: task.run={run_of(place)}/checkpoints/step_..."
    )


def require_holdable(config: Config, task: ExportTask) -> None:
    """UserError if the format cannot hold what the run trained."""
    if not is_full(config) or task.rank is not None:
        return
    if task.format not in (Format.merged, Format.diffusers):
        raise UserError(
            f"task.format={task.format.name} holds a LoRA, and this run trained every weight "
            f"(lora=null): task.rank=64 makes a LoRA of rank 64 from it, or task.format=merged"
        )
    if task.add or task.strength != 1:
        raise UserError(
            "task.strength and task.add are for a LoRA, and this run trained every weight "
            "(lora=null): task.rank=64 makes a LoRA of rank 64 from it"
        )


def write(config: Config, task: ExportTask, source: Path, folder: Path) -> None:
    about = {
        "format": task.format.name,
        "base_model": config.model.path,
        "revision": config.model.revision,
        "strength": task.strength,
        "added": len(task.add),
        "checkpoint": None if task.run == run_of(task.run) else task.run.name,
        "asked": asked_of(task),
    }
    if task.format is Format.merged:
        write_pipeline(config, task, source, folder)
    elif is_full(config) and task.rank is None:
        copy_transformer(source, folder, dtype_of(task))
    elif task.format is Format.diffusers and not task.changes_the_lora and task.dtype is None:
        shutil.copyfile(source / lora.WEIGHTS, folder / lora.WEIGHTS)
    else:
        updates, kept = lora_to_write(config, task, source)
        about["added_from"] = [pinned(place, COMMITS) for place in task.add]
        about |= {"rank": max(update.rank for update in updates.values()), "kept": kept}
        write_lora(updates, task, folder)
    write_json(folder / ABOUT, about)


def dtype_of(task: ExportTask) -> torch.dtype | None:
    return None if task.dtype is None else getattr(torch, task.dtype.value)


def copy_transformer(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    if dtype is None:
        shutil.copytree(source / full.FOLDER, folder / full.FOLDER)
        return
    from diffusers import CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel.from_pretrained(
        source, subfolder=full.FOLDER, torch_dtype=dtype
    )
    full.save_transformer(transformer, folder, dtype)


# -- a LoRA --------------------------------------------------------------------------------------


def lora_to_write(config: Config, task: ExportTask, source: Path) -> tuple[Updates, float | None]:
    """The LoRA of the run and of task.add, and the share of it that task.rank keeps."""
    kept = None
    if is_full(config):
        updates, kept = lora_of_full(config, source, task.rank)
        updates = {module: times(update, task.strength) for module, update in updates.items()}
    else:
        updates = read_updates(source, task.strength)
    strengths = task.add_strengths or [1.0] * len(task.add)
    places = map(local_adapter, task.add)
    more = [read_updates(*each) for each in zip(places, strengths, strict=True)]
    updates = added([updates, *more])
    if task.rank is None or (is_full(config) and not more):
        return updates, kept
    found = {
        module: at_rank(update, task.rank)
        for module, update in bar(updates.items(), desc="export", unit="layer", leave=False)
    }
    kept = share_kept([(after, before) for _, after, before in found.values()])
    print(f"rank    {task.rank} keeps {kept:.1%} of the LoRA (of its squared norm)")
    return {module: update for module, (update, _, _) in found.items()}, kept


def times(update: Update, strength: float) -> Update:
    return Update(update.down, update.up * strength)


def lora_of_full(config: Config, source: Path, rank: int) -> tuple[Updates, float]:
    """A LoRA of what full fine-tuning changed, and the share of the change that it holds.

    A LoRA holds changes of matrices. Those of biases and norms are left out, and counted.
    """
    base = base_model(config, torch.float32).transformer().state_dict()
    found, pairs, left_out, changed = {}, [], 0.0, 0.0
    names = list(base)
    for name, tensor in bar(full.saved(source), total=len(names), desc="export", leave=False):
        delta = tensor.float() - base.pop(name)
        norm = float(delta.square().sum())
        changed += norm
        if name.endswith(".weight") and delta.ndim in (2, 4):
            update, after, before = nearest_update(delta, rank)
            found[name.removesuffix(".weight")] = update
            pairs.append((after, before))
        else:
            left_out += norm
    share = sum(after for after, _ in pairs) / changed if changed else 1.0
    print(
        f"rank    {rank} holds {share:.1%} of what was trained (of its squared norm); "
        f"{left_out / changed if changed else 0.0:.1%} is in biases and norms, which no LoRA holds"
    )
    return found, share


def write_lora(updates: Updates, task: ExportTask, folder: Path) -> None:
    updates = of_one_rank(updates)
    dtype = dtype_of(task)
    if task.format in (Format.diffusers, Format.folded):
        save_for_diffusers(updates, folder, dtype)
        return
    from safetensors.torch import save_file

    tensors = renamed(updates, NAMING_OF_FORMAT[task.format])
    path = folder / lora_file(task)
    save_file(in_dtype(tensors, dtype), path, metadata={"format": "pt"})
    path.chmod(folder.stat().st_mode & 0o666)


def lora_file(task: ExportTask) -> str:
    """The name that ComfyUI shows."""
    return f"{run_of(task.run).name}_{task.format.name}.safetensors"


def save_for_diffusers(updates: Updates, folder: Path, dtype: torch.dtype | None) -> None:
    """With alpha = r, so the strength is 1 whether a program reads the settings or not."""
    rank = next(iter(updates.values())).rank
    tensors = {f"{name}.lora_A.weight": update.down for name, update in updates.items()}
    tensors |= {f"{name}.lora_B.weight": update.up for name, update in updates.items()}
    modules = sorted(updates)
    save_adapter(in_dtype(tensors, dtype), folder, r=rank, lora_alpha=rank, target_modules=modules)


def in_dtype(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}


# -- a whole pipeline ----------------------------------------------------------------------------


def base_model(config: Config, dtype: torch.dtype) -> PretrainedModel:
    return PretrainedModel(
        config.model.prepare(**config.asked_of_model()), torch.device("cpu"), dtype
    )


def write_pipeline(config: Config, task: ExportTask, source: Path, folder: Path) -> None:
    """The base model with the trained weights in its transformer."""
    dtype = dtype_of(task) or getattr(torch, config.train.mixed_precision.value)
    base = base_model(config, dtype)
    if is_full(config):
        transformer = base.transformer()
        full.load_transformer(transformer, source)
    elif config.lora.use_dora:
        transformer = with_dora(config, task, source, base)
    else:
        transformer = base.transformer()
        merge(transformer, lora_to_write(config, task, source)[0])
    full.save_transformer(transformer, folder, dtype)
    for part in sorted(base.folder.iterdir()):
        if part.name not in (full.FOLDER, ".git"):
            copy_part(part, folder / part.name)


def with_dora(
    config: Config, task: ExportTask, source: Path, base: PretrainedModel
) -> torch.nn.Module:
    if task.add:
        raise UserError("task.add with a DoRA: only the product of two matrices can be added up")
    weights = weights_of(config.lora)
    transformer = weights.attach(base, config.seed)
    weights.load(transformer, source)
    transformer.fuse_lora(lora_scale=task.strength)
    transformer.unload_lora()
    return transformer


@torch.no_grad()
def merge(transformer: torch.nn.Module, updates: Updates) -> None:
    """Adds the updates to the weights. The sums are made in fp32. UserError if they do not fit."""
    require_fit("the LoRA", updates, dict(transformer.config), "the base model")
    modules = dict(transformer.named_modules())
    for name, update in bar(updates.items(), desc="export", unit="layer", leave=False):
        weight = modules[name].weight
        weight.copy_(weight.float() + update.delta())


def copy_part(source: Path, place: Path) -> None:
    """Files become links to the same bytes where the disk allows it. The text encoder is large."""
    if source.is_dir():
        shutil.copytree(source, place, copy_function=link_or_copy)
    else:
        link_or_copy(source, place)


def link_or_copy(source: str | Path, place: str | Path) -> None:
    # A hub snapshot holds symbolic links.
    real = os.path.realpath(source)
    try:
        os.link(real, place)
    except OSError:
        shutil.copy2(real, place)
