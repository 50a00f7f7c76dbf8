"""A CogVideoX of 2.5 million parameters that knows a little world (cogvx/data/world.py), in the released checkpoints' own format.

The real classes at tiny size, like 2B: sine positions, no rotary; VAE 4 x 4 x 4, patch 2. Everything that loads, trains, samples
and saves the 2B does it here too; nano_i2v is the same for image-to-video. weights/README.md says how the weights were made.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from cogvx.data.cache import filled
from cogvx.model.geometry import Geometry
from cogvx.model.released import SCHEDULER, TRANSFORMER_2B, VAE_2B

WEIGHTS = (
    Path(__file__).parent / "weights"
)  # nano/ whole but for what write_settings() adds; of nano_i2v/ the transformer
TEXT_TOKENS = 32
TEXT_WIDTH = 64
LATENT_CHANNELS = 16
SCALING_FACTOR = 1.3504  # 1 / standard deviation of the VAE's latents of the world's clips; task=nano_vae measures it


@dataclass(frozen=True)
class Tiny:
    """A checkpoint to be written: what its transformer, VAE and noise schedule are built from."""

    transformer: dict
    vae: dict
    snr_shift_scale: float

    @property
    def geometry(self) -> Geometry:
        return Geometry.from_configs(self.transformer, self.vae, "F16")


NANO = Tiny(
    transformer=TRANSFORMER_2B | {
        "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 6, "time_embed_dim": 128,
        "text_embed_dim": TEXT_WIDTH, "max_text_seq_length": TEXT_TOKENS, "sample_frames": 9, "sample_height": 16, "sample_width": 16,
    },
    # Tiles are half of sample_height and sample_width; of these sizes their overlaps are whole latent pixels, as the 2B's are.
    vae=VAE_2B | {
        "down_block_types": ["CogVideoXDownBlock3D"] * 3, "up_block_types": ["CogVideoXUpBlock3D"] * 3,
        "block_out_channels": [16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": LATENT_CHANNELS,
        "sample_height": 96, "sample_width": 80, "scaling_factor": SCALING_FACTOR,
    },
    snr_shift_scale=1.0,  # as the 5B's; the 2B's 3 is for larger frames
)  # fmt: skip
NANO_I2V = replace(NANO, transformer=NANO.transformer | {"in_channels": 2 * LATENT_CHANNELS})


def write(folder: Path, tiny: Tiny = NANO, *, blank: bool = False) -> Path:
    """nano or nano_i2v in a folder, unless it is there. `blank`: with a transformer that is still to be trained: a random one, or
    for image-to-video nano's own, which does not look at the image."""
    return filled(folder, lambda partial: write_parts(partial, tiny, blank))


def write_parts(folder: Path, tiny: Tiny, blank: bool) -> None:
    from cogvx.progress import library_bars

    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(WEIGHTS / "nano" / part, folder / part)
    if blank:
        with library_bars(shown=False):
            blank_transformer(tiny).save_pretrained(folder / "transformer")
    else:
        name = "nano_i2v" if tiny.geometry.image_to_video else "nano"
        shutil.copytree(WEIGHTS / name / "transformer", folder / "transformer")
    write_settings(folder, tiny)


def blank_transformer(tiny: Tiny):
    import torch
    from diffusers import CogVideoXTransformer3DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(**tiny.transformer)
    if not tiny.geometry.image_to_video:
        return transformer
    trained = CogVideoXTransformer3DModel.from_pretrained(
        WEIGHTS / "nano" / "transformer", torch_dtype=torch.float32
    )
    weights = trained.state_dict()
    name = "patch_embed.proj.weight"  # [width, channels, patch, patch]
    weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])], dim=1)
    transformer.load_state_dict(weights)
    return transformer


def write_random(folder: Path, tiny: Tiny) -> Path:
    """A checkpoint of random weights, always the same, in a folder, unless it is there."""
    return filled(folder, lambda partial: write_random_parts(partial, tiny))


def write_random_parts(folder: Path, tiny: Tiny) -> None:
    import torch
    from diffusers import CogVideoXTransformer3DModel

    from cogvx.progress import library_bars

    with library_bars(shown=False), torch.random.fork_rng():
        torch.manual_seed(0)
        write_text_encoder(folder)
        CogVideoXTransformer3DModel(**tiny.transformer).save_pretrained(folder / "transformer")
        narrow_posterior(new_vae(tiny)).save_pretrained(folder / "vae")
    write_settings(folder, tiny)


def write_settings(folder: Path, tiny: Tiny) -> None:
    noise_scheduler(tiny.snr_shift_scale).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": tiny.geometry.pipeline} | PARTS, indent=2), encoding="utf-8"
    )


def new_vae(tiny: Tiny = NANO):
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(**tiny.vae)


def narrow_posterior(vae):
    """With a posterior far narrower than its means are spread, as a trained VAE has: else every latent would be noise."""
    import torch

    with torch.no_grad():
        vae.encoder.conv_out.conv.bias[LATENT_CHANNELS:] = -10  # log variance
    return vae


NEIGHBOURS = {
    "1 before": 1,
    "1 after": 17,
    "2 before": 2,
    "2 after": 18,
}  # T5's buckets of relative positions (Raffel et al. 2020)
LOOKS = 6.0  # how much more each head attends to its neighbour, in logits


def write_text_encoder(folder: Path) -> None:
    """A random T5 and its tokenizer; nothing in it needs to be trained. Each of its heads looks at one neighbour of a token, so that
    the red of a red circle differs from that of a red background: the transformer has no positions for text of its own."""
    import torch
    from transformers import T5Config, T5EncoderModel

    vocabulary = write_tokenizer(folder / "tokenizer")
    settings = {
        "d_model": TEXT_WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": len(NEIGHBOURS), "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    encoder = T5EncoderModel(
        T5Config(vocab_size=vocabulary, is_encoder_decoder=False, use_cache=False, **settings)
    )
    bias = (
        encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    )  # [buckets, heads], of all layers
    with torch.no_grad():
        for head, bucket in enumerate(NEIGHBOURS.values()):
            bias[bucket, head] += LOOKS
    encoder.save_pretrained(folder / "text_encoder")


def write_tokenizer(folder: Path) -> int:
    """A sentencepiece model of the world's captions and single letters, as T5's spiece.model; returns its size."""
    import string

    import sentencepiece

    from cogvx.data import world

    captions = [scene.caption() for scene in world.scenes(len(world.COMBINATIONS), 0)]
    words = sorted({word.strip(".") for caption in captions for word in caption.split()})
    punctuated = [
        f"{word}, {word}." for word in words
    ]  # a piece has to be part of two different words
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*captions, *punctuated * 10, *string.printable]),
        model_writer=written, vocab_size=300, hard_vocab_limit=False, character_coverage=1.0,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    folder.mkdir()
    (folder / "spiece.model").write_bytes(written.getvalue())
    settings = {
        "tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": [], "model_max_length": TEXT_TOKENS,
        "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).get_piece_size()


def noise_scheduler(snr_shift_scale: float = NANO.snr_shift_scale):
    """As released: scaled linear betas, zero terminal SNR, v-prediction, trailing spacing; the shift is 3 for 2B, 1 for the others."""
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=snr_shift_scale)


PARTS = {
    "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}


def keep_weights(run: Path, place: Path) -> None:
    """Copies a run's transformer to be shipped, in fp16."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel.from_pretrained(
        run / "transformer", torch_dtype=torch.float16
    )
    transformer.save_pretrained(place / "transformer")
    path = place / "transformer" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # where it was on this machine
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import sys

    keep_weights(Path(sys.argv[1]), Path(sys.argv[2]))
