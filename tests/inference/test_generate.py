"""Videos are made as plain diffusers makes them, with every setting of the call."""

from types import SimpleNamespace

import diffusers
import numpy
import pytest
import torch
from PIL import Image

from cogvx.data.encode import Encoder
from cogvx.data.prompts import prompt_embeds
from cogvx.errors import UserError
from cogvx.evaluation.wanted import starts_of, wanted_prompts
from cogvx.model.geometry import released
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.released import NAMES
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "scheduler", "given"),
    [
        pytest.param([], None, {}, marks=pytest.mark.slow),
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
        "call": {"prompt": "a"},
    }
    assert "Scheduler" not in snippet(tmp_path, settings)
    lines = snippet(tmp_path, settings | {"scheduler": "CogVideoXDPMScheduler"}).splitlines()
    assert "from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline" in lines
    pipe = SimpleNamespace(scheduler=diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.0))
    [line] = [line for line in lines if line.startswith("pipe.scheduler")]
    exec(line, {"pipe": pipe, "CogVideoXDPMScheduler": diffusers.CogVideoXDPMScheduler})
    assert isinstance(pipe.scheduler, diffusers.CogVideoXDPMScheduler)
    assert pipe.scheduler.config.snr_shift_scale == 1.0


@pytest.fixture(scope="session")
def moving(make_clip, tmp_path_factory):
    """A clip of 30 frames at 16 fps, wider than high; it gets brighter."""
    return make_clip(tmp_path_factory.mktemp("v2v") / "in.mp4", frames=30, fps=16, width=192)


def asked_for(compose, clip, *overrides):
    config = compose("task=generate", "task.prompt=a", f"task.video={clip}", *overrides)
    return config, config.task, wanted_prompts(config.task)


@pytest.mark.slow
def test_a_clip_is_changed_as_plain_diffusers_changes_it(compose, nano_folder, moving):
    steps = ["validation.num_inference_steps=4", "task.video_strength=0.7"]
    config, task, wanted = asked_for(compose, moving, *steps)
    geometry = PretrainedModel(nano_folder, CPU, torch.float32).geometry()
    [start] = starts_of(config, task, wanted, geometry)
    assert start.beside[0] == "source clip" and start.clip.frames.shape == (9, 64, 64, 3)
    theirs = made_by_diffusers(
        nano_folder,
        "CogVideoXVideoToVideoPipeline",
        config,
        video=[*map(Image.fromarray, start.clip.frames)],
        strength=0.7,
    )
    ours = made_by(generator_of(config, nano_folder, clip=start.clip))
    assert numpy.array_equal(ours, theirs)
    plain = made_by(generator_of(config, nano_folder))
    brightness = [frames.mean(axis=(1, 2, 3)) for frames in (start.clip.frames, ours, plain)]
    assert abs(brightness[1] - brightness[0]).mean() < abs(brightness[2] - brightness[0]).mean()


@pytest.mark.slow
def test_only_the_last_steps_are_made(compose, nano_folder, moving, capfd):
    steps = ["validation.num_inference_steps=5", "task.video_strength=0.7"]
    config, task, wanted = asked_for(compose, moving, *SHORT, *steps)
    pretrained = PretrainedModel(nano_folder, CPU, torch.float32)
    [start] = starts_of(config, task, wanted, pretrained.geometry())
    said = capfd.readouterr().out
    assert "5 frames of 64x64 at 8" in said and "makes the last 3 of 5 steps" in said
    transformer, calls = pretrained.transformer(), []
    transformer.register_forward_pre_hook(lambda *given: calls.append(1))
    generator = generator_of(config, nano_folder, clip=start.clip)
    generator.generate(transformer, generator.vae(), PROMPT, SEED)
    assert len(calls) == 3


@pytest.mark.slow
def test_1_5_takes_a_clip_that_fills_its_tokens(compose, family_folder, make_clip, tmp_path, capfd):
    """diffusers' pipeline refuses an odd number of latent frames."""
    clip = make_clip(tmp_path / "a.mp4", frames=30)
    folder = family_folder("1_5_5b")
    size = ["data.max_num_frames=9", "data.height=64", "data.width=64"]
    config, task, wanted = asked_for(compose, clip, *size, "validation.num_inference_steps=2")
    pretrained = PretrainedModel(folder, CPU, torch.float32)
    [start] = starts_of(config, task, wanted, pretrained.geometry())
    assert len(start.clip.frames) == 5 and "5 frames of 64x64" in capfd.readouterr().out
    # The VAE decodes two latent frames to eight frames. The clip's own five are the last ones.
    assert made_by(generator_of(config, folder, clip=start.clip)).shape == (5, 64, 64, 3)


@pytest.mark.parametrize(
    ("clip", "asked", "family", "said"),
    [
        ("none.mp4", [], "2b", "none.mp4 does not exist"),
        ("text.mp4", [], "2b", "text.mp4 cannot be opened as a video"),
        (None, [], "5b_i2v", "is for a text-to-video model, and this is image-to-video"),
        (None, ["task.video_strength=0.1"], "2b", "none of the 3 sampling steps: .*=0.334 or more"),
        (None, ["data.fps=0.5"], "1_5_5b", "is too short: this model needs 5 frames"),
    ],
)
def test_clips_that_cannot_be_changed_are_named(
    compose, moving, tmp_path, clip, asked, family, said
):
    (tmp_path / "text.mp4").write_text("no video")
    path = moving if clip is None else tmp_path / clip
    config, task, wanted = asked_for(compose, path, *SHORT, *asked)
    with pytest.raises(UserError, match=said) as raised:
        starts_of(config, task, wanted, released(family_name(family)))
    assert str(path) in str(raised.value) or "strength" in str(raised.value)


def family_name(option: str) -> str:
    return next(name for name, other in NAMES.items() if other == option)
