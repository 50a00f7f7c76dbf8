"""task=generate: videos for any prompts, as mp4 files and on a page.

F frames, H height, W width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy

from cogvx.config import Config
from cogvx.data.cache import Cache
from cogvx.data.prompts import encode_prompts
from cogvx.evaluation.adapters import read_added, require_low_rank, with_added
from cogvx.evaluation.enhancing import enhanced
from cogvx.evaluation.evaluate import (
    BASE,
    Variant,
    at_strengths,
    draw_sheet,
    folder_of_videos,
    models,
    weights_of_run,
)
from cogvx.evaluation.wanted import (
    Start,
    Wanted,
    read_prompts,
    starts_of,
    wanted_prompts,
    write_prompts,
)
from cogvx.export.exporter import run_of
from cogvx.files import shown, write_json
from cogvx.inference.scores import VideoRequest
from cogvx.model import attention
from cogvx.model.pretrained import PretrainedModel
from cogvx.options.tasks import GenerateTask
from cogvx.progress import bar, counted
from cogvx.records import record
from cogvx.records.pages import VIDEO_INDEX, duration
from cogvx.training.kernel import chosen_attention
from cogvx.training.out_of_memory import noting_lack
from cogvx.training.peaks import give_memory_back
from cogvx.training.prepare import Prepared, encoders, fetch_model
from cogvx.training.ranks import Ranks, start_processes
from cogvx.training.videos import VideoGenerator

SHEET, PROMPTS = "videos.png", "prompts.json"
SHEET_ROWS = 24  # rows of prompts and seeds


@dataclass(frozen=True)
class GalleryRow:
    """A prompt and a seed: one video of each variant."""

    number: int
    wanted: Wanted
    start: Start
    seed: int

    def path(self, folder: Path, variant: str) -> Path:
        return folder_of_videos(folder, variant) / f"{self.number:03d}_seed{self.seed}.mp4"

    def request(self) -> VideoRequest:
        """Its line on the sheet."""
        said = self.wanted.asked or self.wanted.prompt
        return VideoRequest("video", f"seed {self.seed}: {said}", self.seed)


def generate_videos(config: Config, task: GenerateTask, folder: Path) -> dict:
    """Writes videos/VARIANT/*.mp4, videos.json and videos.png, and returns the run's summary."""
    started, ranks = time.monotonic(), start_processes(config)
    attention.require(config.train.attention, ranks.accelerator.device)
    # A run that goes on makes the same videos, even if a file of prompts has changed since.
    earlier = read_prompts(folder / PROMPTS)
    wanted = earlier or wanted_prompts(task)
    pretrained, config, variants = base_and_variants(config, task, folder, ranks)
    if ranks.logs:
        record.pin_revision(folder, pretrained.hub_commit())
    starts = starts_of(config, task, wanted, pretrained.geometry())
    if not earlier:
        token = next(iter(config.data.id_tokens()), None)
        wanted = enhanced(task, wanted, token, ranks.accelerator.device)
        write_prompts(folder / PROMPTS, wanted)
    data = prepare_prompts_alone(config, wanted, pretrained, ranks)
    pairs = [(*each, seed) for each in zip(wanted, starts, strict=True) for seed in task.seeds]
    asked = [GalleryRow(number, *each) for number, each in enumerate(pairs, start=1)]
    total = len(asked) * len(variants)
    print(f"videos  {counted(total, 'video')}: {', '.join(v.name for v in variants)}", flush=True)
    write_index(folder, variants, asked)
    runs = [] if task.run is None else [run_of(task.run)]
    with chosen_attention(config, pretrained, folder, ranks, runs):
        pictured = make_videos_not_there(config, data, variants, asked, folder, ranks)
    draw_sheet(folder / SHEET, [each.request() for each in asked], pictured, SHEET_ROWS)
    seconds = time.monotonic() - started
    print(f"result  {shown(folder)}: {counted(total, 'video')} in {duration(seconds)}.")
    print(f"        report.html shows them in step, {SHEET} their first, middle and last frames;")
    print("        the mp4 files are in videos/")
    return {"status": "done", "videos": total, "seconds": round(seconds, 1)}


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
    wants_base = task.base or 0 in task.strengths or not places
    base = [Variant(BASE, None)] if wants_base else []
    strengths = [strength for strength in task.strengths if strength != 0]
    return pretrained, config, [*base, *at_strengths(places, strengths)]


def prepare_prompts_alone(
    config: Config, wanted: list[Wanted], pretrained: PretrainedModel, ranks: Ranks
) -> Prepared:
    """The prompts' embeddings. The clips are not needed."""
    cache = Cache(config.data.cache_dir)
    _, text_encoder = encoders(pretrained, cache, config.memory)
    prompts = [each.prompt for each in wanted]
    warn_of_id_token(config, prompts, ranks)
    needed = [config.validation.negative_prompt, *prompts]
    text_tokens = pretrained.geometry().text_tokens
    with noting_lack("encode prompts"):
        embeds = encode_prompts(needed, cache, text_encoder, text_tokens, ranks.say)
    # The text encoder's memory is for the transformer now.
    give_memory_back(collect=True)
    return Prepared(pretrained, [], [], embeds, prompts, prompts[0], images={})


def warn_of_id_token(config: Config, prompts: list[str], ranks: Ranks) -> None:
    words = config.data.id_tokens()
    if words and not any(word in prompt for prompt in prompts for word in words):
        ranks.say(
            f"warning the run was trained with data.id_token={' and '.join(map(repr, words))}, and "
            f"no prompt has this word: the videos may not show what was learned"
        )


# -- making --------------------------------------------------------------------------------------


def make_videos_not_there(
    config: Config,
    data: Prepared,
    variants: list[Variant],
    asked: list[GalleryRow],
    folder: Path,
    ranks: Ranks,
) -> dict[str, list[numpy.ndarray]]:
    """Makes the videos that are not there yet, so an interrupted run goes on.

    Returns, by what a column is called, the first, middle and last frame of each video.
    """
    paths = {v.name: [each.path(folder, v.name) for each in asked] for v in variants}
    missing = sum(not path.is_file() for those in paths.values() for path in those)
    generator = VideoGenerator(config, data.pretrained, data.embeds, data.images)
    pictured = pictured_beside(generator, asked, folder)
    vae, progress = None, bar(total=missing, desc="videos", unit="video", leave=False)
    with progress:
        for variant, model in models(config, data, variants, ranks):
            vae = vae or generator.vae()
            for each, path in zip(asked, paths[variant.name], strict=True):
                if not path.is_file():
                    title = f"{variant.name} {path.stem}"
                    with noting_lack("video", title):
                        made = make_video(generator, model.transformer, vae, each, title)
                    generator.save(path, made)
                    progress.update()
            pictured[variant.name] = [three_frames(path) for path in paths[variant.name]]
    return pictured


def make_video(
    generator: VideoGenerator, transformer, vae, asked: GalleryRow, title: str
) -> numpy.ndarray:
    """[F, H, W, 3] uint8."""
    prompt, start = asked.wanted.prompt, asked.start
    images = {} if start.image is None else {prompt: start.image}
    own = replace(generator, images=images, clip=start.clip)
    return own.generate(transformer, vae, prompt, asked.seed, title)


def pictured_beside(
    generator: VideoGenerator, asked: list[GalleryRow], folder: Path
) -> dict[str, list[numpy.ndarray]]:
    """Writes the clips to show beside the videos, and returns three frames of each.

    {} if there are none. A prompt without a clip has white frames.
    """
    titled = [each.start.beside for each in asked]
    if not any(titled):
        return {}
    data, found = generator.config.data, []
    white = numpy.full((3, data.height, data.width, 3), 255, numpy.uint8)
    for each, beside in zip(asked, titled, strict=True):
        if beside is None:
            found.append(white)
            continue
        title, frames = beside
        generator.save(each.path(folder, title), frames)
        found.append(frames[[0, len(frames) // 2, -1]])
    return {next(beside[0] for beside in titled if beside): found}


def three_frames(path: Path) -> numpy.ndarray:
    """The first, middle and last frame of an mp4 file, [3, H, W, 3] uint8."""
    import imageio.v3

    frames = imageio.v3.imread(path, plugin="FFMPEG")
    return frames[[0, len(frames) // 2, -1]]


def write_index(folder: Path, variants: list[Variant], asked: list[GalleryRow]) -> None:
    """What the page shows: for each prompt and seed the label and file of each video.

    With several checkpoints at several strengths, each checkpoint is a row of the page.
    """
    first = {v.place: v.name for v in reversed(variants) if v.place is not None}
    is_grid = 1 < len(first) < sum(v.place is not None for v in variants)
    starts, rows = list(first.values()) if is_grid else [], []
    for each in asked:
        beside = [] if each.start.beside is None else [each.start.beside[0]]
        files = [
            [name, str(each.path(folder, name).relative_to(folder))]
            for name in [*beside, *(variant.name for variant in variants)]
        ]
        wanted = each.wanted
        about = {"prompt": wanted.prompt, "seed": each.seed, "videos": files, "row_starts": starts}
        about |= {} if wanted.asked is None else {"asked": wanted.asked}
        rows.append(about)
    write_json(folder / VIDEO_INDEX, rows)
