"""task=evaluate: compares the tuned model with the base model on the same prompts and seeds.

It can compare several strengths and checkpoints. What it measures: whether a video shows what its
prompt says (from the pixels, for prompts of the little world), motion, saturation, the distance to
the nearest training clip, and the held-out loss. On request: how well a CLIP model finds that text
and frames agree, and VBench.   F frames, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch

from cogvx.data.encode import frames_of
from cogvx.data.listed import text_of
from cogvx.data.video import to_bytes
from cogvx.errors import UserError, first_line
from cogvx.files import read_json, replacing, shown
from cogvx.inference import scores
from cogvx.inference.chat import NO_CODE
from cogvx.model import attention
from cogvx.model.cogvideox import CogVideoX
from cogvx.model.trained_weights import weights_of
from cogvx.progress import bar, counted
from cogvx.training import checkpoint as checkpoints
from cogvx.training.heldout import heldout_loss
from cogvx.training.kernel import chosen_attention
from cogvx.training.out_of_memory import noting_lack
from cogvx.training.prepare import Prepared, own_first_frame, prepare
from cogvx.training.ranks import Ranks, start_processes
from cogvx.training.setup import frozen_variants
from cogvx.training.videos import VideoGenerator

if TYPE_CHECKING:
    from cogvx.config import Config
    from cogvx.options.tasks import EvaluateTask

BASE = "base"
# Videos and training clips are compared as small copies with sides of this many pixels ...
NEAR = 32
# ... and with this many training clips at most.
MOST_CLIPS = 500
MOST_PICTURED = 8  # videos of each kind in evaluation.png


@dataclass(frozen=True)
class Variant:
    """A model to compare."""

    name: str
    place: Path | None  # the folder with its weights; None: the base model
    strength: float = 1.0  # of the LoRA


@dataclass
class Measured:
    """What was measured, by the variant's name."""

    video_scores: dict[str, list[scores.VideoScores]] = field(default_factory=dict)
    heldout_loss: dict[str, float | None] = field(default_factory=dict)
    videos: dict[str, list[numpy.ndarray]] = field(default_factory=dict)  # each [F, H, W, 3] uint8


def evaluate(config: Config, task: EvaluateTask, folder: Path) -> dict:
    """Prints a table for each variant, and returns the run's summary.

    Writes evaluation.json, evaluation.csv, evaluation.png and videos/ into the folder.
    """
    started, ranks = time.monotonic(), start_processes(config)
    attention.require(config.train.attention, ranks.accelerator.device)
    variants = variants_of(config, task)
    data, prompts = prepare_prompts(config, task, folder, ranks)
    asked = scores.video_requests(prompts, task.seed)
    measures = [nearest_clip(data, config)]
    if task.clip_path is not None:
        measures.append(clip_similarity(task.clip_path, data.pretrained.device))
    measured = measure_variants(config, data, variants, asked, measures, folder, ranks)
    found = {
        variant.name: scores.comparisons(
            measured.video_scores[BASE], measured.video_scores[variant.name]
        )
        for variant in variants[1:]
    }
    print_comparisons(found, measured.heldout_loss, len(asked))
    more = {
        "run": str(task.run),
        "heldout_loss": measured.heldout_loss,
        "nearest_clip_of_held_out_clips": nearness_of_held_out(data, config, measures),
        "vbench": vbench(task.vbench, folder, list(measured.video_scores)),
    }
    scores.write_evaluation(folder, measured.video_scores, found, more)
    draw_sheet(folder / "evaluation.png", asked, measured.videos)
    print(f"\nresult  {shown(folder)}: evaluation.png shows the videos side by side,")
    print("        evaluation.json has these tables, evaluation.csv a row for each video")
    last = variants[-1].name
    if line := scores.score_line(found[last]):
        print(f"score   {line}")
    return {
        "status": "done",
        "objective": measured.heldout_loss[last],
        **scores.summary_scores(found[last]),
        "seconds": round(time.monotonic() - started, 1),
    }


