"""Writes a random checkpoint of the real size in the files of a released one, without its RAM.

A safetensors file is the length of its header (8 bytes), the header in JSON (each tensor's dtype,
shape and place), and the tensors one after the other: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import torch

from cogvx.files import write_json
from cogvx.model import nano
from cogvx.model.released import RELEASED, T5_XXL

# Random numbers that repeat: 4 MiB of fp16.
TILE = 2**21
# The released T5 comes in two files of at most this size.
SHARD = 5 * 10**9  # bytes


def write(folder: Path, *, small: bool) -> int:
    """The 2b, or a tiny one with its classes. Returns the bytes of all weights."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    if small:
        import families

        families.write(folder, "2b")
        return sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    transformer, vae, shift, _ = RELEASED["2b"]
    nano.write_tokenizer(folder / "tokenizer")
    nano.write_settings(folder, nano.Tiny(transformer, vae, shift))
    kinds = {
        "down_block_types": ["CogVideoXDownBlock3D"] * 4,
        "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    }
    with torch.device("meta"):
        parts = {
            "transformer": CogVideoXTransformer3DModel(**transformer),
            "vae": AutoencoderKLCogVideoX(**vae | kinds),
            "text_encoder": T5EncoderModel(T5Config(**T5_XXL)),
        }
    for name in ("transformer", "vae"):
        parts[name].save_config(folder / name)
    parts["text_encoder"].config.save_pretrained(folder / "text_encoder")
    names = dict.fromkeys(("transformer", "vae"), "diffusion_pytorch_model")
    names["text_encoder"] = "model"
    return sum(write_part(folder / name, stem, parts[name]) for name, stem in names.items())


def write_part(folder: Path, stem: str, model: torch.nn.Module) -> int:
    shapes = {
        name: list(weight.shape)
        for name, weight in model.state_dict().items()
        # T5 has its embedding under two names, and its file has it once.
        if name != "encoder.embed_tokens.weight"
    }
    shards = [[]]
    for name, shape in shapes.items():
        if sum(bytes_of(shapes[each]) for each in shards[-1]) + bytes_of(shape) > SHARD:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        return write_file(folder / f"{stem}.safetensors", shapes)
    places, total = {}, 0
    for number, names in enumerate(shards, 1):
        path = folder / f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        total += write_file(path, {name: shapes[name] for name in names})
        places |= dict.fromkeys(names, path.name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / f"{stem}.safetensors.index.json", index)
    return total


def bytes_of(shape: list[int]) -> int:
    return 2 * math.prod(shape)


def write_file(path: Path, shapes: dict[str, list[int]]) -> int:
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = place + bytes_of(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = 0.02 * numpy.random.default_rng(0).standard_normal(TILE, dtype=numpy.float32)
    tile = numbers.astype(numpy.float16).tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, place, len(tile)):
            file.write(tile[: place - start])
    return place
