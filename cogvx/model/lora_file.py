"""A LoRA as any trainer writes it: the matrices of each layer, and how strong they are.

r: rank; out, in: output and input features of a layer.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.errors import UserError
from cogvx.model.layers import Shape
from cogvx.model.naming import (
    ALPHA,
    DOWN,
    MAGNITUDE,
    UP,
    Naming,
    naming_of,
    unread_in_words,
)
from cogvx.model.weight_files import read_tensors, weight_files

if TYPE_CHECKING:
    from torch import Tensor

# Where a safetensors file's metadata holds peft's settings: diffusers (loaders/lora_base.py) and
# finetrainers (trainer/sft_trainer/trainer.py).
SETTINGS_KEYS = ("lora_adapter_metadata", "lora_config")
PEFT_FILE = "adapter_config.json"  # peft's own, beside the weights
# peft's ways to begin that change the base model's weights too (tuners/lora/layer.py). Without
# these changes such a LoRA means something else.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class LoraLayer:
    """What a file holds for one layer."""

    down: Tensor  # [r, in], or [r, in, h, w]
    up: Tensor  # [out, r], or [out, r, 1, 1]
    alpha: float | None  # from a tensor of its own, as kohya's tools write it
    magnitude: Tensor | None  # [out], of a DoRA

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def shape(self) -> Shape:
        """Of the layer's weight."""
        return (len(self.up), *self.down.shape[1:])


@dataclass(frozen=True)
class LoraFile:
    path: Path
    naming: Naming
    layers: dict[str, LoraLayer]  # by the module's name in diffusers
    settings: dict  # peft's; {} if the file has none
    unread: int = 0  # tensors of the base model, which SAT keeps in the same file

    @property
    def has_alpha(self) -> bool:
        """Whether the file tells how strong every layer is."""
        alone = all(layer.alpha is not None for layer in self.layers.values())
        return alone or "lora_alpha" in self.settings

    @property
    def is_dora(self) -> bool:
        return any(layer.magnitude is not None for layer in self.layers.values())

    @property
    def ranks(self) -> list[int]:
        return sorted({layer.rank for layer in self.layers.values()})

    @property
    def shapes(self) -> dict[str, Shape]:
        return {module: layer.shape for module, layer in self.layers.items()}

    def strength_problem(self) -> str | None:
        """What is wrong if the file is to be used without an import, which asks for the alpha."""
        if self.has_alpha or not self.naming.has_base_model:
            return None
        return (
            f"{self.path}: SAT's files do not hold the alpha of a LoRA. Import it first: "
            f"python launch.py task=import task.file={self.path} task.alpha=ALPHA"
        )

    def alpha_of(self, module: str) -> float | None:
        """None if the file does not say."""
        layer = self.layers[module]
        if layer.alpha is not None:
            return layer.alpha
        return peft_alpha(self.settings, module)

    def scale_of(self, module: str) -> float:
        """The strength of a layer: up @ down is multiplied by it.

        Without an alpha it is 1, as diffusers has it.
        """
        alpha, rank = self.alpha_of(module), self.layers[module].rank
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def tensors(self) -> dict[str, Tensor]:
        """As peft names them, without the alphas."""
        found = {}
        for module, layer in self.layers.items():
            found[f"{module}.lora_A.weight"] = layer.down
            found[f"{module}.lora_B.weight"] = layer.up
            if layer.magnitude is not None:
                found[f"{module}.lora_magnitude_vector"] = layer.magnitude
        return found


def peft_alpha(settings: dict, module: str) -> float | None:
    """The alpha that peft gives to a layer with these settings (peft, tuners/lora/model.py)."""
    from peft.utils.other import get_pattern_key

    pattern = settings.get("alpha_pattern") or {}
    return pattern.get(get_pattern_key(pattern, module), settings.get("lora_alpha"))


def read_lora(place: Path) -> LoraFile:
    """The LoRA in a file or folder. UserError names the first tensor that is none of its parts."""
    [path, *others] = weight_files(place)
    if others:
        raise UserError(f"{place} is a whole model in {len(others) + 1} files, not a LoRA")
    tensors, metadata = read_tensors(path)
    return lora_of(path, tensors, metadata)


