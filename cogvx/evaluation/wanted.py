"""The prompts of task=generate, with what their videos start from and stand beside.

F frames, H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy

from cogvx.config import Config
from cogvx.data.cuts import head
from cogvx.data.listed import text_of
from cogvx.data.sources import Example, ShortFiles
from cogvx.data.tables import READERS, comma_rows
from cogvx.data.video import BadClip, read_clip, to_bytes
from cogvx.errors import UserError
from cogvx.export.exporter import run_of
from cogvx.export.result import IMAGE
from cogvx.files import read_json, shown, write_json
from cogvx.inference.generate import SourceClip
from cogvx.model.geometry import Geometry
from cogvx.options.tasks import GenerateTask
from cogvx.records.usage import INFERENCE_SETTINGS
from cogvx.training.prepare import first_frame


@dataclass(frozen=True)
class Wanted:
    """A prompt, and what is given with it."""

    prompt: str
    image: Path | None = None  # image-to-video: the first frame
    video: Path | None = None  # video-to-video: the clip that is changed
    held_out: Path | None = None  # the held-out clip whose caption this is
    asked: str | None = None  # the user's prompt, if task.enhancer wrote it out


@dataclass(frozen=True)
class Start:
    """What the videos of a prompt start from, and the clip to show beside them."""

    image: numpy.ndarray | None = None  # [H, W, 3] uint8
    clip: SourceClip | None = None
    beside: tuple[str, numpy.ndarray] | None = None  # a title, and [F, H, W, 3] uint8


# -- prompts -------------------------------------------------------------------------------------


def wanted_prompts(task: GenerateTask) -> list[Wanted]:
    """From the command, the file, or the record of the run. UserError if there are none."""
    if task.prompts_file is not None:
        found = prompts_of_file(task.prompts_file)
    elif task.prompt is not None:
        found = [Wanted(text.strip()) for text in task.prompt.split(task.prompt_separator)]
    elif task.held_out_clips:
        found = held_out_captions(run_of(task.run), task.held_out_clips)
    else:
        found = [Wanted(prompt) for prompt in prompts_of_run(run_of(task.run))]
    found = [each for each in dict.fromkeys(found) if each.prompt]
    if not found:
        raise UserError(
            f"{task.prompts_file or 'task.prompt'} holds no prompt: give at least one, such as "
            f'task.prompt="a cat on a beach"'
        )
    return [
        replace(each, image=each.image or task.image, video=each.video or task.video)
        for each in found
    ]


def prompts_of_run(run: Path) -> list[str]:
    """The prompts of its validation videos, else the one of inference.json."""
    recorded = read_json(run / "validation" / "prompts.json")
    call = read_json(run / INFERENCE_SETTINGS).get("call", {})
    return list(recorded.values()) or [prompt for key, prompt in call.items() if key == "prompt"]


def held_out_captions(run: Path, most: int) -> list[Wanted]:
    """The captions of the clips that the run held out, with these clips."""
    report = run / "dataset_report.csv"
    rows = [row for _, row in comma_rows(report)] if report.is_file() else []
    held_out = [row for row in rows if row["use"] == "held out"]
    if not held_out:
        raise UserError(
            f"task.held_out_clips={most}: {run} held out no clip (its dataset_report.csv says "
            f"what it used each clip for). Give prompts: task.prompt=..."
        )
    return [
        # Reports of earlier versions have no column of images.
        Wanted(
            row["prompt"],
            image=Path(row["image"]) if row.get("image") else None,
            held_out=Path(row["video"]),
        )
        for row in held_out[:most]
    ]


def prompts_of_file(path: Path) -> list[Wanted]:
    """A table has fields prompt, image and video; another file has a prompt per line.

    UserError names the line that cannot be read.
    """
    if path.suffix.lower() not in READERS:
        return [Wanted(line.strip()) for line in text_of(path).splitlines()]
    return [wanted_row(path, number, row) for number, row in READERS[path.suffix.lower()](path)]


def wanted_row(path: Path, number: int, row: dict[str, object]) -> Wanted:
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise UserError(
            f'{path}:{number} has no text called prompt: {{"prompt": "a cat"}} in a .jsonl file, '
            f"a column prompt in a table"
        )
    given = {name: path.parent / row[name] for name in ("image", "video") if row.get(name)}
    return Wanted(prompt.strip(), **given)


def write_prompts(path: Path, wanted: list[Wanted]) -> None:
    """For an interrupted run, which goes on with the same prompts."""
    rows = [{name: value and str(value) for name, value in vars(w).items()} for w in wanted]
    write_json(path, rows)


def read_prompts(path: Path) -> list[Wanted]:
    """[] if there is no file."""
    places = ("image", "video", "held_out")
    return [
        Wanted(**row | {name: row[name] and Path(row[name]) for name in places})
        for row in read_json(path) or []
    ]


# -- what the videos start from ------------------------------------------------------------------


def starts_of(
    config: Config, task: GenerateTask, wanted: list[Wanted], geometry: Geometry
) -> list[Start]:
    """For each prompt. UserError if a file is missing, or is of the other kind of model."""
    found = []
    for each in wanted:
        require_kind(each, geometry)
        image = first_image(config, task, each) if geometry.image_to_video else None
        clip = None if each.video is None else source_clip(config, task, each.video, geometry)
        beside = None if clip is None else ("source clip", clip.frames)
        if each.held_out is not None and each.held_out.is_file():
            beside = ("held-out clip", frames_at(each.held_out, config))
        found.append(Start(image, clip, beside))
    return found


def require_kind(each: Wanted, geometry: Geometry) -> None:
    if each.image is not None and not geometry.image_to_video:
        raise UserError(f"the image {each.image} is for image-to-video, and this is text-to-video")
    if each.video is not None and geometry.image_to_video:
        raise UserError(
            f"the clip {each.video} is for a text-to-video model, and this is image-to-video: "
            f"diffusers changes clips with text-to-video models only (model=2b, 5b or 1_5_5b)"
        )


def first_image(config: Config, task: GenerateTask, each: Wanted) -> numpy.ndarray:
    """[H, W, 3] uint8."""
    own = None if task.run is None else run_of(task.run) / IMAGE
    path = each.image or each.held_out or own
    if path is None or not path.is_file():
        missing = "" if path is None else f": {path} does not exist"
        raise UserError(
            f"image-to-video needs the first frame of {each.prompt!r}{missing}. "
            f"Give one: task.image=first.png"
        )
    image = None if path == each.held_out else path
    example = Example(each.prompt, path, "task.image", image=image)
    return first_frame(example, head(config.data), config.data)


def source_clip(config: Config, task: GenerateTask, path: Path, geometry: Geometry) -> SourceClip:
    """The clip at the run's size and frame rate, with as many frames as the model takes."""
    sampled, steps = config.validation.num_inference_steps, steps_left(config, task)
    if steps == 0:
        raise UserError(
            f"task.video_strength={task.video_strength} leaves none of the {sampled} sampling "
            f"steps: task.video_strength={math.ceil(1000 / sampled) / 1000} or more"
        )
    frames = frames_at(path, config, own_length=True)
    # diffusers' pipeline does not fill the latent frames of 1.5 up to whole tokens.
    latent_frames = (len(frames) - 1) // geometry.temporal_stride + 1
    latent_frames -= latent_frames % (geometry.patch_size_t or 1)
    used = (latent_frames - 1) * geometry.temporal_stride + 1
    if used < 1:
        raise UserError(
            f"{path} is too short: this model needs {geometry.temporal_stride + 1} frames"
        )
    print(
        f"clip    {shown(path)}: {used} frames of {config.data.width}x{config.data.height} at "
        f"{config.data.fps or 'its own'} fps; task.video_strength={task.video_strength:g} makes "
        f"the last {steps} of {sampled} steps",
        flush=True,
    )
    return SourceClip(frames[:used], task.video_strength)


def steps_left(config: Config, task: GenerateTask) -> int:
    """Of validation.num_inference_steps, as CogVideoXVideoToVideoPipeline rounds them."""
    return int(config.validation.num_inference_steps * task.video_strength)


def frames_at(path: Path, config: Config, *, own_length: bool = False) -> numpy.ndarray:
    """A clip at the run's size and frame rate, [F, H, W, 3] uint8.

    own_length: nothing is skipped or added, and it may be shorter than a training clip.
    """
    data = config.data
    if own_length:
        data = replace(data, skip_frames_start=0, skip_frames_end=0, min_num_frames=1)
        data = replace(data, short_files=ShortFiles.drop)
    if not path.is_file():
        raise UserError(f"the clip {path} does not exist")
    try:
        return to_bytes(read_clip(path, data).frames)
    except BadClip as bad:
        raise UserError(f"the clip {path} {bad}") from bad
