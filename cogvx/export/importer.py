"""task=import: a LoRA or a transformer of another trainer becomes the folder of a run.

The folder is as task=train leaves it, without checkpoints: its config.yaml has the rank, alpha and
layers of the file, so it makes videos, is exported, judged and trained on like any other run.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from cogvx import config as configuration
from cogvx.config import Config
from cogvx.data.cache import sha256_of
from cogvx.errors import UserError
from cogvx.export.low_rank import of_one_rank, save_adapter, updates_of
from cogvx.export.result import inference_settings
from cogvx.export.whole_files import empty_transformer, is_whole, weights_for
from cogvx.files import shown, write_json
from cogvx.model import full
from cogvx.model.geometry import Geometry, read_config, read_geometry, released
from cogvx.model.hub import local_adapter
from cogvx.model.layers import Shape, layer_shapes, misfit_in_words
from cogvx.model.lora import Lora
from cogvx.model.lora_file import LoraFile, lora_of
from cogvx.model.pretrained import Model
from cogvx.model.released import NAMES, RELEASED
from cogvx.model.trained_weights import weights_of
from cogvx.model.weight_files import read_tensors, weight_files
from cogvx.options.tasks import ImportTask, TrainTask
from cogvx.progress import counted, heartbeat
from cogvx.records import record, report
from cogvx.records.usage import INFERENCE_SETTINGS


def import_weights(config: Config, task: ImportTask) -> Path:
    """Writes the run's folder, says how to use it, and returns it.

    UserError if the weights cannot be read, or are for another model; then nothing is written.
    """
    files = weight_files(local_adapter(task.file, "task.file"))
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    print(f"import  {shown(files[0])}{more}", flush=True)
    require_another_folder(config.output_dir, files)
    base = Base.of(config)
    imported = imported_weights(config, task, files, base)
    for line in imported.lines:
        print(line)
    final = recorded_as_trained(config, imported.settings)
    with heartbeat("import  still hashing the files"):
        about = {
            "imported_from": {str(path): sha256_of(path) for path in files},
            "imported_form": imported.form,
        }
    folder = record.open_folder(final)
    if holds_already(folder, about):
        print(f"{shown(folder)} holds this import already: nothing to do")
        return folder
    with record.locked(folder):
        write_run(final, folder, imported, base, about)
    image = " task.image=first.png" if base.geometry.image_to_video else ""
    how = f'task.run={shown(folder)} task.prompt="a cat on a beach"{image}'
    print(f"result  {shown(folder / weights_of(final.lora).result)}")
    print(f"use     python launch.py task=generate {how}")
    return folder


def require_another_folder(folder: Path | None, files: list[Path]) -> None:
    """UserError if the run's folder would be written over the files."""
    if folder is not None and any(folder in path.parents for path in files):
        raise UserError(
            f"output_dir={folder} is where {files[0].name} is, and would be written over it: "
            f"choose another output_dir"
        )


# -- the base model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What must be known of the base model. Its weights are not needed."""

    called: str
    transformer: dict  # the transformer's config.json
    geometry: Geometry

    @classmethod
    def of(cls, config: Config) -> Base:
        """The released models are known. Of another one on the hub the settings are fetched."""
        called, model = f"model={config.choices['model']}", config.model
        option = None if model.is_local() else NAMES.get(model.path.split("/")[-1])
        if option is not None:
            return cls(called, RELEASED[option][0], released(model.path))
        folder = settings_folder(model)
        return cls(called, read_config(folder, "transformer"), read_geometry(folder))

    @property
    def shapes(self) -> dict[str, Shape]:
        return layer_shapes(self.transformer)


def settings_folder(model: Model) -> Path:
    return model.local_folder() if model.is_local() else model.download("*.json")


# -- what the file holds -------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportedLora:
    file: LoraFile
    tensors: dict[str, Tensor]  # by peft's names, in fp32
    settings: Lora
    lines: list[str]  # for the terminal

    @property
    def form(self) -> str:
        return f"LoRA, names of {self.file.naming.title}"

    def write(self, folder: Path) -> None:
        settings = self.settings
        save_adapter(
            self.tensors,
            folder,
            r=settings.rank,
            lora_alpha=settings.lora_alpha,
            target_modules=settings.target_modules,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
        )


@dataclass(frozen=True)
class ImportedTransformer:
    transformer: torch.nn.Module
    form: str
    lines: list[str]
    settings: ClassVar[None] = None  # no LoRA: every weight was trained

    def write(self, folder: Path) -> None:
        full.save_transformer(self.transformer, folder)


