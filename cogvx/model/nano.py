"""A CogVideoX checkpoint of 2 million parameters, written to disk in the released checkpoints' own format.

The real classes at tiny size, like 2B: sine positions, no rotary; VAE 4 x 4 x 4, patch 2. Everything that loads,
trains, samples and saves the 2B does it here too. The weights are random but always the same.
"""

from __future__ import annotations

import io
from pathlib import Path

from cogvx.data.cache import filled
from cogvx.model.geometry import Geometry

TEXT_TOKENS = 64
TEXT_WIDTH = 64
LATENT_CHANNELS = 16
SCALING_FACTOR = 2.65  # 1 / standard deviation of the random VAE's latents of the demo's clips; a test measures it

GEOMETRY = Geometry(
    spatial_stride=4,
    temporal_stride=4,
    patch_size=2,
    patch_size_t=None,
    in_channels=LATENT_CHANNELS,
    latent_channels=LATENT_CHANNELS,
    sample_height=16,
    sample_width=16,
    head_dim=32,
    rotary=False,
    text_tokens=TEXT_TOKENS,
    scaling_factor=SCALING_FACTOR,
)


def write(folder: Path) -> Path:
    """The checkpoint's folder, written unless it is there."""
    return filled(folder, write_parts)


def write_parts(folder: Path) -> None:
    import torch

    from cogvx.model.checkpoint import library_bars

    with library_bars(shown=False), torch.random.fork_rng():
        torch.manual_seed(0)
        vocabulary = write_tokenizer(folder / "tokenizer")
        transformer().save_pretrained(folder / "transformer")
        narrow_posterior(vae()).save_pretrained(folder / "vae")
        text_encoder(vocabulary).save_pretrained(folder / "text_encoder")
    noise_scheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(MODEL_INDEX, encoding="utf-8")


def transformer():
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=GEOMETRY.head_dim, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        time_embed_dim=128, text_embed_dim=TEXT_WIDTH, num_layers=4, sample_width=GEOMETRY.sample_width,
        sample_height=GEOMETRY.sample_height, sample_frames=9, patch_size=2, max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=False,
    )  # fmt: skip


def vae():
    """Tiles are half of sample_height and sample_width; of these sizes their overlaps are whole latent pixels, as the 2B's are."""
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, latent_channels=LATENT_CHANNELS,
        sample_height=96, sample_width=80, scaling_factor=SCALING_FACTOR,
    )  # fmt: skip


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
    import json
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


def noise_scheduler():
    """The 2B's: scaled linear betas, SNR shift 3, zero terminal SNR, v-prediction, trailing spacing."""
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing",
    )  # fmt: skip


MODEL_INDEX = """{
  "_class_name": "CogVideoXPipeline",
  "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
  "text_encoder": ["transformers", "T5EncoderModel"],
  "tokenizer": ["transformers", "T5Tokenizer"],
  "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
  "vae": ["diffusers", "AutoencoderKLCogVideoX"]
}
"""
