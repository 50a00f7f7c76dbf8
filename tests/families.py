"""Tiny random checkpoints of the five released families: their own flags, in their on-disk format, at nano's size."""

from pathlib import Path

import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel

from cogvx.model import nano
from cogvx.model.released import RELEASED

FAMILIES = list(RELEASED)
SMALLER = {
    "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "time_embed_dim": 64, "text_embed_dim": nano.TEXT_WIDTH,
    "max_text_seq_length": nano.TEXT_TOKENS,
}  # fmt: skip
# Height and width differ, so that no one can be taken for the other. 1.5 cuts its grid out of a larger one.
SAMPLE_1_0 = {"sample_height": 12, "sample_width": 16, "sample_frames": 9}
SAMPLE_1_5 = {"sample_height": 40, "sample_width": 48, "sample_frames": 17}


def tiny(family: str) -> nano.Tiny:
    transformer, vae, snr_shift_scale, _ = RELEASED[family]
    smaller = SMALLER | (SAMPLE_1_0 if transformer["patch_size_t"] is None else SAMPLE_1_5)
    if transformer["ofs_embed_dim"] is not None:
        smaller = smaller | {"ofs_embed_dim": SMALLER["time_embed_dim"]}
    own = {name: vae[name] for name in ("scaling_factor", "invert_scale_latents")}
    return nano.Tiny(transformer | smaller, nano.NANO.vae | own, snr_shift_scale)


def write(folder: Path, family: str) -> Path:
    nano.write(folder, tiny(family))
    if tiny(family).geometry.learned_positions:  # a new table is the sine table; a trained one is not
        transformer = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            table = transformer.patch_embed.pos_embedding
            table += 0.1 * torch.randn(table.shape, generator=generator)
        transformer.save_pretrained(folder / "transformer")
    return folder


def pipeline_class(family: str):
    return CogVideoXImageToVideoPipeline if tiny(family).geometry.image_to_video else CogVideoXPipeline
