"""The result of a run: weights that plain diffusers loads, and how to use them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy
from PIL import Image

from cogvx.config import Config
from cogvx.files import flush_to_disk, replacing, write_json
from cogvx.model.geometry import Geometry
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.trained_weights import FullWeights, LoraWeights
from cogvx.records.usage import INFERENCE_SETTINGS, snippet

IMAGE = "first_frame.png"
AVERAGED = "averaged"  # a checkpoint's folder of the averaged weights, if these are delivered


def deliver(
    folder: Path,
    transformer,
    weights: LoraWeights | FullWeights,
    config: Config,
    prompt: str,
    image: numpy.ndarray | None,
    pretrained: PretrainedModel,
) -> str:
    """Writes the weights and inference.json into the run's folder. Then they are on the disk.

    Returns the lines of Python that use them with this prompt. For image-to-video they start from
    `image`, [H, W, 3] uint8, which is written too.
    """
    weights.save_result(transformer, folder, pretrained.dtype)
    if image is not None:
        with replacing(folder / IMAGE) as partial:
            Image.fromarray(image).save(partial, format="PNG")
    geometry, commit = pretrained.geometry(), pretrained.hub_commit()
    settings = inference_settings(config, weights, geometry, commit, prompt)
    settings["image"] = None if image is None else str(folder / IMAGE)
    write_json(folder / INFERENCE_SETTINGS, settings)
    # summary.json will say that the run is done: nobody would train it again.
    names = (weights.result, f"{weights.result}/*", IMAGE, INFERENCE_SETTINGS)
    for path in (*itertools.chain(*map(folder.glob, names)), folder):
        flush_to_disk(path)
    return snippet(folder, settings)


def inference_settings(
    config: Config,
    weights: LoraWeights | FullWeights,
    geometry: Geometry,
    commit: str | None,
    prompt: str | None,
) -> dict:
    """The contents of inference.json. commit: of the base model on the hub, if it is known."""
    sampling, data = config.validation, config.data
    return {
        "pipeline": geometry.pipeline,
        "base_model": config.model.path,
        "revision": commit or config.model.revision,
        "torch_dtype": config.train.mixed_precision.value,
        **weights.inference_settings(),
        "id_token": next(iter(data.id_tokens()), None),
        "scheduler": None if sampling.scheduler is None else sampling.scheduler.value,
        "call": {
            **({} if prompt is None else {"prompt": prompt}),
            "negative_prompt": sampling.negative_prompt,
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
