"""LoRA: low-rank updates of linear layers, trained in fp32 over a frozen base.

The pipeline's own writer saves it together with rank and alpha. So plain load_lora_weights(folder)
applies it at lora_alpha / rank, the trained strength. Weights without these settings load at scale
1, whatever alpha was. Old guides ask for set_adapters([alpha / rank]) after loading; with our file
this would apply the scale twice.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvx.errors import UserError, listed
from cogvx.files import absolute, is_hub_id
from cogvx.libraries import unseen
from cogvx.model.hub import local_adapter
from cogvx.model.lora_file import LoraFile, peft_settings, read_lora
from cogvx.model.weight_files import WEIGHTS, read_tensors

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel
    from torch import Tensor

# peft's settings that decide what the weights mean.
PEFT_SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora")


@dataclass
class Lora:
    rank: int
    lora_alpha: float
    target_modules: Any  # a list of names, or a regular expression
    use_rslora: bool
    use_dora: bool
    init_from: str | None  # a file, a folder or a hub id

    def make_paths_absolute(self) -> None:
        if self.init_from is not None and not is_hub_id(self.init_from):
            self.init_from = str(absolute(Path(self.init_from)))

    def problems(self) -> list[str]:
        found = []
        if self.rank < 1:
            found.append(f"lora.rank={self.rank}: must be 1 or more; 16 to 256 are usual")
        if not self.lora_alpha > 0:
            found.append(
                f"lora.lora_alpha={self.lora_alpha}: must be above 0; rank or rank / 2 are usual"
            )
        return found + self.target_problems()

    def target_problems(self) -> list[str]:
        usual = "usual are [to_q,to_k,to_v,to_out.0]"
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                return [
                    f"lora.target_modules={self.target_modules} is no regular expression "
                    f"({error}); {usual}"
                ]
        elif not isinstance(self.target_modules, list) or not all(
            isinstance(target, str) for target in self.target_modules
        ):
            return [
                f"lora.target_modules={self.target_modules}: must be a list of names or a regular "
                f"expression; {usual}"
            ]
        return [] if self.target_modules else [f"lora.target_modules is empty; {usual}"]

    @property
    def scale(self) -> float:
        """The low-rank product is multiplied by it.

        rsLoRA: Kalajdzievski 2023, A Rank Stabilization Scaling Factor.
        """
        return self.lora_alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def start_file(self) -> Path | None:
        """The local file or folder of init_from; None if it is not set.

        A resumed run does not need it. UserError if it does not exist.
        """
        return None if self.init_from is None else local_adapter(self.init_from, "lora.init_from")

    def attach(self, transformer: CogVideoXTransformer3DModel, seed: int) -> None:
        """Adds the trainable layers in fp32, seeded. B is 0, so the output does not change yet."""
        import torch
        from peft import LoraConfig

        self.require_targets(transformer)
        transformer.requires_grad_(False)
        settings = LoraConfig(
            r=self.rank,
            lora_alpha=self.lora_alpha,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )
        # peft would import bitsandbytes, to ask whether these are layers of it. They are torch's.
        with torch.random.fork_rng(devices=[]), unseen():
            torch.manual_seed(seed)
            transformer.add_adapter(settings)
        for parameter in trainable(transformer):
            parameter.data = parameter.data.float()

    def require_targets(self, transformer: CogVideoXTransformer3DModel) -> None:
        """UserError unless each target matches layers, as peft does, that can take a LoRA."""
        import torch

        modules = {name: module for name, module in transformer.named_modules() if name}
        if isinstance(self.target_modules, str):
            matched = {
                self.target_modules: [n for n in modules if re.fullmatch(self.target_modules, n)]
            }
        else:
            matched = {
                t: [n for n in modules if n == t or n.endswith("." + t)]
                for t in self.target_modules
            }
        missing = [target for target, names in matched.items() if not names]
        if missing:
            linears = [n for n, module in modules.items() if isinstance(module, torch.nn.Linear)]
            within_blocks = sorted(
                {n.split(".", 2)[2] for n in linears if n.startswith("transformer_blocks.")}
            )
            raise UserError(
                f"lora.target_modules={self.target_modules}: "
                f"no layer is called {' or '.join(missing)}. "
                f"The transformer's blocks have {', '.join(within_blocks)}."
            )
        for name in [name for names in matched.values() for name in names]:
            if not isinstance(modules[name], torch.nn.Linear | torch.nn.Conv2d):
                kind = type(modules[name]).__name__
                raise UserError(
                    f"lora.target_modules={self.target_modules} matches {name}, a {kind}: "
                    f"only linear and 2-D convolution layers take a LoRA"
                )

    def start_from(self, transformer: CogVideoXTransformer3DModel, path: Path) -> str:
        """Loads a LoRA file into the attached adapter, at the strength it was trained at.

        Any naming of model/naming.py is read. A lower rank is filled up with columns that do
        nothing yet. Modules that the file lacks start new. Returns what was loaded, in words.
        UserError if the file does not fit.
        """
        from peft import set_peft_model_state_dict

        file, ours = read_lora(path), state(transformer)
        problems = self.misfits(file, ours)
        if problems:
            headline = f"lora.init_from={path} does not fit this model and lora settings:"
            raise UserError(listed(headline, problems))
        filled = {name: self.filled_up(name, t, ours, file) for name, t in file.tensors().items()}
        set_peft_model_state_dict(transformer, ours | filled)
        modules = f"{len(file.layers)} of {count_modules(ours)} modules"
        strength = ", without an alpha in the file: taken at strength 1, as diffusers does"
        return (
            f"{modules} start from {path}, rank {'/'.join(map(str, file.ranks))} of {self.rank}"
            f"{'' if file.has_alpha else strength}"
        )

    def filled_up(
        self, name: str, tensor: Tensor, ours: dict[str, Tensor], file: LoraFile
    ) -> Tensor:
        """A file's tensor at this adapter's rank and strength."""
        filled = ours[name].detach().clone()
        if ".lora_A." in name:
            filled[: tensor.shape[0]] = tensor
        elif ".lora_B." in name:
            strength = file.scale_of(name.partition(".lora_B.")[0])
            filled.zero_()
            filled[:, : tensor.shape[1]] = tensor.float() * (strength / self.scale)
        else:
            filled.copy_(tensor)
        return filled

    def misfits(self, file: LoraFile, ours: dict[str, Tensor]) -> list[str]:
        problem, dora = file.strength_problem(), file.is_dora
        found = [] if problem is None else [problem]
        if dora != self.use_dora:
            found.append(
                f"it is {'a DoRA' if dora else 'no DoRA'}: lora.use_dora={str(dora).lower()}"
            )
        for name, tensor in sorted(file.tensors().items()):
            if name not in ours:
                found.append(
                    f"{name} is none of the layers of lora.target_modules={self.target_modules}"
                )
                continue
            rank_side = {".lora_A.": 0, ".lora_B.": 1}.get(
                next((p for p in (".lora_A.", ".lora_B.") if p in name), "")
            )
            channels = [
                (a, b)
                for side, (a, b) in enumerate(zip(tensor.shape, ours[name].shape, strict=False))
                if side != rank_side
            ]
            if any(a != b for a, b in channels):
                found.append(
                    f"{name} is {list(tensor.shape)} and here {list(ours[name].shape)}: "
                    f"another base model"
                )
            elif rank_side is not None and tensor.shape[rank_side] > self.rank:
                found.append(
                    f"{name} has rank {tensor.shape[rank_side]}: "
                    f"set lora.rank={tensor.shape[rank_side]} or higher"
                )
        return found


def count_modules(tensors: dict[str, Tensor]) -> int:
    return sum(".lora_A." in name for name in tensors)


def trainable(transformer: CogVideoXTransformer3DModel) -> list[Tensor]:
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def state(transformer: CogVideoXTransformer3DModel) -> dict[str, Tensor]:
    """The adapter's tensors by name, as diffusers expects them."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(transformer)


