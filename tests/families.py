"""Tiny random models of the five released families, with their flags and on-disk format.

And the comparison of what training passes to the transformer with what the pipeline passes.
"""

from pathlib import Path

import diffusers
import numpy
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from cogvx.data.cuts import head
from cogvx.data.encode import Encoder, image_moments, image_of
from cogvx.data.filled import filled
from cogvx.data.prompts import prompt_embeds
from cogvx.data.sources import Example
from cogvx.model import nano
from cogvx.model.cogvideox import CogVideoX
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.released import RELEASED
from cogvx.progress import library_bars
from cogvx.training.step import Batch, FixedDraw, Sample, training_losses

CPU = torch.device("cpu")
PROMPT = "A red circle moves up."

FAMILIES = list(RELEASED)
SMALLER = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "time_embed_dim": 64,
    "text_embed_dim": nano.TEXT_WIDTH,
    "max_text_seq_length": nano.TEXT_TOKENS,
}
# Height and width differ, so that a test sees it if they are swapped.
# 1.5 cuts its grid out of a larger one.
SAMPLE_1_0 = {"sample_height": 12, "sample_width": 16, "sample_frames": 9}
SAMPLE_1_5 = {"sample_height": 40, "sample_width": 48, "sample_frames": 17}


def tiny(family: str) -> nano.Tiny:
    transformer, vae, snr_shift_scale, _ = RELEASED[family]
    smaller = SMALLER | (SAMPLE_1_0 if transformer["patch_size_t"] is None else SAMPLE_1_5)
    if transformer["ofs_embed_dim"] is not None:
        smaller = smaller | {"ofs_embed_dim": SMALLER["time_embed_dim"]}
    own = {name: vae[name] for name in ("scaling_factor", "invert_scale_latents")}
    return nano.Tiny(transformer | smaller, nano.NANO.vae | own, snr_shift_scale)


def write_random(folder: Path, tiny: nano.Tiny) -> Path:
    """A model of random weights, always the same, unless the folder exists."""
    return filled(folder, lambda partial: write_random_parts(partial, tiny))


def write_random_parts(folder: Path, tiny: nano.Tiny) -> None:
    with library_bars(shown=False), torch.random.fork_rng():
        torch.manual_seed(0)
        nano.write_text_encoder(folder)
        CogVideoXTransformer3DModel(**tiny.transformer).save_pretrained(folder / "transformer")
        with_narrow_posterior(nano.new_vae(tiny)).save_pretrained(folder / "vae")
    nano.write_settings(folder, tiny)


def with_narrow_posterior(vae):
    """As in a trained VAE, the means spread further than the posterior, or latents were noise."""
    with torch.no_grad():
        vae.encoder.conv_out.conv.bias[nano.LATENT_CHANNELS :] = -10  # log variance
    return vae


def write(folder: Path, family: str) -> Path:
    write_random(folder, tiny(family))
    # A new learned table is the sine table. A trained one is not.
    if tiny(family).geometry.learned_positions:
        transformer = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            table = transformer.patch_embed.pos_embedding
            table += 0.1 * torch.randn(table.shape, generator=generator)
        transformer.save_pretrained(folder / "transformer")
    return folder


def pipeline_class(family: str):
    return getattr(diffusers, tiny(family).geometry.pipeline)


def model_of(folder) -> CogVideoX:
    pretrained = PretrainedModel(folder, CPU, torch.float32)
    return CogVideoX(
        pretrained.transformer(),
        pretrained.noise_scheduler(),
        pretrained.geometry(),
        device=CPU,
        dtype=torch.float32,
    )


def recorded(transformer) -> list[tuple[dict, torch.Tensor]]:
    """Records from now on what the transformer is called with and what it answers."""
    calls, forward = [], transformer.forward

    def record(**given):
        answer = forward(**given)
        calls.append(
            (
                {k: v for k, v in given.items() if k not in ("attention_kwargs", "return_dict")},
                answer[0],
            )
        )
        return answer

    transformer.forward = record
    return calls


class PipelinesDraw(FixedDraw):
    """Draws what the pipeline drew: its starting noise, and its sample of the image's posterior."""

    def noise(self, latents):
        assert latents.shape == self.pipelines_noise.shape, (
            "as many frames as the pipeline has, padding included"
        )
        return self.pipelines_noise

    def posterior(self, moments, stream=None):
        if stream is None:
            return super().posterior(moments)
        return DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(7))


def passed_by_the_pipeline(folder, family, frames, height, width, picture):
    pipeline = pipeline_class(family).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    calls = recorded(pipeline.transformer)
    start = {"image": picture} if picture else {}
    pipeline(
        **start,
        prompt=PROMPT,
        guidance_scale=1,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=2,
        max_sequence_length=nano.TEXT_TOKENS,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    )
    return calls[0]


def passed_by_training(folder, compose, frames, height, width, picture, theirs):
    """Latents of any clip of this length: at the pipeline's first timestep no signal is left."""
    pretrained, model = PretrainedModel(folder, CPU, torch.float32), model_of(folder)
    calls = recorded(model.transformer)
    encoder = Encoder(None, "", torch.float32, CPU)
    tokenizer, text_encoder = pretrained.text_encoder()
    images = None
    if picture:
        data = compose(
            f"data.height={height}", f"data.width={width}", "data.image_noise_variants=0"
        ).data
        example = Example("", None, "", image=folder.parent / f"{picture.size}.png")
        picture.save(example.image)
        image = image_of(example, head(data), data)
        images = image_moments(pretrained.vae(tiling=False), image, encoder, 0, seed="0")
        assert images.shape[0] == 1
    moments = torch.randn((1, 32, (frames - 1) // 4 + 1, height // 4, width // 4))
    tokens = model.geometry.text_tokens
    [(embeds, _)] = prompt_embeds(tokenizer, text_encoder, [PROMPT], encoder, tokens)
    draw = PipelinesDraw(0, [Sample(0, 0, 0)], CPU, timestep=int(theirs["timestep"]))
    object.__setattr__(draw, "pipelines_noise", theirs["hidden_states"][:, :, :16])
    with torch.no_grad():
        training_losses(model, Batch(moments, embeds[None], images), draw)
    return calls[0]


def differences_from_the_pipeline(folder, family, compose, frames, height, width) -> list[str]:
    """What training passes to the transformer and the pipeline does not, bit for bit.

    "answer" is among them if the transformer's answer differs.
    """
    noise = numpy.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    picture = Image.fromarray(noise) if tiny(family).geometry.image_to_video else None
    theirs, their_answer = passed_by_the_pipeline(folder, family, frames, height, width, picture)
    ours, our_answer = passed_by_training(folder, compose, frames, height, width, picture, theirs)
    # What this family has.
    given = {
        "hidden_states": True,
        "encoder_hidden_states": True,
        "timestep": True,
        "image_rotary_emb": family != "2b",
        "ofs": family == "1_5_5b_i2v",
    }
    found = [
        name for name, there in given.items() if not same(ours[name], theirs.get(name), there=there)
    ]
    if not torch.equal(our_answer, their_answer):
        # It also depends on the positions that the transformer adds itself.
        found.append("answer")
    if ours["hidden_states"].shape[1] % (tiny(family).geometry.patch_size_t or 1):
        found.append("latent frames that are no whole patches")
    return found


def same(ours, theirs, *, there: bool) -> bool:
    if not there:
        return ours is None and theirs is None
    if isinstance(ours, tuple):
        return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    return ours is not None and theirs is not None and torch.equal(ours, theirs)
