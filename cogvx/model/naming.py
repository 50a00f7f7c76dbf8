"""The names that programs give to a LoRA's tensors: one table, to read files and to write them.

Where the names were found:
- diffusers (loaders/lora_base.py) and peft: transformer.MODULE.lora_A.weight. CogVideo's converter
  of LoRAs (tools/export_sat_lora_weight.py) leaves out transformer.; peft's own files begin with
  base_model.model.; older diffusers has .lora.down for .lora_A.
- ComfyUI (comfy/ldm/cogvideo/model.py, comfy/lora.py): a transformer with names of its own.
- kohya's names, which ComfyUI's CogVideoXWrapper reads (kijai, lora_utils.py, merge_lora) and
  CogVideoX-Fun writes (aigc-apps, lora_utils.py: with two underscores after lora_unet). ComfyUI
  takes them over its own names of modules too.
- SAT, CogVideo's first trainer (SwissArmyTransformer, sat/model/finetune/lora2.py): lists of
  matrices, where query, key and value are one layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from cogvx.model.layers import possible_layers
from cogvx.options.tasks import Format

DOWN, UP, ALPHA, MAGNITUDE = "down", "up", "alpha", "magnitude"

# The first pair of each is written.
PEFT_ENDINGS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
)
KOHYA_ENDINGS = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)
MAGNITUDES = (
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
    "lora_magnitude_vector.default.weight",
)

# Modules of a diffusers transformer, as parts of names -> as the program calls them.
COMFYUI_MODULES = (
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn1\.to_([qkv])$", r".\1"),
    (r"\.attn1\.to_out\.0$", ".attn_out"),
    (r"\.attn1\.norm_([qk])$", r".norm_\1"),
    (r"\.ff\.net\.0\.proj$", ".ff_proj"),
    (r"\.ff\.net\.2$", ".ff_out"),
    (r"^(time|ofs)_embedding\.linear_(\d)$", r"\1_embedding_linear_\2"),
)
# {} is where matrix_A or matrix_B stands.
SAT_MODULES = (
    (r"^transformer_blocks\.(\d+)\.attn1\.to_q$", r"\1.attention.query_key_value.{}.0"),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_k$", r"\1.attention.query_key_value.{}.1"),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_v$", r"\1.attention.query_key_value.{}.2"),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_out\.0$", r"\1.attention.dense.{}.0"),
)


@dataclass(frozen=True)
class Naming:
    """How a program names the tensors of a LoRA. The first of several ways is the one to write."""

    title: str
    prefixes: tuple[str, ...]
    endings: tuple[tuple[str, str], ...]  # of down and up
    modules: tuple[tuple[str, str], ...] = ()  # expressions and what replaces them
    flat: bool = False  # underscores stand for dots
    has_base_model: bool = False  # its files hold the base model's weights too

    def module_name(self, module: str) -> str:
        for pattern, name in self.modules:
            module = re.sub(pattern, name, module)
        return module.replace(".", "_") if self.flat else module

    def key(self, module: str, part: str) -> str:
        """The name of a tensor. part: DOWN, UP or ALPHA."""
        down, up = self.endings[0]
        ending = {DOWN: down, UP: up, ALPHA: ALPHA}[part]
        return self.prefixes[0] + ended(self.module_name(module), ending)

    def read(self, key: str) -> tuple[str, str] | None:
        """The module in diffusers' words, and the part; None for a name of another kind."""
        for prefix in self.prefixes:
            if key.startswith(prefix) and key.removeprefix(prefix) in known_names(self):
                return known_names(self)[key.removeprefix(prefix)]
        return None


def ended(module: str, ending: str) -> str:
    return module.format(ending) if "{}" in module else f"{module}.{ending}"


@lru_cache(maxsize=16)
def known_names(naming: Naming) -> dict[str, tuple[str, str]]:
    """Every name without its prefix -> the module in diffusers' words, and the part."""
    endings = {ALPHA: ALPHA, **dict.fromkeys(MAGNITUDES, MAGNITUDE)}
    for down, up in naming.endings:
        endings |= {down: DOWN, up: UP}
    modules = {naming.module_name(module): module for module in possible_layers()}
    return {
        ended(name, ending): (module, part)
        for name, module in modules.items()
        for ending, part in endings.items()
    }


