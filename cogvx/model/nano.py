"""A CogVideoX checkpoint of 2 million parameters, written to disk in the released checkpoints' own format.

The real classes at tiny size, like 2B: sine positions, no rotary; VAE 4 x 4 x 4, patch 2. Everything that loads,
trains, samples and saves the 2B does it here too; nano_i2v is the same for image-to-video. The weights are random but
always the same.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

from cogvx.data.cache import filled
from cogvx.model.geometry import Geometry
from cogvx.model.released import SCHEDULER, TRANSFORMER_2B, VAE_2B

TEXT_TOKENS = 64
TEXT_WIDTH = 64
LATENT_CHANNELS = 16
SCALING_FACTOR = 2.65  # 1 / standard deviation of the random VAE's latents of the demo's clips; a test measures it


@dataclass(frozen=True)
class Tiny:
    """A checkpoint to be written: what its transformer, VAE and noise schedule are built from."""

    transformer: dict
    vae: dict
    snr_shift_scale: float

    @property
    def geometry(self) -> Geometry:
        return Geometry.from_configs(self.transformer, self.vae, "F32")


NANO = Tiny(
    transformer=TRANSFORMER_2B | {
        "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 4, "time_embed_dim": 128,
        "text_embed_dim": TEXT_WIDTH, "max_text_seq_length": TEXT_TOKENS, "sample_frames": 9, "sample_height": 16, "sample_width": 16,
    },
    # Tiles are half of sample_height and sample_width; of these sizes their overlaps are whole latent pixels, as the 2B's are.
    vae=VAE_2B | {
        "down_block_types": ["CogVideoXDownBlock3D"] * 3, "up_block_types": ["CogVideoXUpBlock3D"] * 3,
        "block_out_channels": [16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": LATENT_CHANNELS,
        "sample_height": 96, "sample_width": 80, "scaling_factor": SCALING_FACTOR,
    },
    snr_shift_scale=3.0,
)  # fmt: skip
NANO_I2V = replace(NANO, transformer=NANO.transformer | {"in_channels": 2 * LATENT_CHANNELS})


def write(folder: Path, tiny: Tiny = NANO) -> Path:
    """The checkpoint's folder, written unless it is there."""
    return filled(folder, lambda partial: write_parts(partial, tiny))


def write_parts(folder: Path, tiny: Tiny) -> None:
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    from cogvx.model.checkpoint import library_bars

    with library_bars(shown=False), torch.random.fork_rng():
        torch.manual_seed(0)
        vocabulary = write_tokenizer(folder / "tokenizer")
        CogVideoXTransformer3DModel(**tiny.transformer).save_pretrained(folder / "transformer")
        narrow_posterior(AutoencoderKLCogVideoX(**tiny.vae)).save_pretrained(folder / "vae")
        text_encoder(vocabulary).save_pretrained(folder / "text_encoder")
    noise_scheduler(tiny.snr_shift_scale).save_pretrained(folder / "scheduler")
    pipeline = "CogVideoXImageToVideoPipeline" if tiny.geometry.image_to_video else "CogVideoXPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline} | PARTS, indent=2), encoding="utf-8")


def narrow_posterior(vae):
    """With a posterior far narrower than its means are spread, as a trained VAE has: else every latent would be noise."""
    import torch

    with torch.no_grad():
        vae.encoder.conv_out.conv.bias[LATENT_CHANNELS:] = -10  # log variance
    return vae


def text_encoder(vocabulary: int):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def write_tokenizer(folder: Path) -> int:
    """A sentencepiece model of the demo's captions and single letters, as T5's spiece.model; returns its size."""
    import string

    import sentencepiece

    from cogvx.data.demo import SCENES

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([scene.caption() for scene in SCENES] * 10 + list(string.printable)),
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
