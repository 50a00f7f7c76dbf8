"""task=generate: videos for any prompts, as mp4 files and on a page.

F frames, H height, W width.
"""

from __future__ import annotations

import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy

from cogvx.config import Config
from cogvx.data.cache import Cache
from cogvx.data.encode import encode_prompts
from cogvx.data.listed import text_of
from cogvx.data.sources import Example
from cogvx.errors import UserError
from cogvx.evaluation.adapters import read_added, require_low_rank, with_added
from cogvx.evaluation.evaluate import (
    BASE,
    Variant,
    at_strengths,
    draw_sheet,
    folder_of_videos,
    models,
    weights_of_run,
)
from cogvx.export.exporter import run_of
from cogvx.export.result import IMAGE
from cogvx.files import read_json, shown, write_json
from cogvx.inference.scores import VideoRequest
from cogvx.model import attention
from cogvx.model.pretrained import PretrainedModel
from cogvx.options.tasks import GenerateTask
from cogvx.progress import bar, counted
from cogvx.records.pages import VIDEO_INDEX
from cogvx.records.usage import INFERENCE_SETTINGS
from cogvx.training.kernel import chosen_attention
from cogvx.training.peaks import give_memory_back
from cogvx.training.prepare import (
    Prepared,
    encoders,
    fetch_model,
    first_frame,
    start_processes,
)
from cogvx.training.ranks import Ranks
from cogvx.training.videos import VideoGenerator

SHEET = "videos.png"


@dataclass(frozen=True)
class Wanted:
    """A prompt and, for image-to-video, the picture that its videos start from."""

    prompt: str
    image: Path | None = None


def generate_videos(config: Config, task: GenerateTask, folder: Path) -> dict:
    """Writes videos/VARIANT/*.mp4, videos.json and videos.png, and returns the run's summary."""
    started, ranks = time.monotonic(), start_processes(config)
    attention.require(config.train.attention, ranks.accelerator.device)
    wanted = wanted_prompts(task)
    asked = [VideoRequest("video", each.prompt, seed) for each in wanted for seed in task.seeds]
    pretrained, config, variants = base_and_variants(config, task, folder, ranks)
    data = prepare_prompts_alone(config, task, wanted, pretrained, ranks)
    total = len(asked) * len(variants)
    print(f"videos  {counted(total, 'video')}: {', '.join(v.name for v in variants)}", flush=True)
    earlier = [] if task.run is None else [run_of(task.run)]
    with chosen_attention(config, data.pretrained, folder, ranks, earlier):
        pictured = make_videos_not_there(config, data, variants, asked, folder, ranks)
    draw_sheet(folder / SHEET, asked, pictured)
    write_index(folder, variants, asked)
    print(f"result  {shown(folder)}: report.html shows the videos in step,")
    print(f"        {SHEET} their first, middle and last frames; the mp4 files are in videos/")
    return {"status": "done", "videos": total, "seconds": round(time.monotonic() - started, 1)}


# -- what is asked for ---------------------------------------------------------------------------


def base_and_variants(
    config: Config, task: GenerateTask, folder: Path, ranks: Ranks
) -> tuple[PretrainedModel, Config, list[Variant]]:
    """The base model on this machine, and what videos are made with: it first, if asked for.

    The configuration has the settings of the LoRA that the variants hold.
    """
    # A LoRA that cannot be read is reported before the base model is downloaded.
    places = {} if task.run is None else weights_of_run(config, task)
    if task.add:
        require_low_rank(config, task)
    adapters = read_added(task, folder)
    pretrained = fetch_model(config, ranks)
    if task.add:
        config, places = with_added(config, places, adapters, pretrained, folder)
    base = [Variant(BASE, None)] if task.base or not places else []
    return pretrained, config, [*base, *at_strengths(places, task.strengths)]


def wanted_prompts(task: GenerateTask) -> list[Wanted]:
    """From the command, the file, or the record of the run. UserError if there are none."""
    if task.prompts_file is not None:
        found = prompts_of_file(task.prompts_file)
    elif task.prompt is not None:
        found = [Wanted(text.strip()) for text in task.prompt.split(task.prompt_separator)]
    else:
        found = [Wanted(prompt) for prompt in prompts_of_run(run_of(task.run))]
    found = [each for each in dict.fromkeys(found) if each.prompt]
    if not found:
        raise UserError(
            f"{task.prompts_file or 'task.prompt'} holds no prompt: give at least one, such as "
            f'task.prompt="a cat on a beach"'
        )
    prompts = [each.prompt for each in found]
    twice = next((prompt for prompt in prompts if prompts.count(prompt) > 1), None)
    if twice is not None:
        raise UserError(
            f"{task.prompts_file}: the prompt {twice!r} is there with several images; give each "
            f"image a prompt of its own"
        )
    return found


def prompts_of_run(run: Path) -> list[str]:
    """The prompts of its validation videos, else the one of inference.json."""
    recorded = read_json(run / "validation" / "prompts.json")
    call = read_json(run / INFERENCE_SETTINGS).get("call", {})
    return list(recorded.values()) or [prompt for key, prompt in call.items() if key == "prompt"]