PEFT = Naming(
    "diffusers",
    (
        *("transformer.", "", "base_model.model.transformer.", "base_model.model.", "module."),
        *("diffusion_model.", "model.diffusion_model."),
    ),
    PEFT_ENDINGS + KOHYA_ENDINGS,
)
COMFYUI = Naming(
    "ComfyUI",
    ("diffusion_model.", "", "model.diffusion_model.", "base_model.model.", "transformer."),
    KOHYA_ENDINGS + PEFT_ENDINGS,
    COMFYUI_MODULES,
)
FLAT_PREFIXES = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")
KOHYA = Naming("kohya's tools", FLAT_PREFIXES, KOHYA_ENDINGS + PEFT_ENDINGS, flat=True)
KOHYA_COMFYUI = Naming(
    "kohya's tools, over ComfyUI's modules",
    FLAT_PREFIXES,
    KOHYA_ENDINGS + PEFT_ENDINGS,
    COMFYUI_MODULES,
    flat=True,
)
SAT = Naming(
    "SAT",
    ("model.diffusion_model.transformer.layers.", "transformer.layers."),
    (("matrix_A", "matrix_B"),),
    SAT_MODULES,
    has_base_model=True,
)
NAMINGS = (PEFT, COMFYUI, KOHYA, KOHYA_COMFYUI, SAT)
NAMING_OF_FORMAT = {Format.comfyui_wrapper: KOHYA, Format.comfyui: COMFYUI}


def naming_of(keys: Iterable[str]) -> Naming | None:
    """The naming that reads the most of these names; None if none reads any."""
    keys, read = list(keys), {}
    for naming in NAMINGS:
        read[naming] = sum(naming.read(key) is not None for key in keys)
        if read[naming] == len(keys):
            break
    best = max(read, key=read.get)
    return best if read[best] else None


# -- names that are not read, and why ------------------------------------------------------------

TEXT_ENCODER = re.compile(r"^(base_model\.model\.)?(text_encoder|lora_te|te\d?[._]|t5|clip)")
OTHER_MODELS = (
    (
        "FLUX",
        r"single_transformer_blocks|double_blocks|single_blocks|transformer_blocks.\d+.attn.to_",
    ),
    ("Wan", r"blocks[._]\d+[._](self_attn|cross_attn|ffn)"),
    ("Stable Diffusion", r"down_blocks|mid_block|up_blocks|input_blocks"),
    ("Mochi or SD3", r"attn1?[._]add_[qkv]_proj|joint_blocks"),
    ("LTX-Video or another model with cross-attention", r"transformer_blocks[._]\d+[._]attn2"),
)
OTHER_ADAPTERS = (
    ("LoHa", r"\.hada_"),
    ("LoKr", r"\.lokr_"),
    ("GLoRA", r"\.(a1|a2|b1|b2)\.weight$"),
    ("a LoRA with a third matrix (lora_mid)", r"\.lora_mid\."),
    ("a DoRA of kohya's tools (dora_scale)", r"\.dora_scale$"),
    ("a LoRA with trained biases", r"\.lora_B\.(default\.)?bias$"),
    ("a change of whole weights (.diff)", r"\.(diff|diff_b|w_norm|b_norm)$"),
)


def unread_in_words(key: str) -> str:
    """What a name that no naming reads is, as far as it can be told."""
    if TEXT_ENCODER.search(key):
        return (
            "it is of a text encoder. Here, and in diffusers, a LoRA for CogVideoX is of the "
            "transformer alone"
        )
    for kind, pattern in OTHER_ADAPTERS:
        if re.search(pattern, key):
            return f"it is of {kind}, which is not read here: only plain LoRAs and peft's DoRAs are"
    for model, pattern in OTHER_MODELS:
        if re.search(pattern, key):
            return f"such names are of {model}, and this is for CogVideoX"
    return "CogVideoX has no layer of this name"
