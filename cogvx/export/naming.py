"""The names that other programs give to a LoRA's tensors.

ComfyUI's CogVideoXWrapper (kijai, lora_utils.py, merge_lora) reads kohya's names over those of
diffusers. ComfyUI itself (comfy/ldm/cogvideo/model.py, comfy/lora.py) has a transformer with names
of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from cogvx.export.low_rank import Updates
from cogvx.options.tasks import Format

# Modules of a diffusers transformer, as parts of names -> as ComfyUI calls them.
COMFYUI = (
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn1\.to_([qkv])$", r".\1"),
    (r"\.attn1\.to_out\.0$", ".attn_out"),
    (r"\.attn1\.norm_([qk])$", r".norm_\1"),
    (r"\.ff\.net\.0\.proj$", ".ff_proj"),
    (r"\.ff\.net\.2$", ".ff_out"),
    (r"^(time|ofs)_embedding\.linear_(\d)$", r"\1_embedding_linear_\2"),
)


def kohya_name(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def comfyui_name(module: str) -> str:
    for pattern, name in COMFYUI:
        module = re.sub(pattern, name, module)
    return f"diffusion_model.{module}"


NAME_OF_MODULE: dict[Format, Callable[[str], str]] = {
    Format.comfyui_wrapper: kohya_name,
    Format.comfyui: comfyui_name,
}


def renamed(updates: Updates, file_format: Format) -> dict[str, Tensor]:
    """Tensors in kohya's form: lora_down, lora_up, and alpha, where alpha / r is the strength.

    The strength is in the weights already, so alpha is r.
    """
    found = {}
    for module, update in updates.items():
        name = NAME_OF_MODULE[file_format](module)
        found[f"{name}.lora_down.weight"] = update.down
        found[f"{name}.lora_up.weight"] = update.up
        found[f"{name}.alpha"] = torch.tensor(float(update.rank))
    return found
