"""task.add: LoRAs that are no run, on the base model or on top of a run's LoRA.

Their sum is written into the new run's folder, as a LoRA that plain diffusers loads. So the folder
makes the same videos again when the added files have changed or are gone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cogvx.config import Config
from cogvx.data.filled import filled
from cogvx.errors import UserError
from cogvx.export.exporter import save_for_diffusers
from cogvx.export.low_rank import Updates, added, of_one_rank, read_updates, require_fit
from cogvx.files import shown
from cogvx.model import lora
from cogvx.model.geometry import read_config
from cogvx.model.hub import local_adapter
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.trained_weights import weights_of
from cogvx.options.tasks import GenerateTask

SUMS = "added"  # in the new run's folder: a folder for each sum


def read_added(task: GenerateTask, folder: Path) -> dict[str, Updates]:
    """Each LoRA of task.add by its place, times its strength; {} if the sums are written already.

    UserError if one cannot be read, or is not the product of two matrices.
    """
    if (folder / SUMS).is_dir():
        return {}
    strengths = task.add_strengths or [1.0] * len(task.add)
    return {
        f"{place} x {strength:g}": read_updates(local_adapter(place), strength)
        for place, strength in zip(task.add, strengths, strict=True)
    }


def with_added(
    config: Config,
    places: dict[str, Path],
    adapters: dict[str, Updates],
    pretrained: PretrainedModel,
    folder: Path,
) -> tuple[Config, dict[str, Path]]:
    """The folders of the sums, and the configuration with the rank and layers of the sums.

    `places`: the folder of each weights of the run that the adapters are added to; {}: they are
    added to each other. UserError if an adapter is for another base model.
    """
    settings = read_config(pretrained.folder, "transformer")
    for place, updates in adapters.items():
        require_fit(f"task.add: {place}", updates, settings, pretrained.folder)
    names = {f"{name} and added": place for name, place in places.items()} or {SUMS: None}

    def write(partial: Path) -> None:
        for name, place in names.items():
            own = [] if place is None else [read_updates(place)]
            (partial / name).mkdir()
            total = of_one_rank(added([*own, *adapters.values()]))
            save_for_diffusers(total, partial / name, dtype=None)

    sums = {name: filled(folder / SUMS, write) / name for name in names}
    settings = settings_of(next(iter(sums.values())))
    print(
        f"lora    {' + '.join([*places, *adapters]) or 'the sum'}: rank {settings.rank} on "
        f"{len(settings.target_modules)} layers, in {shown(folder / SUMS)}",
        flush=True,
    )
    return dataclasses.replace(config, lora=settings), sums


def require_low_rank(config: Config, task: GenerateTask) -> None:
    """UserError if the run that LoRAs are added to trained every weight."""
    if task.run is None or weights_of(config.lora).has_strength:
        return
    raise UserError(
        f"task.add is for a LoRA, and {task.run} trained every weight (lora=null). Make a whole "
        f"model of it, and add the LoRA to that: task=export task.run={task.run} "
        f"task.format=merged, then task=generate model.path={task.run}/export/merged task.add=..."
    )


def settings_of(folder: Path) -> lora.Lora:
    """The settings of a sum, as if it had been trained with them."""
    tensors, settings = lora.read_adapter(folder)
    return lora.Lora(
        rank=settings["r"],
        lora_alpha=settings["lora_alpha"],
        target_modules=sorted(n.partition(".lora_A.")[0] for n in tensors if ".lora_A." in n),
        use_rslora=False,
        use_dora=False,
        init_from=None,
    )
