"""The lines that use a run's result in plain diffusers.   [no torch]"""

from __future__ import annotations

from pathlib import Path

INFERENCE_SETTINGS = "inference.json"


def snippet(folder: Path, settings: dict) -> str:
    """`settings`: what folder/inference.json holds.

    An imported result comes without a prompt and, for image-to-video, without a picture.
    """
    pipeline, model = settings["pipeline"], "CogVideoXTransformer3DModel"
    dtype = f"torch_dtype=torch.{settings['torch_dtype']}"
    is_lora, has_image = "lora_scale" in settings, "ImageToVideo" in pipeline
    # inference.json of earlier versions has none: as the checkpoint ships.
    revision, scheduler = settings["revision"], settings.get("scheduler")
    base = repr(settings["base_model"]) + ("" if revision is None else f", revision={revision!r}")
    lines = ["import json, torch"]
    used = [*([] if scheduler is None else [scheduler]), pipeline, *([] if is_lora else [model])]
    lines.append(f"from diffusers import {', '.join(used)}")
    if has_image:
        lines.append("from diffusers.utils import load_image")
    lines.append(f"how = json.load(open({str(folder / INFERENCE_SETTINGS)!r}))")
    lines.append('device = "cuda" if torch.cuda.is_available() else "cpu"')
    if is_lora:
        lines.append(f"pipe = {pipeline}.from_pretrained({base}, {dtype}).to(device)")
        lines.append(f"pipe.load_lora_weights({str(folder)!r})")
    else:
        place = f"{str(folder)!r}, subfolder='transformer'"
        lines.append(f"tuned = {model}.from_pretrained({place}, {dtype})")
        lines.append(
            f"pipe = {pipeline}.from_pretrained({base}, transformer=tuned, {dtype}).to(device)"
        )
    if scheduler is not None:
        lines.append(f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config)")
    picture = "how['image']" if settings["image"] else "'first_frame.png'"
    image = f"image=load_image({picture}), " if has_image else ""
    prompt = "" if "prompt" in settings["call"] else "prompt='a cat on a beach', "
    lines.append(f"video = pipe({image}{prompt}**how['call']).frames[0]")
    return "\n".join(lines)