def prepare_prompts(
    config: Config, task: EvaluateTask, folder: Path, ranks: Ranks
) -> tuple[Prepared, dict[str, list[str]]]:
    """The encoded data, and the prompts of each kind, whose embeddings are among it.

    The prompts are those of the task's files. Without files: the demo's, for a run of the demo;
    the captions of held-out clips, for all other runs.
    """
    prompts = prompts_from_files(task) or scores.scored_prompts_of(config, task.count)
    every = [prompt for those in prompts.values() for prompt in those]
    data = prepare(config, folder, ranks, every, went_before=[task.run])
    if not prompts:
        clips = [*data.held_out, *data.train][: task.count]
        prompts = {"taught": [clip.example.prompt for clip in clips]}
        if data.pretrained.geometry().image_to_video:
            data.images |= {
                clip.example.prompt: own_first_frame(clip, config.data) for clip in clips
            }
    return data, prompts


def measure_variants(
    config: Config,
    data: Prepared,
    variants: list[Variant],
    asked: list[scores.VideoRequest],
    measures: list[Measure],
    folder: Path,
    ranks: Ranks,
) -> Measured:
    measured = Measured()
    with chosen_attention(config, data.pretrained, folder, ranks, [config.task.run]):
        for variant, model in models(config, data, variants, ranks):
            with noting_lack("held-out loss", f"of {variant.name}"):
                loss = heldout_loss(
                    model, len(data.held_out), data.held_out_batch, config.validation, ranks
                )
            measured.heldout_loss[variant.name] = None if loss is None else loss.mean
            with noting_lack("video", f"of {variant.name}"):
                videos = make_videos(config, data, model, variant, asked, folder)
            measured.videos[variant.name] = videos
    # Not by the transformer's kernel: a CLIP model may have attention of another kind.
    for name, videos in measured.videos.items():
        measured.video_scores[name] = [
            all_scores(request, frames, measures)
            for request, frames in zip(asked, videos, strict=True)
        ]
    return measured


def print_comparisons(
    found: dict[str, list[scores.Comparison]], losses: dict[str, float | None], videos: int
) -> None:
    for name, those in found.items():
        print(f"\n{name} and the base model, {counted(videos, 'video')} each", end="")
        if losses[BASE] is not None:
            before, after = losses[BASE], losses[name]
            print(f"; held-out loss {before:.4f} (base model), {after:.4f} ({name})", end="")
        print(f"\n{scores.comparison_table(those)}")


# -- what is compared --------------------------------------------------------------------------


def variants_of(config: Config, task: EvaluateTask) -> list[Variant]:
    """The models to compare, the base model first. UserError as for weights_of_run()."""
    return [Variant(BASE, None), *at_strengths(weights_of_run(config, task), task.strengths)]


def at_strengths(places: dict[str, Path], strengths: list[float]) -> list[Variant]:
    return [
        Variant(name if strength == 1.0 else f"{name} x {strength:g}", place, strength)
        for name, place in places.items()
        for strength in strengths
    ]


def weights_of_run(config: Config, task: EvaluateTask) -> dict[str, Path]:
    """The folders with the weights that are asked for, by what they are called.

    UserError if the run has no weights, or if full fine-tuning is asked for strengths.
    """
    run = task.run
    places = (
        {path.name: path for path in checkpoints.complete_checkpoints(run)}
        if task.checkpoints
        else {}
    )
    result = run / weights_of(config.lora).result
    if result.exists():
        places["result"] = run
    elif not places:
        kept = checkpoints.complete_checkpoints(run)
        if not kept:
            raise UserError(
                f"task.run={run} has no result ({result.name}) and no checkpoint: "
                f"let it finish, or go on with train.resume={run}"
            )
        places[kept[-1].name] = kept[-1]
    if not weights_of(config.lora).has_strength and list(task.strengths) != [1.0]:
        raise UserError(
            "task.strengths is for a LoRA. Full fine-tuning (lora=null) has only one strength: "
            "task.strengths=[1.0]"
        )
    return places


