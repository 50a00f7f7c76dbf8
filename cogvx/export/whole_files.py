"""Whole transformers of other trainers, brought to the names of diffusers.

Full fine-tuning with diffusers, finetrainers and CogVideo's finetune leaves diffusers' names, some
with a prefix. SAT has names of its own (CogVideo, tools/convert_weight_sat2hf.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from cogvx.errors import UserError
from cogvx.model.layers import fits_in_words, possible_layers

PREFIXES = (
    *("", "transformer.", "module.", "model.", "_orig_mod.", "module._orig_mod."),
    *("model.diffusion_model.", "diffusion_model."),
)
SAT_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
# One weight of a whole transformer, in diffusers' and in SAT's words.
SIGN, SAT_SIGN = "patch_embed.text_proj.weight", "mixins.patch_embed.text_proj.weight"
# Computed from the size of the video, and so not needed.
COMPUTED = re.compile(r"(pos_embedding|freqs_sin|freqs_cos|embed_tokens.*|position_embedding.*)$")

# diffusers' names -> SAT's, and which parts of the rows: (all parts, the wanted ones).
SAT_WEIGHTS = (
    (r"^{block}attn1\.to_q\.", "{sat}attention.query_key_value.", (3, (0,))),
    (r"^{block}attn1\.to_k\.", "{sat}attention.query_key_value.", (3, (1,))),
    (r"^{block}attn1\.to_v\.", "{sat}attention.query_key_value.", (3, (2,))),
    (r"^{block}attn1\.to_out\.0\.", "{sat}attention.dense.", None),
    (r"^{block}attn1\.norm_q\.", r"mixins.adaln_layer.query_layernorm_list.\1.", None),
    (r"^{block}attn1\.norm_k\.", r"mixins.adaln_layer.key_layernorm_list.\1.", None),
    (r"^{block}ff\.net\.0\.proj\.", "{sat}mlp.dense_h_to_4h.", None),
    (r"^{block}ff\.net\.2\.", "{sat}mlp.dense_4h_to_h.", None),
    (r"^{block}norm1\.norm\.", "{sat}input_layernorm.", None),
    (r"^{block}norm2\.norm\.", "{sat}post_attention_layernorm.", None),
    # shift, scale and gate of the attention, then of the feed-forward; the video's, then the text's
    (
        r"^{block}norm1\.linear\.",
        r"mixins.adaln_layer.adaLN_modulations.\1.1.",
        (12, (0, 1, 2, 6, 7, 8)),
    ),
    (
        r"^{block}norm2\.linear\.",
        r"mixins.adaln_layer.adaLN_modulations.\1.1.",
        (12, (3, 4, 5, 9, 10, 11)),
    ),
    (r"^norm_final\.", "transformer.final_layernorm.", None),
    (r"^(time|ofs)_embedding\.linear_1\.", r"\1_embed.0.", None),
    (r"^(time|ofs)_embedding\.linear_2\.", r"\1_embed.2.", None),
    (r"^patch_embed\.pos_embedding$", "mixins.pos_embed.pos_embedding", None),
    (r"^patch_embed\.", "mixins.patch_embed.", None),
    (r"^norm_out\.norm\.", "mixins.final_layer.norm_final.", None),
    (r"^norm_out\.linear\.", "mixins.final_layer.adaLN_modulation.1.", None),
    (r"^proj_out\.", "mixins.final_layer.linear.", None),
)


def empty_transformer(settings: dict) -> torch.nn.Module:
    """Of these settings of a config.json. Its weights take no memory."""
    from accelerate import init_empty_weights
    from diffusers import CogVideoXTransformer3DModel

    with init_empty_weights():
        return CogVideoXTransformer3DModel.from_config(settings)


def is_whole(tensors: dict[str, Tensor]) -> bool:
    """Whether this is a whole transformer of CogVideoX. SAT's LoRAs hold the base model too."""
    if any(".matrix_A." in name for name in tensors):
        return False
    return any(prefix + SIGN in tensors for prefix in PREFIXES) or is_of_sat(tensors)


def is_of_sat(tensors: dict[str, Tensor]) -> bool:
    return any(prefix + SAT_SIGN in tensors for prefix in SAT_PREFIXES)


def weights_for(
    transformer: torch.nn.Module, tensors: dict[str, Tensor], path: Path, base: str
) -> tuple[dict[str, Tensor], str]:
    """The transformer's weights from the tensors of a file, and what kind of file it is.

    UserError if one is missing, is too many, or has another shape.
    """
    expected = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    if is_of_sat(tensors):
        prefix = next(p for p in SAT_PREFIXES if p + SAT_SIGN in tensors)
        theirs, form = from_sat(expected, without_prefix(tensors, prefix)), "transformer of SAT"
    else:
        prefix = next(p for p in PREFIXES if p + SIGN in tensors)
        theirs, form = without_prefix(tensors, prefix), "transformer, names of diffusers"
        theirs = {n: t for n, t in theirs.items() if n in expected or not COMPUTED.search(n)}
    require_the_same(expected, theirs, path, base)
    return theirs, form


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those with the prefix. SAT keeps the VAE and the text encoder in the same file."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def from_sat(expected: dict[str, torch.Size], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SAT's weights by diffusers' names; what is not in `expected` keeps its name."""
    found, used = {}, set()
    for name, shape in expected.items():
        key, rows = sat_name(name)
        if key not in tensors:
            continue
        used.add(key)
        tensor = tensors[key]
        if rows is not None and len(tensor) % rows[0] == 0:
            parts = tensor.chunk(rows[0])
            tensor = torch.cat([parts[number] for number in rows[1]])
        # The first layer is a linear one in SAT and may be a convolution in diffusers.
        same_size = name == "patch_embed.proj.weight" and tensor.numel() == shape.numel()
        found[name] = tensor.reshape(shape) if same_size else tensor
    left = {key: t for key, t in tensors.items() if key not in used and not COMPUTED.search(key)}
    return found | left


def sat_name(name: str) -> tuple[str, tuple[int, tuple[int, ...]] | None]:
    """SAT's name of a weight, and which parts of its rows it is; None: all rows."""
    for pattern, theirs, rows in SAT_WEIGHTS:
        pattern = pattern.replace("{block}", r"transformer_blocks\.(\d+)\.")
        renamed, count = re.subn(pattern, theirs.replace("{sat}", r"transformer.layers.\1."), name)
        if count:
            return renamed, rows
    return name, None


def require_the_same(
    expected: dict[str, torch.Size], theirs: dict[str, Tensor], path: Path, base: str
) -> None:
    shapes = {name: tensor.shape for name, tensor in theirs.items()}
    wrong = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    missing = [name for name in expected if name not in shapes]
    unknown = [name for name in shapes if name not in expected]
    if not (wrong or missing or unknown):
        return
    if wrong:
        name = wrong[0]
        first = f"{name}: {list(shapes[name])} in the file, {list(expected[name])} in the model"
        said = f"{len(wrong)} of {len(expected)} weights have another shape. The first is {first}"
    elif missing:
        said = f"{len(missing)} of {len(expected)} weights are missing. The first is {missing[0]}"
    else:
        said = f"it has {len(unknown)} weights more. The first is {unknown[0]}"
    layers = possible_layers()
    known = {n: tuple(shapes[f"{n}.weight"]) for n in layers if f"{n}.weight" in shapes}
    raise UserError(f"{path} does not fit {base}: {said}. {fits_in_words(known)}")
