"""What nano knows, and that the demo teaches it its concept without the rest being lost: judged on the pixels of videos made by plain
diffusers from what a run delivers."""

import json

import numpy
import pytest
import torch
from diffusers import CogVideoXPipeline

from cogvx.data import demo, world
from cogvx.inference import scores
from cogvx.model import nano


def judged(folder, prompts, steps=25, guidance_scale=6.0, adapter=None) -> list[dict]:
    """The measures of one video for each prompt, made by the pipeline in batches."""
    pipeline = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    found = []
    for start in range(0, len(prompts), 8):
        some = prompts[start : start + 8]
        made = pipeline(
            prompt=some, height=64, width=64, num_frames=9, num_inference_steps=steps, guidance_scale=guidance_scale,
            max_sequence_length=nano.TEXT_TOKENS, generator=torch.Generator().manual_seed(start), output_type="np",
        ).frames  # fmt: skip
        frames = (numpy.asarray(made) * 255).round().astype(numpy.uint8)
        found += [scores.measured(video, prompt) for video, prompt in zip(frames, some, strict=True)]
    return found


def share(found: list[dict], measure: str) -> float:
    return float(numpy.mean([values[measure] for values in found]))


@pytest.mark.slow
def test_nano_does_what_a_prompt_of_its_world_says(nano_folder):
    """A guess would be right for a third of the shapes."""
    found = judged(nano_folder, [scene.caption() for scene in world.scenes(64, seed=7)])
    figures = {measure: share(found, measure) for measure in ("shape", "colour", "direction", "background")}
    print(figures)
    assert min(figures[name] for name in ("colour", "direction", "background")) >= 0.9 and figures["shape"] >= 0.7, (
        figures
    )


@pytest.mark.slow
def test_the_demo_teaches_its_motion_and_the_rest_is_kept(run, nano_folder):
    """At the strength that plain diffusers reads from the file: alpha / rank is 2 here."""
    folder = run("a", "lora.rank=16", "lora.lora_alpha=32", "train.max_train_steps=600", "scheduler.lr_warmup_steps=20")
    prompts = demo.scored_prompts(24)
    for adapter, least, most in ((None, 0.0, 0.1), (folder, 0.8, 1.0)):
        assert least <= share(judged(nano_folder, prompts["taught"], adapter=adapter), "direction") <= most
    base, tuned = (judged(nano_folder, prompts["other"], adapter=adapter) for adapter in (None, folder))
    for measure in ("colour", "background", "direction"):
        assert share(tuned, measure) >= 0.8 * share(base, measure), measure
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
