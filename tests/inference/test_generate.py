"""Videos are made as plain diffusers makes them, with every setting of the call."""

from types import SimpleNamespace

import diffusers
import numpy
import pytest
import torch

from cogvx.data.encode import Encoder, prompt_embeds
from cogvx.model.pretrained import PretrainedModel
from cogvx.records.usage import snippet
from cogvx.training.videos import VideoGenerator

CPU = torch.device("cpu")
PROMPT, SEED = "A red circle moves up.", 3
SHORT = ["data.max_num_frames=5", "validation.num_inference_steps=3"]


def embeds_of(pretrained):
    """As the run's cache gives them: a function from a prompt to its embedding."""
    tokenizer, encoder = pretrained.text_encoder()
    how = Encoder(None, "", torch.float32, CPU)
    tokens = pretrained.geometry().text_tokens
    return lambda prompt: prompt_embeds(tokenizer, encoder, [prompt], how, tokens)[0][0]


def generator_of(config, folder, **given):
    pretrained = PretrainedModel(folder, CPU, torch.float32)
    return VideoGenerator(config, pretrained, embeds_of(pretrained), {}, **given)


def made_by(generator, prompt=PROMPT) -> numpy.ndarray:
    transformer = generator.pretrained.transformer()
    return generator.generate(transformer, generator.vae(), prompt, SEED)


def made_by_diffusers(folder, pipeline, config, scheduler=None, **given) -> numpy.ndarray:
    pipe = getattr(diffusers, pipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    frames = pipe(
        **given,
        prompt=PROMPT,
        height=config.data.height,
        width=config.data.width,
        num_inference_steps=config.validation.num_inference_steps,
        guidance_scale=config.validation.guidance_scale,
        use_dynamic_cfg=config.validation.use_dynamic_cfg,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).frames[0]
    return (frames * 255).round().clip(0, 255).astype("uint8")


@pytest.mark.parametrize(
    ("asked", "scheduler", "given"),
    [
        ([], None, {}),
        (
            ["validation.scheduler=dpm", "validation.use_dynamic_cfg=true"],
            "CogVideoXDPMScheduler",
            {},
        ),
        (
            ["validation.negative_prompt='a blue square'"],
            None,
            {"negative_prompt": "a blue square"},
        ),
    ],
)
def test_videos_are_those_of_plain_diffusers(compose, nano_folder, asked, scheduler, given):
    config = compose(*SHORT, *asked)
    theirs = made_by_diffusers(
        nano_folder, "CogVideoXPipeline", config, scheduler, num_frames=5, **given
    )
    assert numpy.array_equal(made_by(generator_of(config, nano_folder)), theirs)
    if asked:
        usual = made_by(generator_of(compose(*SHORT), nano_folder))
        assert not numpy.array_equal(usual, theirs), "the setting does something"


def test_the_lines_for_plain_diffusers_name_the_scheduler(tmp_path):
    settings = {
        "pipeline": "CogVideoXPipeline",
        "base_model": "me/model",
        "torch_dtype": "float16",
        "lora_scale": 1.0,
        "image": None,
        "revision": None,
    }
    assert "Scheduler" not in snippet(tmp_path, settings)
    lines = snippet(tmp_path, settings | {"scheduler": "CogVideoXDPMScheduler"}).splitlines()
    assert "from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline" in lines
    pipe = SimpleNamespace(scheduler=diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.0))
    [line] = [line for line in lines if line.startswith("pipe.scheduler")]
    exec(line, {"pipe": pipe, "CogVideoXDPMScheduler": diffusers.CogVideoXDPMScheduler})
    assert isinstance(pipe.scheduler, diffusers.CogVideoXDPMScheduler)
    assert pipe.scheduler.config.snr_shift_scale == 1.0
