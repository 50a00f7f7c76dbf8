"""The layers of a CogVideoX transformer that can take a LoRA, and their shapes.   [no torch]"""

from __future__ import annotations

from cogvx.model.released import RELEASED, TRANSFORMER_2B

Shape = tuple[int, ...]  # of a layer's weight: [out, in], or [out, in, h, w]

BLOCK_LAYERS = (
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear"),
)
OTHER_LAYERS = (
    *("patch_embed.proj", "patch_embed.text_proj", "time_embedding.linear_1"),
    *("time_embedding.linear_2", "ofs_embedding.linear_1", "ofs_embedding.linear_2"),
    *("norm_out.linear", "proj_out"),
)
# Released transformers have 30 and 42 blocks.
MOST_BLOCKS = 100


def possible_layers() -> list[str]:
    """The layers of every transformer with up to MOST_BLOCKS blocks."""
    in_blocks = [
        f"transformer_blocks.{number}.{layer}"
        for number in range(MOST_BLOCKS)
        for layer in BLOCK_LAYERS
    ]
    return [*in_blocks, *OTHER_LAYERS]


def layer_shapes(settings: dict) -> dict[str, Shape]:
    """The shape of each layer's weight. settings: of a transformer's config.json."""
    settings = TRANSFORMER_2B | settings
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    found = {
        f"transformer_blocks.{number}.{layer}": shape
        for number in range(settings["num_layers"])
        for layer, shape in block_shapes(width, settings["time_embed_dim"]).items()
    }
    return found | other_shapes(width, settings)


def block_shapes(width: int, time: int) -> dict[str, Shape]:
    attention = dict.fromkeys(BLOCK_LAYERS[:4], (width, width))
    feed_forward = {"ff.net.0.proj": (4 * width, width), "ff.net.2": (width, 4 * width)}
    return attention | feed_forward | dict.fromkeys(BLOCK_LAYERS[6:], (6 * width, time))


def other_shapes(width: int, settings: dict) -> dict[str, Shape]:
    side, time, ofs = (settings[n] for n in ("patch_size", "time_embed_dim", "ofs_embed_dim"))
    frames, channels = settings["patch_size_t"], settings["in_channels"]
    patch = (channels, side, side) if frames is None else (channels * side * side * frames,)
    found = {
        "patch_embed.proj": (width, *patch),
        "patch_embed.text_proj": (width, settings["text_embed_dim"]),
        "time_embedding.linear_1": (time, width),
        "time_embedding.linear_2": (time, time),
        "norm_out.linear": (2 * width, time),
        "proj_out": (settings["out_channels"] * side * side * (frames or 1), width),
    }
    if ofs is not None:
        found |= dict.fromkeys(("ofs_embedding.linear_1", "ofs_embedding.linear_2"), (ofs, ofs))
    return found


def fitting_models(layers: dict[str, Shape]) -> list[str]:
    """The options of conf/model/ whose transformer has all these layers in these shapes."""
    shapes = {option: layer_shapes(transformer) for option, (transformer, *_) in RELEASED.items()}
    return [
        option
        for option, theirs in shapes.items()
        if all(theirs.get(layer) == shape for layer, shape in layers.items())
    ]


def fits_in_words(layers: dict[str, Shape]) -> str:
    """Ends a message about weights of another base model."""
    options = fitting_models(layers)
    if not options:
        return "It fits none of the released CogVideoX models"
    return f"It fits {' and '.join(f'model={option}' for option in options)}"


def misfit_in_words(
    place: object, layers: dict[str, Shape], of_base: dict[str, Shape], base: object
) -> str | None:
    """What is wrong if a LoRA of these layers is for another base model; None if it fits.

    place, base: how the LoRA and the base model are called to the user.
    """
    wrong = [layer for layer, shape in layers.items() if of_base.get(layer) != shape]
    if not wrong:
        return None
    first = wrong[0]
    here = list(of_base[first]) if first in of_base else "not there"
    return (
        f"{place} is for another base model: {len(wrong)} of its {len(layers)} layers do not fit "
        f"{base}. The first is {first}: {list(layers[first])} in the file, {here} in the model. "
        f"{fits_in_words(layers)}"
    )
