"""LoRA: low-rank updates of the attention's linear layers, trained in fp32 over a frozen base.

Saved through the pipeline's own writer together with rank and alpha, so that plain `load_lora_weights(folder)` applies
it at lora_alpha / rank, the trained strength. (Weights alone load at scale 1 whatever alpha was; and after loading a
file like ours `set_adapters([alpha / rank])`, which old guides ask for, would apply the scale twice.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.errors import UserError, listed

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel
    from torch import Tensor

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name diffusers looks for in a folder


@dataclass
class Lora:
    rank: int
    lora_alpha: float
    target_modules: list[str]

    def problems(self) -> list[str]:
        found = []
        if self.rank < 1:
            found.append(f"lora.rank={self.rank}: must be 1 or more; 16 to 256 are usual")
        if not self.lora_alpha > 0:
            found.append(f"lora.lora_alpha={self.lora_alpha}: must be above 0; rank or rank / 2 are usual")
        if not self.target_modules:
            found.append("lora.target_modules is empty: the usual ones are [to_q,to_k,to_v,to_out.0]")
        return found

    def attach(self, transformer: CogVideoXTransformer3DModel, seed: int) -> None:
        """Adds the trainable layers, fp32, the same for the same seed. The model's output does not change yet (B = 0)."""
        import torch
        from peft import LoraConfig

        self.require_targets(transformer)
        transformer.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformer.add_adapter(
                LoraConfig(r=self.rank, lora_alpha=self.lora_alpha, target_modules=list(self.target_modules))
            )
        for parameter in trainable(transformer):
            parameter.data = parameter.data.float()

    def require_targets(self, transformer: CogVideoXTransformer3DModel) -> None:
        import torch

        linears = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
        missing = [t for t in self.target_modules if not any(n == t or n.endswith("." + t) for n in linears)]
        if missing:
            within_blocks = sorted({n.split(".", 2)[2] for n in linears if n.startswith("transformer_blocks.")})
            raise UserError(
                f"lora.target_modules={self.target_modules}: no linear layer is called {' or '.join(missing)}. "
                f"The transformer's blocks have {', '.join(within_blocks)}."
            )


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
    settings["target_modules"] = sorted(settings["target_modules"])  # a set: its order would differ from run to run
    CogVideoXPipeline.save_lora_weights(
        save_directory=str(folder),
        transformer_lora_layers={name: tensor.detach().cpu() for name, tensor in state(transformer).items()},
        transformer_lora_adapter_metadata=settings,
        weight_name=WEIGHTS,
    )
    (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)  # safetensors writes files for their owner alone


def read(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and settings of a folder, read as the pipeline reads them and named as in state()."""
    from diffusers import CogVideoXPipeline

    tensors, settings = CogVideoXPipeline.lora_state_dict(
        str(folder), weight_name=WEIGHTS, return_lora_metadata=True, local_files_only=True
    )
    prefix = "transformer."
    return (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)},
        {name.removeprefix(prefix): value for name, value in (settings or {}).items()},
    )


def load(transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
    """Puts a folder's tensors into the attached adapter; every tensor must find its place, with its shape."""
    from peft import set_peft_model_state_dict

    tensors, settings = read(folder)
    differences = compare(state(transformer), tensors, values=False)
    alpha = transformer.peft_config["default"].lora_alpha
    if settings.get("lora_alpha", alpha) != alpha:
        differences.append(f"it was trained with lora.lora_alpha={settings['lora_alpha']:g}, not {alpha:g}")
    if differences:
        raise UserError(listed(f"{folder / WEIGHTS} does not fit this model and lora settings:", differences))
    set_peft_model_state_dict(transformer, tensors)


def compare(expected: dict[str, Tensor], found: dict[str, Tensor], *, values: bool) -> list[str]:
    """How two adapters differ in names, shapes and (if asked) values; empty when they agree."""
    differences = [f"{name} is missing" for name in expected.keys() - found.keys()]
    differences += [f"{name} is not part of the adapter" for name in found.keys() - expected.keys()]
    for name in sorted(expected.keys() & found.keys()):
        ours, theirs = expected[name], found[name]
        if ours.shape != theirs.shape:
            differences.append(f"{name} has shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}")
        elif values and not ours.detach().cpu().equal(theirs.cpu()):
            differences.append(f"{name} has other values")
    return sorted(differences)
