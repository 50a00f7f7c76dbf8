"""Nano knows its world, and the demo teaches it a new colour without the rest being lost.

Judged on the pixels of videos that plain diffusers makes from what a run delivers. COGVX_DEMO_RUN
names a finished run of the demo; without it, one is trained here.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image

from cogvx.data import demo, world
from cogvx.inference import scores
from cogvx.model import nano


def videos(folder, prompts, settings, adapter=None, images=None) -> list[numpy.ndarray]:
    """One for each prompt, [F, H, W, 3] uint8, by the pipeline as conf/model/nano.yaml says."""
    kind = CogVideoXPipeline if images is None else CogVideoXImageToVideoPipeline
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    found = []
    for start in range(0, len(prompts), 8):
        some = slice(start, start + 8)
        made = pipeline(
            prompt=prompts[some],
            height=64,
            width=64,
            num_frames=9,
            max_sequence_length=nano.TEXT_TOKENS,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=torch.Generator().manual_seed(start),
            output_type="np",
            **({} if images is None else {"image": images[some]}),
        ).frames
        found += list((numpy.asarray(made) * 255).round().astype(numpy.uint8))
    return found


def judged(folder, prompts, settings, adapter=None) -> list[dict]:
    made = videos(folder, prompts, settings, adapter)
    return [
        scores.measure_video(frames, prompt) for frames, prompt in zip(made, prompts, strict=True)
    ]


def share(found: list[dict], measure: str) -> float:
    return float(numpy.mean([values[measure] for values in found]))


@pytest.mark.slow
def test_nano_does_what_a_prompt_of_its_world_says(compose, nano_folder):
    """A guess would be right for a third of the shapes."""
    found = judged(
        nano_folder, [scene.caption() for scene in world.scenes(32, seed=7)], compose().model
    )
    figures = {
        measure: share(found, measure) for measure in ("shape", "colour", "direction", "background")
    }
    print(figures)
    assert min(figures.values()) >= 0.9, figures


@pytest.mark.slow
def test_nano_i2v_goes_on_from_the_picture(compose, cache):
    """Size, place and turn of a shape are in the picture alone."""
    scenes = [dataclasses.replace(scene, width=64, height=64) for scene in world.scenes(16, seed=9)]
    folder = nano.write_nano(cache / "models" / "nano_i2v", nano.NANO_I2V)
    clips, prompts = (
        [world.draw_clip(scene) for scene in scenes],
        [scene.caption() for scene in scenes],
    )
    images = [Image.fromarray(clip[0]) for clip in clips]
    made = videos(folder, prompts, compose("model=nano_i2v").model, images=images)
    errors = [
        numpy.square(video[0] / 255 - clip[0] / 255).mean()
        for video, clip in zip(made, clips, strict=True)
    ]
    figures = {"psnr": float(-10 * numpy.log10(numpy.mean(errors)))} | {
        measure: share(
            [scores.measure_video(*pair) for pair in zip(made, prompts, strict=True)], measure
        )
        for measure in ("shape", "colour", "direction", "background")
    }
    print(figures)
    assert figures.pop("psnr") >= 20 and min(figures.values()) >= 0.9, figures


@pytest.fixture
def demo_run(run) -> Path:
    """A finished run of the demo. One that is trained here has twice the usual alpha / rank."""
    given = os.environ.get("COGVX_DEMO_RUN")
    return Path(given) if given else run("a", "lora.rank=16", "lora.lora_alpha=32")


@pytest.mark.slow
def test_the_demo_teaches_its_colour_and_the_rest_is_kept(demo_run, compose, nano_folder):
    """At the strength that plain diffusers reads from the file.

    Three of 24 videos that show what is taught may fail, for another machine's rounding.
    """
    prompts, settings = demo.scored_prompts(24), compose().model
    for kind in ("taught", "other"):
        base = judged(nano_folder, prompts[kind], settings)
        tuned = judged(nano_folder, prompts[kind], settings, demo_run)
        if kind == "taught":
            assert share(base, scores.NEW_MEASURE) <= 0.1
            assert share(tuned, scores.NEW_MEASURE) >= 0.8
        else:
            for measure in ("shape", "colour", "background", "direction"):
                assert share(tuned, measure) >= 0.8 * share(base, measure), measure
    assert json.loads((demo_run / "summary.json").read_text())["status"] == "done"
