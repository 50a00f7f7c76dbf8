"""A CogVideoX of 2.5 million parameters that knows a little world (cogvx/data/world.py).

It has the released models' classes and file format at tiny size, like 2B: sine positions, no
rotary; VAE 4 x 4 x 4, patch 2. Whatever loads, trains, samples and saves 2B does so here too.
nano_i2v is the same for image-to-video. weights/README.md describes how the weights were made.
"""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from cogvx.data.filled import filled
from cogvx.files import read_json, write_bytes, write_json
from cogvx.model.geometry import Geometry
from cogvx.model.released import SCHEDULER, TRANSFORMER_2B, VAE_2B

# nano/ has everything except what write_settings() adds; nano_i2v/ has the transformer only.
SHIPPED_WEIGHTS = Path(__file__).parent / "weights"
TEXT_TOKENS = 32
TEXT_WIDTH = 64
LATENT_CHANNELS = 16
# 1 / standard deviation of the VAE's latents of the world's clips. task=nano_vae measures it.
SCALING_FACTOR = 1.3504


@dataclass(frozen=True)
class Tiny:
    """What a tiny model's transformer, VAE and noise schedule are built from."""

    transformer: dict
    vae: dict
    snr_shift_scale: float

    @property
    def geometry(self) -> Geometry:
        return Geometry.from_configs(self.transformer, self.vae, "F16")


TRANSFORMER = TRANSFORMER_2B | {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 6,
    "time_embed_dim": 128,
    "text_embed_dim": TEXT_WIDTH,
    "max_text_seq_length": TEXT_TOKENS,
    "sample_frames": 9,
    "sample_height": 16,
    "sample_width": 16,
}
VAE = VAE_2B | {
    "down_block_types": ["CogVideoXDownBlock3D"] * 3,
    "up_block_types": ["CogVideoXUpBlock3D"] * 3,
    "block_out_channels": [16, 32, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": LATENT_CHANNELS,
    # A tile is half as high and wide. At this size the tiles' overlaps are whole latent pixels, as
    # those of 2B are.
    "sample_height": 96,
    "sample_width": 80,
    "scaling_factor": SCALING_FACTOR,
}
# The SNR shift is that of 5B. 2B has 3, which suits larger frames.
NANO = Tiny(TRANSFORMER, VAE, snr_shift_scale=1.0)
NANO_I2V = replace(NANO, transformer=TRANSFORMER | {"in_channels": 2 * LATENT_CHANNELS})


def write_nano(folder: Path, tiny: Tiny = NANO, *, blank: bool = False) -> Path:
    """Writes nano or nano_i2v into a folder, unless it exists.

    blank: the transformer is not trained yet. For text-to-video it is random. For image-to-video
    it is nano's own, which ignores the image.
    """
    return filled(folder, lambda partial: write_parts(partial, tiny, blank))


def write_parts(folder: Path, tiny: Tiny, blank: bool) -> None:
    from cogvx.progress import library_bars

    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(SHIPPED_WEIGHTS / "nano" / part, folder / part)
    if blank:
        with library_bars(shown=False):
            blank_transformer(tiny).save_pretrained(folder / "transformer")
    else:
        name = "nano_i2v" if tiny.geometry.image_to_video else "nano"
        shutil.copytree(SHIPPED_WEIGHTS / name / "transformer", folder / "transformer")
    write_settings(folder, tiny)


def blank_transformer(tiny: Tiny):
    import torch
    from diffusers import CogVideoXTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(**tiny.transformer)
    if not tiny.geometry.image_to_video:
        return transformer
    trained = CogVideoXTransformer3DModel.from_pretrained(
        SHIPPED_WEIGHTS / "nano" / "transformer", torch_dtype=torch.float32
    )
    weights = trained.state_dict()
    name = "patch_embed.proj.weight"  # [width, channels, patch, patch]
    weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])], dim=1)
    transformer.load_state_dict(weights)
    return transformer


PIPELINE_PARTS = {
    "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}


def write_settings(folder: Path, tiny: Tiny) -> None:
    """Writes scheduler/ and model_index.json."""
    noise_scheduler(tiny.snr_shift_scale).save_pretrained(folder / "scheduler")
    index = {"_class_name": tiny.geometry.pipeline} | PIPELINE_PARTS
    write_json(folder / "model_index.json", index)


def noise_scheduler(snr_shift_scale: float = NANO.snr_shift_scale):
    """The released models' schedule; the shift is 3 for 2B and 1 for the others."""
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=snr_shift_scale)


def new_vae(tiny: Tiny = NANO):
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(**tiny.vae)


# -- text encoder --------------------------------------------------------------------------------

# T5's buckets of relative positions (Raffel et al. 2020).
NEIGHBOURS = {"1 before": 1, "1 after": 17, "2 before": 2, "2 after": 18}
# How much more each head attends to its neighbour, in logits.
NEIGHBOUR_BIAS = 6.0


def write_text_encoder(folder: Path) -> None:
    """A random T5 and its tokenizer. It needs no training.

    Each head looks at one neighbour of a token. So the red of a red circle differs from that of a
    red background; the transformer itself has no positions for text.
    """
    import torch
    from transformers import T5Config, T5EncoderModel

    settings = T5Config(
        vocab_size=write_tokenizer(folder / "tokenizer"),
        is_encoder_decoder=False,
        use_cache=False,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=len(NEIGHBOURS),
        feed_forward_proj="gated-gelu",
    )
    encoder = T5EncoderModel(settings)
    # [buckets, heads]; all layers use it.
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        for head, bucket in enumerate(NEIGHBOURS.values()):
            bias[bucket, head] += NEIGHBOUR_BIAS
    encoder.save_pretrained(folder / "text_encoder")


def write_tokenizer(folder: Path) -> int:
    """T5's spiece.model for the world's captions and for single letters. Returns its size."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tokenizer_sentences()),
        model_writer=written,
        vocab_size=300,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    write_bytes(folder / "spiece.model", written.getvalue())
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 0,
        "additional_special_tokens": [],
        "model_max_length": TEXT_TOKENS,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    write_json(folder / "tokenizer_config.json", settings)
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).get_piece_size()


def tokenizer_sentences() -> list[str]:
    import string

    from cogvx.data import world

    captions = [scene.caption() for scene in world.scenes(len(world.COMBINATIONS), 0)]
    words = sorted({word.strip(".") for caption in captions for word in caption.split()})
    # A piece must be part of two different words.
    punctuated = [f"{word}, {word}." for word in words]
    return [*captions, *punctuated * 10, *string.printable]


# -- python -m cogvx.model.nano RUN PLACE: how the shipped weights were made ----------------------


def ship_weights(run: Path, place: Path) -> None:
    """Copies a run's transformer, in fp16."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel.from_pretrained(
        run / "transformer", torch_dtype=torch.float16
    )
    transformer.save_pretrained(place / "transformer")
    path = place / "transformer" / "config.json"
    settings = read_json(path)
    # Where it was on this machine.
    settings.pop("_name_or_path", None)
    write_json(path, settings)


if __name__ == "__main__":
    import sys

    ship_weights(Path(sys.argv[1]), Path(sys.argv[2]))
