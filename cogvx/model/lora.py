"""LoRA: low-rank updates of linear layers, trained in fp32 over a frozen base.

Saved through the pipeline's own writer together with rank and alpha, so that plain `load_lora_weights(folder)` applies
it at lora_alpha / rank, the trained strength. (Weights alone load at scale 1 whatever alpha was; and after loading a
file like ours `set_adapters([alpha / rank])`, which old guides ask for, would apply the scale twice.)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvx.errors import UserError, first_line, listed

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel
    from torch import Tensor

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name diffusers looks for in a folder
SETTINGS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
)  # of peft, which decide what the weights mean


@dataclass
class Lora:
    rank: int
    lora_alpha: float
    target_modules: Any  # a list of names, or a regular expression
    use_rslora: bool
    use_dora: bool
    init_from: Path | None

    def problems(self) -> list[str]:
        found = []
        if self.rank < 1:
            found.append(f"lora.rank={self.rank}: must be 1 or more; 16 to 256 are usual")
        if not self.lora_alpha > 0:
            found.append(
                f"lora.lora_alpha={self.lora_alpha}: must be above 0; rank or rank / 2 are usual"
            )
        found += self.target_problems()

        return found

    def target_problems(self) -> list[str]:
        usual = "usual are [to_q,to_k,to_v,to_out.0]"
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                return [
                    f"lora.target_modules={self.target_modules} is no regular expression ({error}); {usual}"
                ]
        elif not isinstance(self.target_modules, list) or not all(
            isinstance(t, str) for t in self.target_modules
        ):
            return [
                f"lora.target_modules={self.target_modules}: must be a list of names or a regular expression; {usual}"
            ]
        return [] if self.target_modules else [f"lora.target_modules is empty; {usual}"]

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by; rsLoRA: Kalajdzievski 2023 (A Rank Stabilization Scaling Factor)."""
        return self.lora_alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def require_start(self) -> None:
        """UserError when what the run is to start from is not there. (A resumed run does not need it any more.)"""
        if self.init_from is not None and not self.init_from.exists():
            raise UserError(
                f"lora.init_from={self.init_from} does not exist: give a LoRA file, or a folder with {WEIGHTS}"
            )

    def attach(self, transformer: CogVideoXTransformer3DModel, seed: int) -> None:
        """Adds the trainable layers, fp32, the same for the same seed. The model's output does not change (B = 0)."""
        import torch
        from peft import LoraConfig

        self.require_targets(transformer)
        transformer.requires_grad_(False)
        settings = LoraConfig(
            r=self.rank, lora_alpha=self.lora_alpha, target_modules=self.target_modules,
            use_rslora=self.use_rslora, use_dora=self.use_dora,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformer.add_adapter(settings)
        for parameter in trainable(transformer):
            parameter.data = parameter.data.float()

    def require_targets(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Every name, or the expression, matches something (as peft matches them), and only layers that take a LoRA."""
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
                f"lora.target_modules={self.target_modules}: no layer is called {' or '.join(missing)}. "
                f"The transformer's blocks have {', '.join(within_blocks)}."
            )
        for name in [name for names in matched.values() for name in names]:
            if not isinstance(modules[name], torch.nn.Linear | torch.nn.Conv2d):
                kind = type(modules[name]).__name__
                raise UserError(
                    f"lora.target_modules={self.target_modules} matches {name}, a {kind}: only linear and 2-D convolution layers "
                    f"take a LoRA"
                )

    def start_from(self, transformer: CogVideoXTransformer3DModel, path: Path) -> str:
        """Puts a LoRA file's weights into the attached adapter, at the strength they were trained at. A lower rank is filled up:
        the added columns do nothing yet. UserError when they do not fit; modules the file lacks start as new ones."""
        from peft import set_peft_model_state_dict

        tensors, settings = read(path)
        ours = state(transformer)
        problems = self.misfits(tensors, settings, ours)
        if problems:
            raise UserError(
                listed(
                    f"lora.init_from={path} does not fit this model and lora settings:", problems
                )
            )
        file_ranks = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
        filled = dict(ours)
        for name, tensor in tensors.items():
            filled[name] = ours[name].detach().clone()
            if ".lora_A." in name:
                filled[name][: tensor.shape[0]] = tensor
            elif ".lora_B." in name:
                rank = tensor.shape[1]
                filled[name].zero_()
                filled[name][:, :rank] = tensor.float() * (scale_of(settings, rank) / self.scale)
            else:
                filled[name].copy_(tensor)
        set_peft_model_state_dict(transformer, filled)
        strength = (
            ""
            if settings
            else ", without settings in the file: taken at strength 1, as diffusers does"
        )
        counted = f"{count_modules(tensors)} of {count_modules(ours)} modules"
        return f"{counted} start from {path}, rank {'/'.join(map(str, sorted(file_ranks)))} of {self.rank}{strength}"

    def misfits(
        self, tensors: dict[str, Tensor], settings: dict, ours: dict[str, Tensor]
    ) -> list[str]:
        if not tensors:
            return ["none of its tensors is named transformer.*.lora_A.weight or lora_B.weight"]
        found = []
        if settings.get("alpha_pattern"):
            found.append(
                "it has an alpha of its own for some modules (alpha_pattern), which this loader does not read"
            )
        dora = any("lora_magnitude" in name for name in tensors)
        if dora != self.use_dora:
            found.append(
                f"it is {'a DoRA' if dora else 'no DoRA'}: lora.use_dora={str(dora).lower()}"
            )
        for name, tensor in sorted(tensors.items()):
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
                    f"{name} is {list(tensor.shape)} and here {list(ours[name].shape)}: another base model"
                )
            elif rank_side is not None and tensor.shape[rank_side] > self.rank:
                found.append(
                    f"{name} has rank {tensor.shape[rank_side]}: set lora.rank={tensor.shape[rank_side]} or higher"
                )
        return found


def scale_of(settings: dict, rank: int) -> float:
    """The strength diffusers gives to a file with these settings; without any, 1."""
    if "lora_alpha" not in settings:
        return 1.0
    return settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)


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
        settings["target_modules"] = sorted(
            settings["target_modules"]
        )  # a set: its order would differ from run to run
    CogVideoXPipeline.save_lora_weights(
        save_directory=str(folder),
        transformer_lora_layers={
            name: tensor.detach().cpu() for name, tensor in state(transformer).items()
        },
        transformer_lora_adapter_metadata=settings,
        weight_name=WEIGHTS,
    )
    (folder / WEIGHTS).chmod(
        folder.stat().st_mode & 0o666
    )  # safetensors writes files for their owner alone


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The transformer's tensors and the settings of a LoRA file, or of WEIGHTS in a folder, named as in state()."""
    from diffusers import CogVideoXPipeline

    folder, name = (path, WEIGHTS) if path.is_dir() else (path.parent, path.name)
    try:
        tensors, settings = CogVideoXPipeline.lora_state_dict(
            str(folder), weight_name=name, return_lora_metadata=True, local_files_only=True
        )
    except Exception as error:  # missing and damaged files surface as many kinds of errors
        raise UserError(f"{folder / name} cannot be read as a LoRA: {first_line(error)}") from error
    prefix = "transformer."
    return (
        {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        },
        {name.removeprefix(prefix): value for name, value in (settings or {}).items()},
    )


def differences(
    transformer: CogVideoXTransformer3DModel, folder: Path, *, values: bool
) -> list[str]:
    """How a folder's file differs from the attached adapter in names, shapes, settings and (if asked) values."""
    tensors, settings = read(folder)
    found, attached = (
        compare(state(transformer), tensors, values=values),
        transformer.peft_config["default"],
    )
    for name in SETTINGS:
        if settings.get(name) != getattr(attached, name):
            found.append(
                f"it was trained with {name}={settings.get(name)}, not {getattr(attached, name)}"
            )
    return found


def load(transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
    """Puts a folder's tensors into the attached adapter; every tensor must find its place, with its shape."""
    from peft import set_peft_model_state_dict

    found = differences(transformer, folder, values=False)
    if found:
        raise UserError(
            listed(f"{folder / WEIGHTS} does not fit this model and lora settings:", found)
        )
    set_peft_model_state_dict(transformer, read(folder)[0])


def compare(expected: dict[str, Tensor], found: dict[str, Tensor], *, values: bool) -> list[str]:
    """How two adapters differ in names, shapes and (if asked) values; empty when they agree."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of the adapter" for name in found.keys() - expected.keys()]
    for name in sorted(expected.keys() & found.keys()):
        ours, theirs = expected[name], found[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name} has shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}")
        elif values and not ours.detach().cpu().equal(theirs.cpu()):
            problems.append(f"{name} has other values")
    return sorted(problems)