def lora_of(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> LoraFile:
    """The LoRA that these tensors of a file are."""
    naming = naming_of(tensors)
    if naming is None:
        key = min(tensors)
        whole = not any("lora" in name or "matrix_A" in name for name in tensors)
        reason = "it has no matrices of a LoRA" if whole else unread_in_words(key)
        raise UserError(f"{path} is no LoRA for CogVideoX: its first tensor is {key}, and {reason}")
    parts, unread = sorted_by_layer(path, naming, tensors)
    layers = {module: layer_of(path, module, found) for module, found in sorted(parts.items())}
    settings = peft_settings(path, metadata)
    require_plain(path, settings)
    return LoraFile(path, naming, layers, settings, unread)


def sorted_by_layer(
    path: Path, naming: Naming, tensors: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """{module: {part: tensor}}, and how many tensors are the base model's, in SAT's files."""
    parts, unread = {}, []
    for key, tensor in tensors.items():
        read = naming.read(key)
        if read is None:
            unread.append(key)
        else:
            module, part = read
            if part in parts.setdefault(module, {}):
                raise UserError(f"{path} has the {part} of {module} twice, once as {key}")
            parts[module][part] = tensor
    base = [key for key in unread if naming.has_base_model and "matrix_" not in key]
    unread = sorted({*unread} - {*base})
    if unread:
        raise UserError(
            f"{path}: {len(unread)} of {len(tensors)} tensors are not of a LoRA for CogVideoX. "
            f"The first is {unread[0]}: {unread_in_words(unread[0])}"
        )
    return parts, len(base)


def layer_of(path: Path, module: str, parts: dict[str, Tensor]) -> LoraLayer:
    """UserError if a matrix is missing, or if the two do not belong together."""
    for part, other in ((DOWN, UP), (UP, DOWN)):
        if part not in parts:
            raise UserError(
                f"{path}: {module} has {other if other in parts else 'alpha'} and no {part} "
                f"matrix. The file is not complete"
            )
    down, up = parts[DOWN], parts[UP]
    if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1]:
        raise UserError(
            f"{path}: the matrices of {module} are {list(down.shape)} and {list(up.shape)}, and "
            f"their product does not exist: [rank, in] and [out, rank] are needed"
        )
    if not all(matrix.float().isfinite().all() for matrix in (down, up)):
        raise UserError(f"{path}: {module} holds numbers that are not finite (NaN or infinity)")
    alphas = parts[ALPHA].flatten().tolist() if ALPHA in parts else []
    if len(alphas) > 1 or any(not 0 < alpha < math.inf for alpha in alphas):
        raise UserError(
            f"{path}: the alpha of {module} is {alphas[:3]}: one number above 0 is needed"
        )
    return LoraLayer(down, up, alphas[0] if alphas else None, parts.get(MAGNITUDE))


def peft_settings(path: Path, metadata: dict[str, str]) -> dict:
    """peft's settings, from the file's metadata or from peft's own file beside it."""
    text = next((metadata[key] for key in SETTINGS_KEYS if key in metadata), None)
    beside = path.with_name(PEFT_FILE)
    try:
        if text is None and beside.is_file():
            text = beside.read_text(encoding="utf-8")
        found = {} if text is None else json.loads(text)
        return {name.removeprefix("transformer."): value for name, value in found.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: the settings of its LoRA are no JSON: {error}") from error


def require_plain(path: Path, settings: dict) -> None:
    """UserError if peft's settings say that the matrices are not the whole LoRA."""
    kind, begun = settings.get("peft_type", "LORA"), settings.get("init_lora_weights")
    if kind != "LORA":
        raise UserError(f"{path} is a {kind} of peft, and only LoRAs are read")
    if isinstance(begun, str) and begun.startswith(CHANGES_THE_BASE):
        raise UserError(
            f"{path} was trained with init_lora_weights={begun}, which changes the base model too. "
            f"Convert it to a plain LoRA with peft first: path_initial_model_for_weight_conversion "
            f"of save_pretrained"
        )
    alphas = [settings.get("lora_alpha", 1), *(settings.get("alpha_pattern") or {}).values()]
    for alpha in alphas:
        if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise UserError(f"{path}: its settings have alpha {alpha!r}: it must be above 0")