def imported_weights(
    config: Config, task: ImportTask, files: list[Path], base: Base
) -> ImportedLora | ImportedTransformer:
    tensors, metadata = {}, {}
    for path in files:
        more, about = read_tensors(path)
        tensors, metadata = tensors | more, metadata | about
    if not is_whole(tensors):
        return imported_lora(config, task, lora_of(files[0], tensors, metadata), base)
    if task.alpha is not None:
        raise UserError(
            f"task.alpha is for a LoRA, and {files[0]} is a whole transformer: leave it out"
        )
    transformer = empty_transformer(base.transformer)
    weights, form = weights_for(transformer, tensors, files[0], base.called)
    transformer.load_state_dict(weights, assign=True, strict=True)
    size = sum(tensor.numel() for tensor in weights.values())
    line = f"match   {len(weights)} of {len(weights)} weights of {base.called}: {form}"
    return ImportedTransformer(transformer, form, [line, f"full    {size / 1e6:,.1f} M parameters"])


def imported_lora(config: Config, task: ImportTask, file: LoraFile, base: Base) -> ImportedLora:
    problem = misfit_in_words(file.path, file.shapes, base.shapes, base.called)
    if problem is not None:
        raise UserError(problem)
    asked = weights_of(config.lora)
    rslora = asked.has_strength and asked.settings.use_rslora
    file = with_alpha(file, task.alpha, rslora=rslora)
    require_whole_dora(file)
    tensors, rank, alpha, lines = as_one_adapter(file)
    settings = Lora(
        rank=rank,
        lora_alpha=alpha,
        target_modules=shortest_names(list(file.layers), list(base.shapes)),
        use_rslora=bool(file.settings.get("use_rslora")) and not lines,
        use_dora=file.is_dora,
        init_from=None,
    )
    lines = [*lines_of_match(file, base), *lines, line_of_strength(settings)]
    return ImportedLora(file, tensors, settings, lines)


def with_alpha(file: LoraFile, alpha: float | None, *, rslora: bool) -> LoraFile:
    """The file with the alpha that the user gives, if it has none. It is never guessed."""
    if file.has_alpha:
        known = sorted({file.alpha_of(module) for module in file.layers})
        if alpha is not None and known != [alpha]:
            found = ", ".join(f"{each:g}" for each in known[:5])
            raise UserError(
                f"task.alpha={alpha:g}, but {file.path} says that alpha is {found}: leave out "
                f"task.alpha"
            )
        return file
    if alpha is None:
        raise UserError(missing_alpha(file))
    settings = {"use_rslora": rslora} | file.settings | {"lora_alpha": alpha}
    return dataclasses.replace(file, settings=settings)


def missing_alpha(file: LoraFile) -> str:
    """With the usual values, from each trainer's arguments (docs/other_trainers.md)."""
    return (
        f"{file.path} does not hold the alpha of its LoRA, and the strength is alpha / rank. Its "
        f"rank is {'/'.join(map(str, file.ranks))}. Give the alpha that it was trained with, such "
        f"as task.alpha=64. Trainers that are not told otherwise take 128 (diffusers' script, rank "
        f"128), 64 (finetrainers, rank 64; CogVideo's finetune, rank 128) or 1 (SAT). "
        f"task.alpha={file.ranks[-1]}, the rank, means strength 1, which is what plain diffusers "
        f"does with this file"
    )


def require_whole_dora(file: LoraFile) -> None:
    without = [module for module, layer in file.layers.items() if layer.magnitude is None]
    if file.is_dora and without:
        raise UserError(
            f"{file.path} is a DoRA, and {len(without)} of its {len(file.layers)} layers have no "
            f"magnitude, such as {without[0]}. The file is not complete"
        )
    if file.settings.get("use_dora") and not file.is_dora:
        raise UserError(
            f"the settings in {file.path} say that it is a DoRA, and no layer has a magnitude "
            f"(lora_magnitude_vector). The file is not complete"
        )


def as_one_adapter(file: LoraFile) -> tuple[dict[str, Tensor], int, float, list[str]]:
    """The tensors in fp32, one rank and one alpha for all layers, and what was changed for it.

    A run has one of each. Where the file has several ranks, lower ones are filled up with zeros.
    Where layers differ in strength, the strength goes into the weights.
    """
    scales = {file.scale_of(module) for module in file.layers}
    if len(scales) == 1 and len(file.ranks) == 1:
        tensors = {name: tensor.float() for name, tensor in file.tensors().items()}
        return tensors, file.ranks[0], float(file.alpha_of(next(iter(file.layers)))), []
    if file.is_dora:
        raise UserError(
            f"{file.path} is a DoRA whose layers differ in rank or alpha. A run has one of each, "
            f"and a DoRA cannot be brought to it"
        )
    updates = of_one_rank(updates_of(file))
    rank = file.ranks[-1]
    tensors = {f"{module}.lora_A.weight": update.down for module, update in updates.items()}
    tensors |= {f"{module}.lora_B.weight": update.up for module, update in updates.items()}
    line = (
        f"note    its layers differ: ranks {'/'.join(map(str, file.ranks))}, strengths "
        f"{min(scales):g} to {max(scales):g}. All get rank {rank}, filled up with zeros, and "
        f"strength 1: their own strength is now in the weights"
    )
    return tensors, rank, float(rank), [line]