def prompts_of_file(path: Path) -> list[Wanted]:
    """.jsonl and .csv have fields prompt and image; any other file has one prompt per line.

    UserError names the line that cannot be read.
    """
    text = text_of(path)
    if path.suffix not in (".jsonl", ".csv"):
        return [Wanted(line.strip()) for line in text.splitlines()]
    rows = json_rows(path, text) if path.suffix == ".jsonl" else csv_rows(text)
    return [wanted_row(path, number, row) for number, row in rows]


def json_rows(path: Path, text: str) -> list[tuple[int, object]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON: {error}") from error
    return rows


def csv_rows(text: str) -> list[tuple[int, object]]:
    reader = csv.DictReader(text.splitlines())
    return [(reader.line_num, row) for row in reader]


def wanted_row(path: Path, number: int, row: object) -> Wanted:
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise UserError(
            f'{path}:{number} has no text called prompt: {{"prompt": "a cat"}} in a .jsonl file, '
            f"a column prompt in a .csv file"
        )
    image = row.get("image") or None
    return Wanted(prompt.strip(), None if image is None else path.parent / image)


# -- preparing -----------------------------------------------------------------------------------


def prepare_prompts_alone(
    config: Config,
    task: GenerateTask,
    wanted: list[Wanted],
    pretrained: PretrainedModel,
    ranks: Ranks,
) -> Prepared:
    """The prompts' embeddings and first frames. The clips are not needed."""
    images = first_frames_of(config, task, wanted, pretrained)
    cache = Cache(config.data.cache_dir)
    _, text_encoder = encoders(pretrained, cache, config.memory)
    prompts = [each.prompt for each in wanted]
    warn_of_id_token(config, prompts, ranks)
    text_tokens = pretrained.geometry().text_tokens
    embeds = encode_prompts(
        ["", config.validation.negative_prompt, *prompts],
        cache,
        text_encoder,
        text_tokens,
        ranks.say,
    )
    # The text encoder's memory is for the transformer now.
    give_memory_back(collect=True)
    return Prepared(pretrained, [], [], embeds, prompts, prompts[0], images)


def first_frames_of(
    config: Config, task: GenerateTask, wanted: list[Wanted], pretrained: PretrainedModel
) -> dict[str, numpy.ndarray]:
    """By prompt, [H, W, 3] uint8; {} for text-to-video. UserError if an image is missing."""
    if not pretrained.geometry().image_to_video:
        given = task.image or next((each.image for each in wanted if each.image), None)
        if given is not None:
            raise UserError(f"the image {given} is for image-to-video, and this is text-to-video")
        return {}
    own = None if task.run is None else run_of(task.run) / IMAGE
    found = {}
    for each in wanted:
        path = each.image or task.image or own
        if path is None or not path.is_file():
            missing = "" if path is None else f": {path} does not exist"
            raise UserError(
                f"image-to-video needs the first frame of {each.prompt!r}{missing}. "
                f"Give one: task.image=first.png"
            )
        example = Example(each.prompt, path, "task.image", image=path)
        found[each.prompt] = first_frame(example, config.data)
    return found


def warn_of_id_token(config: Config, prompts: list[str], ranks: Ranks) -> None:
    token = config.data.id_token
    if token and not any(token in prompt for prompt in prompts):
        ranks.say(
            f"warning the run was trained with data.id_token={token!r}, and no prompt has this "
            f"word: the videos may not show what was learned"
        )


# -- making --------------------------------------------------------------------------------------


def video_path(folder: Path, variant: Variant, number: int, request: VideoRequest) -> Path:
    return folder_of_videos(folder, variant.name) / f"{number:03d}_seed{request.seed}.mp4"


def make_videos_not_there(
    config: Config,
    data: Prepared,
    variants: list[Variant],
    asked: list[VideoRequest],
    folder: Path,
    ranks: Ranks,
) -> dict[str, list[numpy.ndarray]]:
    """Makes the videos that are not there yet, so an interrupted run goes on.

    Returns, by the variant's name, the first, middle and last frame of each video.
    """
    generator = VideoGenerator(config, data.pretrained, data.embeds, data.images)
    progress = bar(total=len(asked) * len(variants), desc="videos", unit="video", leave=False)
    vae, pictured = None, {}
    with progress:
        for variant, model in models(config, data, variants, ranks):
            vae = vae or generator.vae()
            pictured[variant.name] = []
            for number, request in enumerate(asked, start=1):
                path = video_path(folder, variant, number, request)
                if not path.is_file():
                    title = f"{variant.name} {path.stem}"
                    frames = generator.generate(
                        model.transformer, vae, request.prompt, request.seed, title
                    )
                    generator.save(path, frames)
                pictured[variant.name].append(three_frames(path))
                progress.update()
    return pictured


def three_frames(path: Path) -> numpy.ndarray:
    """The first, middle and last frame of an mp4 file, [3, H, W, 3] uint8."""
    import imageio.v3

    frames = imageio.v3.imread(path, plugin="FFMPEG")
    return frames[[0, len(frames) // 2, -1]]


def write_index(folder: Path, variants: list[Variant], asked: list[VideoRequest]) -> None:
    """What the page shows: for each prompt and seed the label and file of each variant."""
    rows = []
    for number, request in enumerate(asked, start=1):
        files = [
            [variant.name, str(video_path(folder, variant, number, request).relative_to(folder))]
            for variant in variants
        ]
        rows.append({"prompt": request.prompt, "seed": request.seed, "videos": files})
    write_json(folder / VIDEO_INDEX, rows)