def models(
    config: Config, data: Prepared, variants: list[Variant], ranks: Ranks
) -> Iterator[tuple[Variant, CogVideoX]]:
    """Each variant's model, one after the other."""
    pretrained = data.pretrained
    device, geometry, dtype = pretrained.device, pretrained.geometry(), pretrained.dtype
    wanted = [(variant.place, variant.strength) for variant in variants]
    transformers = frozen_variants(config, pretrained, ranks, wanted)
    for variant, transformer in zip(variants, transformers, strict=True):
        scheduler = pretrained.noise_scheduler()
        yield variant, CogVideoX(transformer, scheduler, geometry, device=device, dtype=dtype)


def prompts_from_files(task: EvaluateTask) -> dict[str, list[str]]:
    """The prompts of each kind; {} if the task names no files."""
    found = {}
    for kind, path in (("taught", task.prompts_file), ("other", task.other_prompts_file)):
        if path is not None:
            found[kind] = [line.strip() for line in text_of(path).splitlines() if line.strip()]
    if found and not any(found.values()):
        raise UserError("the prompts files are blank: one prompt per line")
    return found


def make_videos(
    config: Config,
    data: Prepared,
    model: CogVideoX,
    variant: Variant,
    asked: list[scores.VideoRequest],
    folder: Path,
) -> list[numpy.ndarray]:
    """The variant's videos, each [F, H, W, 3] uint8. Also written to videos/."""
    generator = VideoGenerator(config, data.pretrained, data.embeds, data.images)
    vae, made = generator.vae(), []
    progress = bar(asked, desc=f"videos  {variant.name}", unit="video", leave=False)
    for number, request in enumerate(progress, start=1):
        frames = generator.generate(model.transformer, vae, request.prompt, request.seed)
        name = f"{number:03d}_{request.kind}_seed{request.seed}.mp4"
        generator.save(folder_of_videos(folder, variant.name) / name, frames)
        made.append(frames)
    return made


def folder_of_videos(folder: Path, variant: str) -> Path:
    return folder / "videos" / variant.replace(" ", "_")


# -- more measures -----------------------------------------------------------------------------

# A measure's name, and the function of a video's frames and prompt that measures it.
Measure = tuple[str, Callable[[numpy.ndarray, str], float]]


def all_scores(
    request: scores.VideoRequest, frames: numpy.ndarray, measures: list[Measure]
) -> scores.VideoScores:
    values = scores.measure_video(frames, request.prompt)
    values |= {name: measure(frames, request.prompt) for name, measure in measures}
    return scores.VideoScores(request, values)


def nearest_clip(data: Prepared, config: Config) -> Measure:
    """The distance to the nearest training clip. A copy of a training clip has a distance near 0.

    It is the root mean square difference of the pixels, as a share of their range.
    """
    clips = [small(to_bytes(frames_of(clip, config.data))) for clip in data.train[:MOST_CLIPS]]

    def measure(frames: numpy.ndarray, prompt: str) -> float:
        return float(min(distance(small(frames), clip) for clip in clips))

    return "nearest_clip", measure


def nearness_of_held_out(data: Prepared, config: Config, measures: list[Measure]) -> float | None:
    """The mean of nearest_clip over the held-out clips: the value of clips that are new."""
    measure = dict(measures)["nearest_clip"]
    found = [measure(to_bytes(frames_of(clip, config.data)), "") for clip in data.held_out]
    return float(numpy.mean(found)) if found else None


