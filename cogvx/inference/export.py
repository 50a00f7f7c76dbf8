"""The result: a LoRA that plain diffusers loads at the trained strength, and how to use it."""

from __future__ import annotations

import json
from pathlib import Path

from cogvx.config import Config
from cogvx.model import lora
from cogvx.model.checkpoint import Checkpoint

SETTINGS = "inference.json"


def deliver(folder: Path, transformer, config: Config, prompt: str, checkpoint: Checkpoint) -> str:
    """Writes lora.WEIGHTS and SETTINGS into the run's folder; returns the lines that use them."""
    lora.save(transformer, folder)
    sampling, data = config.validation, config.data
    settings = {
        "pipeline": "CogVideoXPipeline",
        "base_model": config.model.path,
        "revision": checkpoint.hub_commit() or config.model.revision,
        "torch_dtype": config.train.mixed_precision.value,
        "rank": config.lora.rank,
        "lora_alpha": config.lora.lora_alpha,
        "lora_scale": config.lora.lora_alpha / config.lora.rank,
        "lora_scale_note": "applied by load_lora_weights itself, from the file's metadata; set no adapter weight for it",
        "id_token": config.data.id_token,
        "call": {
            "prompt": prompt,
            "height": data.height,
            "width": data.width,
            "num_frames": data.max_num_frames,
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "use_dynamic_cfg": sampling.use_dynamic_cfg,
            "max_sequence_length": checkpoint.geometry().text_tokens,
        },
        "fps": data.fps,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    return snippet(folder, settings)


def snippet(folder: Path, settings: dict) -> str:
    revision = "" if settings["revision"] is None else f", revision={settings['revision']!r}"
    return (
        f"import json, torch; from diffusers import CogVideoXPipeline; how = json.load(open({str(folder / SETTINGS)!r}))\n"
        f"pipe = CogVideoXPipeline.from_pretrained({settings['base_model']!r}{revision}, torch_dtype=torch.{settings['torch_dtype']})"
        f'.to("cuda" if torch.cuda.is_available() else "cpu")\n'
        f"pipe.load_lora_weights({str(folder)!r}); video = pipe(**how['call']).frames[0]"
    )
