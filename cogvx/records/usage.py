"""The lines that use a run's result in plain diffusers, from what it wrote about itself.   [no torch]"""

from __future__ import annotations

from pathlib import Path

SETTINGS = "inference.json"


def snippet(folder: Path, settings: dict) -> str:
    """`settings`: the contents of folder/SETTINGS."""
    pipeline, model, dtype = (
        settings["pipeline"],
        "CogVideoXTransformer3DModel",
        f"torch_dtype=torch.{settings['torch_dtype']}",
    )
    tuned = "lora_scale" not in settings  # every weight was trained
    base = repr(settings["base_model"])
    base += "" if settings["revision"] is None else f", revision={settings['revision']!r}"
    names = ", ".join([pipeline, *([model] if tuned else [])])
    load = "from diffusers.utils import load_image; " if settings["image"] else ""
    start = "image=load_image(how['image']), " if settings["image"] else ""
    lines = [
        f"import json, torch; from diffusers import {names}; {load}how = json.load(open({str(folder / SETTINGS)!r}))",
        f'pipe = {pipeline}.from_pretrained({base}, {dtype}).to("cuda" if torch.cuda.is_available() else "cpu")',
        f"pipe.load_lora_weights({str(folder)!r}); video = pipe({start}**how['call']).frames[0]",
    ]
    if tuned:
        lines[1] = lines[1].replace(", torch_dtype", ", transformer=tuned, torch_dtype")
        lines[1:1] = [
            f"tuned = {model}.from_pretrained({str(folder)!r}, subfolder='transformer', {dtype})"
        ]
        lines[-1] = f"video = pipe({start}**how['call']).frames[0]"
    return "\n".join(lines)