def small(frames: numpy.ndarray) -> numpy.ndarray:
    """[F, H, W, 3] uint8 -> [F, NEAR, NEAR, 3] in [0, 1]."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.interpolate(pixels, (NEAR, NEAR), mode="area").numpy()


def distance(one: numpy.ndarray, other: numpy.ndarray) -> float:
    frames = min(len(one), len(other))
    return float(numpy.sqrt(numpy.square(one[:frames] - other[:frames]).mean()))


def clip_similarity(path: str, device: torch.device) -> Measure:
    """The cosine of the text's and the frames' features, the mean over four frames.

    Source: CLIPSIM, Wu et al. 2021 (GODIVA).
    """
    from transformers import AutoModel, AutoProcessor

    try:
        model = AutoModel.from_pretrained(path, weights_only=True, **NO_CODE).to(device).eval()
        processor = AutoProcessor.from_pretrained(path, **NO_CODE)
    except Exception as error:
        raise UserError(
            f"task.clip_path={path} cannot be loaded as a CLIP model: {first_line(error)}"
        ) from error

    @torch.no_grad()
    def measure(frames: numpy.ndarray, prompt: str) -> float:
        chosen = frames[numpy.linspace(0, len(frames) - 1, 4).round().astype(int)]
        given = processor(
            text=[prompt], images=list(chosen), return_tensors="pt", padding=True, truncation=True
        ).to(device)
        answer = model(**given)
        text, images = (
            each / each.norm(dim=-1, keepdim=True)
            for each in (answer.text_embeds, answer.image_embeds)
        )
        return float((images @ text.T).mean())

    return "clip", measure


def vbench(dimensions: list[str], folder: Path, variants: list[str]) -> dict:
    """VBench's own results for each variant's videos, in its mode for any prompts.

    Source: Huang et al. 2024. {} if no dimension is asked for.
    """
    if not dimensions:
        return {}
    try:
        from vbench import VBench
    except ImportError as error:
        raise UserError(
            f"task.vbench needs the package vbench ({error}). It needs other versions of some "
            f"packages, so it is best in an environment of its own: pip install vbench"
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for variant in variants:
        videos = folder_of_videos(folder, variant)
        bench = VBench(device, "", str(folder / "vbench"))
        bench.evaluate(
            videos_path=str(videos),
            name=videos.name,
            dimension_list=list(dimensions),
            mode="custom_input",
        )
        found[variant] = read_json(folder / "vbench" / f"{videos.name}_eval_results.json")
    return found


def draw_sheet(
    path: Path,
    asked: list[scores.VideoRequest],
    videos: dict[str, list[numpy.ndarray]],
    most: int = MOST_PICTURED,
) -> None:
    """A picture of the first `most` videos of each kind.

    A row for each prompt, a column for each variant.

    A video is shown by its first, its middle and its last frame.
    """
    from PIL import Image, ImageDraw

    from cogvx.data.inspect import fitted
    from cogvx.data.lettering import font

    chosen = first_of_each_kind(asked, most)
    _, frame_height, frame_width, _ = next(iter(videos.values()))[0].shape
    high, gap, title = 96, 8, 16
    wide = round(high * frame_width / frame_height)
    width = len(videos) * (3 * wide + gap) + gap
    sheet = Image.new("RGB", (width, title + len(chosen) * (high + title)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = font(11)
    for row, index in enumerate(chosen):
        top, prompt = title + row * (high + title), asked[index].prompt
        pen.text((gap, top + 1), fitted(pen, prompt, width - 2 * gap), "dimgray")
        for column, made in enumerate(videos.values()):
            frames, left = made[index], gap + column * (3 * wide + gap)
            for place, frame in enumerate(frames[[0, len(frames) // 2, -1]]):
                small_frame = Image.fromarray(frame).resize((wide, high), Image.Resampling.BICUBIC)
                sheet.paste(small_frame, (left + place * wide, top + title))
    for column, name in enumerate(videos):
        left = gap + column * (3 * wide + gap)
        pen.text((left, 1), fitted(pen, name, 3 * wide), "black")
    with replacing(path) as partial:
        sheet.save(partial, format="png")


def first_of_each_kind(asked: list[scores.VideoRequest], most: int) -> list[int]:
    """The places in the list of up to `most` videos of each kind."""
    chosen = []
    for kind in dict.fromkeys(request.kind for request in asked):
        places = [place for place, request in enumerate(asked) if request.kind == kind]
        chosen += places[:most]
    return chosen