def save(transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
    """Writes WEIGHTS into the folder, with the adapter's settings in the file's metadata."""
    from diffusers import CogVideoXPipeline

    settings = transformer.peft_config["default"].to_dict()
    if not isinstance(settings["target_modules"], str):
        # The order of a set differs from run to run.
        settings["target_modules"] = sorted(settings["target_modules"])
    CogVideoXPipeline.save_lora_weights(
        save_directory=str(folder),
        transformer_lora_layers={
            name: tensor.detach().cpu() for name, tensor in state(transformer).items()
        },
        transformer_lora_adapter_metadata=settings,
        weight_name=WEIGHTS,
    )
    # safetensors writes files that only their owner can read.
    (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The transformer's tensors, named as in state(), and the settings, of a file of save().

    `path` may also be a folder that holds WEIGHTS.
    """
    path = path / WEIGHTS if path.is_dir() else path
    tensors, metadata = read_tensors(path)
    prefix = "transformer."
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    return found, peft_settings(path, metadata)


def adapter_differences(
    transformer: CogVideoXTransformer3DModel, folder: Path, *, values: bool
) -> list[str]:
    """How a saved adapter differs from the attached one in names, shapes, settings and, if asked,
    values."""
    tensors, settings = read_adapter(folder)
    found, attached = (
        compare(state(transformer), tensors, values=values),
        transformer.peft_config["default"],
    )
    for name in PEFT_SETTINGS:
        if settings.get(name) != getattr(attached, name):
            found.append(
                f"it was trained with {name}={settings.get(name)}, not {getattr(attached, name)}"
            )
    return found


def load(transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
    """Loads a saved adapter into the attached one. UserError unless names and shapes agree."""
    from peft import set_peft_model_state_dict

    found = adapter_differences(transformer, folder, values=False)
    if found:
        raise UserError(
            listed(f"{folder / WEIGHTS} does not fit this model and lora settings:", found)
        )
    set_peft_model_state_dict(transformer, read_adapter(folder)[0])


def compare(expected: dict[str, Tensor], found: dict[str, Tensor], *, values: bool) -> list[str]:
    """How two adapters differ in names, shapes and, if asked, values."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of the adapter" for name in found.keys() - expected.keys()]
    for name in sorted(expected.keys() & found.keys()):
        ours, theirs = expected[name], found[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name} has shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}")
        elif values and not ours.detach().cpu().equal(theirs.cpu()):
            problems.append(f"{name} has other values")
    return sorted(problems)
