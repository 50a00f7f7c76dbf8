"""Full fine-tuning: every weight of the transformer is trained, in fp32.

The weights are saved as a transformer/ folder for CogVideoXTransformer3DModel.from_pretrained.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.errors import UserError, listed
from cogvx.model.geometry import read_config
from cogvx.model.weight_files import require_weights

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel
    from torch import Tensor

FOLDER = "transformer"
SHARD = "5GB"


def train_all(transformer: CogVideoXTransformer3DModel) -> None:
    """Updates of 1e-5 vanish in bf16 weights, so trained weights are fp32."""
    transformer.requires_grad_(True).float()


def save_transformer(
    transformer: CogVideoXTransformer3DModel, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Writes folder/transformer, in `dtype` or in the weights' own."""
    from huggingface_hub import save_torch_state_dict

    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype)
        for name, tensor in transformer.state_dict().items()
    }
    save_torch_state_dict(
        tensors,
        place,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=SHARD,
    )
    transformer.save_config(place)
    # safetensors writes files that only their owner can read.
    for path in place.iterdir():
        path.chmod(folder.stat().st_mode & 0o666)


def saved(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of folder/transformer, one at a time."""
    from safetensors import safe_open

    for path in sorted((folder / FOLDER).glob("*.safetensors")):
        require_weights(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def transformer_differences(
    transformer: CogVideoXTransformer3DModel, folder: Path, *, values: bool
) -> list[str]:
    """How folder/transformer differs from the model in names, shapes and, if asked, values."""
    expected, found, seen = transformer.state_dict(), [], set()
    for name, tensor in saved(folder):
        seen.add(name)
        if name not in expected:
            found.append(f"{name} is not part of the transformer")
        elif tensor.shape != expected[name].shape:
            shape = tuple(expected[name].shape)
            found.append(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        elif values and not tensor.equal(expected[name].cpu()):
            found.append(f"{name} has other values")
    return sorted(found + [f"{name} is missing" for name in expected.keys() - seen])


def require_same_model(folder: Path, base: Path) -> None:
    """UserError unless folder/transformer has the settings of base/transformer."""
    theirs, ours = (read_config(place, FOLDER) for place in (folder, base))
    found = [
        f"{name} is {theirs[name]} there and {ours[name]} in {base}"
        for name in sorted(theirs.keys() & ours.keys())
        if not name.startswith("_") and theirs[name] != ours[name]
    ]
    if found:
        raise UserError(listed(f"{folder / FOLDER} does not fit this model:", found))


def load_transformer(transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
    """Copies folder/transformer into the model. UserError unless names and shapes agree."""
    import torch

    found = transformer_differences(transformer, folder, values=False)
    if found:
        raise UserError(listed(f"{folder / FOLDER} does not fit this model:", found))
    weights = transformer.state_dict()
    with torch.no_grad():
        for name, tensor in saved(folder):
            weights[name].copy_(tensor)
