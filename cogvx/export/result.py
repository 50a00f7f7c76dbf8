"""The result: weights that plain diffusers loads, a LoRA at the trained strength, and how to use them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
from PIL import Image

from cogvx.config import Config
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.trained_weights import FullWeights, LoraWeights
from cogvx.records.usage import INFERENCE_SETTINGS, snippet

IMAGE = "first_frame.png"


def deliver(
    folder: Path,
    transformer,
    weights: LoraWeights | FullWeights,
    config: Config,
    prompt: str,
    image: numpy.ndarray | None,
    pretrained: PretrainedModel,
) -> str:
    """Writes the weights and INFERENCE_SETTINGS into the run's folder; returns the lines that use them, with this prompt and, for
    image-to-video, this image [H, W, 3] uint8, which is written too."""
    weights.save_result(transformer, folder, pretrained.dtype)
    sampling, data, geometry = config.validation, config.data, pretrained.geometry()
    settings = {
        "pipeline": geometry.pipeline,
        "base_model": config.model.path,
        "revision": pretrained.hub_commit() or config.model.revision,
        "torch_dtype": config.train.mixed_precision.value,
        **weights.inference_settings(),
        "id_token": data.id_token,
        "image": None if image is None else str(folder / IMAGE),
        "call": {
            "prompt": prompt,
            "height": data.height,
            "width": data.width,
            "num_frames": data.max_num_frames,
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "use_dynamic_cfg": sampling.use_dynamic_cfg,
            "max_sequence_length": geometry.text_tokens,
        },
        "fps": data.fps,
    }
    if image is not None:
        Image.fromarray(image).save(folder / IMAGE)
    (folder / INFERENCE_SETTINGS).write_text(
        json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8"
    )
    return snippet(folder, settings)