def shortest_names(layers: list[str], of_base: list[str]) -> list[str]:
    """The shortest endings that match these layers of the base model and no others.

    transformer_blocks.0.attn1.to_q, transformer_blocks.1.attn1.to_q, ... -> to_q
    """
    asked, found = {*layers}, []
    for layer in (layer for layer in of_base if layer in asked):
        if any(matches(layer, name) for name in found):
            continue
        parts = layer.split(".")
        endings = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        # A number alone would also match layers that cannot take a LoRA.
        words = [ending for ending in endings if not ending[0].isdigit()]
        found.append(
            next(
                ending
                for ending in words
                if all(other in asked for other in of_base if matches(other, ending))
            )
        )
    return found


def matches(layer: str, ending: str) -> bool:
    """As peft matches target_modules."""
    return layer == ending or layer.endswith(f".{ending}")


def lines_of_match(file: LoraFile, base: Base) -> list[str]:
    """What was matched, and which layers of the base model have no LoRA though others do."""
    parts = 3 if file.is_dora else 2
    alphas = sum(layer.alpha is not None for layer in file.layers.values())
    count = parts * len(file.layers) + alphas
    left = (
        f"; {file.unread:,} weights of the base model in it are not needed" if file.unread else ""
    )
    lines = [
        f"match   {count} of {count} tensors of the LoRA: {len(file.layers)} layers of "
        f"{base.called}, names of {file.naming.title}{left}"
    ]
    kinds = {kind_of(module) for module in file.layers}
    without = [m for m in base.shapes if kind_of(m) in kinds and m not in file.layers]
    if without:
        lines.append(
            f"warning {counted(len(without), 'layer')} of the same kinds "
            f"{'has' if len(without) == 1 else 'have'} no LoRA in the file: {without[0]} is the "
            f"first. Left as in the base model"
        )
    return lines


def kind_of(module: str) -> str:
    return ".".join(part for part in module.split(".", 2) if not part.isdigit())


def line_of_strength(settings: Lora) -> str:
    variant = ", rsLoRA" * settings.use_rslora + ", DoRA" * settings.use_dora
    names = settings.target_modules
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (
        f"lora    rank {settings.rank}, alpha {settings.lora_alpha:g}{variant} (strength "
        f"{settings.scale:g}) on {', '.join(names[:8])}{more}"
    )


# -- the run's folder ----------------------------------------------------------------------------


def recorded_as_trained(config: Config, settings: Lora | None) -> Config:
    """The configuration of the run that could have made this. UserError if it is not allowed."""
    choices = config.choices | {"task": "train"}
    final = dataclasses.replace(config, task=TrainTask(), lora=settings, choices=choices)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / record.CONFIG
        path.write_text(configuration.to_yaml(final), encoding="utf-8")
        checked = configuration.read(path)
    return dataclasses.replace(checked, output_dir=config.output_dir)


def holds_already(folder: Path, about: dict) -> bool:
    """Whether the folder holds these weights. UserError if it holds others."""
    summary = record.finished(folder)
    if summary is None:
        return False
    found = summary.get("imported_from", {})
    if sorted(found.values()) == sorted(about["imported_from"].values()):
        return True
    whose = f"weights imported from {next(iter(found))}" if found else "the result of a training"
    raise UserError(f"{folder} holds {whose}: choose another output_dir")


def write_run(
    config: Config,
    folder: Path,
    imported: ImportedLora | ImportedTransformer,
    base: Base,
    about: dict,
) -> None:
    """Weights, inference.json, environment.json, summary.json and the page."""
    record.environment(folder, list(sys.argv))
    record.note(folder, **about)
    imported.write(folder)
    weights, prompt = weights_of(config.lora), first_prompt(config)
    settings = inference_settings(config, weights, base.geometry, None, prompt)
    write_json(folder / INFERENCE_SETTINGS, settings | {"image": None})
    record.finish(folder, {"status": "done", **about})
    print(f"report  {shown(report.write_page(folder))}")


def first_prompt(config: Config) -> str | None:
    sampling = config.validation
    if sampling.validation_prompt is None:
        return None
    return sampling.validation_prompt.split(sampling.validation_prompt_separator)[0].strip()
