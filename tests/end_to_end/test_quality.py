"""What nano knows, and that the demo teaches it its concept without the rest being lost: judged on the pixels of videos made by plain
diffusers from what a run delivers."""

import numpy
import pytest
import torch
from diffusers import CogVideoXPipeline

from cogvx.data import world
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
    found = judged(nano_folder, [scene.caption() for scene in world.scenes(64, seed=7)])
    figures = {measure: share(found, measure) for measure in ("shape", "colour", "direction", "background", "all")}
    assert figures["all"] >= 0.9, figures
