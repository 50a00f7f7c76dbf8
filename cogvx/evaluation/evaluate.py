"""task=evaluate: base and tuned model on the same prompts and seeds, over strengths and checkpoints.

Measured are: on pixels, what the prompt asks for (prompts of the little world); motion, saturation; how near each video is to the
nearest training clip; the held-out loss; as options, a CLIP model's agreement of text and frames, and VBench.   F frames, H height, W width.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from accelerate import Accelerator

from cogvx.data.sources import text_of
from cogvx.data.video import read_clip, to_bytes
from cogvx.errors import UserError, first_line
from cogvx.files import read_json, shown
from cogvx.inference import scores
from cogvx.model import attention, blocks
from cogvx.model.cogvideox import CogVideoX
from cogvx.model.trained_weights import weights_of
from cogvx.progress import bar
from cogvx.training import checkpoint as checkpoints
from cogvx.training.prepare import Prepared, picture, start_processes
from cogvx.training.validation import Videos, heldout_loss

if TYPE_CHECKING:
    from cogvx.config import Config
    from cogvx.options.tasks import EvaluateTask

BASE = "base"
NEAR = 32  # pixels of a side, of the small copies in which the nearest training clip is looked for
MOST_CLIPS = 500  # training clips looked through
MOST_PICTURED = 8  # videos of each kind in the picture


@dataclass(frozen=True)
class Variant:
    """A model to be judged: a folder with its weights, or None for the base, and the strength of its LoRA."""

    name: str
    place: Path | None
    strength: float = 1.0


def evaluate(config: Config, task: EvaluateTask, folder: Path) -> dict:
    """Prints a table and writes evaluation.json, evaluation.csv, evaluation.png and videos/; returns the run's summary."""
    started, accelerator = time.monotonic(), start_processes(config)
    variants = variants_of(config, task)
    given = prompts_from_files(task) or scores.scored_prompts_of(config, task.count)
    data = Prepared.from_config(
        config, folder, accelerator, [prompt for those in given.values() for prompt in those]
    )
    if not given:
        clips = [*data.held_out, *data.train][: task.count]
        given = {"taught": [clip.example.prompt for clip in clips]}
        if data.pretrained.geometry().image_to_video:
            data.images |= {
                clip.example.prompt: picture(clip.example, config.data) for clip in clips
            }
    asked = scores.video_requests(given, task.seed)
    ways = [
        *nearest_clip(data, config),
        *([] if task.clip_path is None else [clip_similarity(task.clip_path, accelerator.device)]),
    ]
    rows, losses, videos = {}, {}, {}
    with attention.using(config.train.attention):
        for variant, model in models(config, data, variants, accelerator):
            loss = heldout_loss(
                model, len(data.held_out), data.held_out_batch, config.validation, accelerator
            )
            losses[variant.name] = None if loss is None else loss.mean
            made = make_videos(config, data, model, variant, asked, folder)
            rows[variant.name] = [
                with_more(scores.VideoScores(a, scores.measure_video(f, a.prompt)), f, ways)
                for a, f in zip(asked, made, strict=True)
            ]
            videos[variant.name] = made
    found = {
        v.name: scores.comparisons(rows[BASE], rows[v.name]) for v in variants if v.name != BASE
    }
    for name, those in found.items():
        change = (
            ""
            if losses[BASE] is None
            else f"; held-out loss {losses[BASE]:.4f} before, {losses[name]:.4f} after"
        )
        print(
            f"\n{name}: {len(asked)} videos of the base model and as many tuned{change}\n{scores.comparison_table(those)}"
        )
    benched = vbench(task.vbench, folder, list(rows))
    heldout_nearness = nearness_of_held_out(data, config, ways)
    scores.write_evaluation(folder, rows, found, {
        "run": str(task.run), "heldout_loss": losses, "nearest_clip_of_held_out_clips": heldout_nearness, "vbench": benched,
    })  # fmt: skip
    draw_sheet(folder / "evaluation.png", asked, videos)
    print(
        f"\nresult  {shown(folder / 'evaluation.json')}; evaluation.csv has every video, evaluation.png and videos/ show them"
    )
    last = found[variants[-1].name]
    for line in filter(None, [scores.score_line(last)]):
        print(f"score   {line}")
    return {
        "status": "done",
        "objective": losses[variants[-1].name],
        **scores.summary_scores(last),
        "seconds": round(time.monotonic() - started, 1),
    }


# -- what is judged ----------------------------------------------------------------------------------------------------


def variants_of(config: Config, task: EvaluateTask) -> list[Variant]:
    """The base first. UserError when the run has no weights, or strengths are asked of full fine-tuning."""
    run = task.run
    places = {path.name: path for path in checkpoints.all_complete(run)} if task.checkpoints else {}
    result = run / weights_of(config.lora).result
    if result.exists():
        places["result"] = run
    elif not places:
        kept = checkpoints.all_complete(run)
        if not kept:
            raise UserError(
                f"task.run={run} has no result ({result.name}) and no checkpoint: let it finish, or train.resume={run}"
            )
        places[kept[-1].name] = kept[-1]
    if not weights_of(config.lora).has_strength and list(task.strengths) != [1.0]:
        raise UserError(
            "task.strengths is for a LoRA; after full fine-tuning (lora=null) there is one strength: task.strengths=[1.0]"
        )
    found = [Variant(BASE, None)]
    for name, place in places.items():
        for strength in task.strengths:
            found.append(
                Variant(name if strength == 1.0 else f"{name} x {strength:g}", place, strength)
            )
    return found


def models(
    config: Config, data: Prepared, variants: list[Variant], accelerator: Accelerator
) -> Iterator[tuple[Variant, CogVideoX]]:
    """Each variant as a model, one at a time."""
    pretrained = data.pretrained
    device, geometry, dtype = pretrained.device, pretrained.geometry(), pretrained.dtype
    arrange = functools.partial(
        blocks.arrange, memory=config.memory, recompute=False, device=device
    )
    transformers = weights_of(config.lora).variants(
        pretrained, config.seed, [(v.place, v.strength) for v in variants], arrange
    )
    for variant, transformer in zip(variants, transformers, strict=True):
        scheduler = pretrained.noise_scheduler()
        yield variant, CogVideoX(transformer, scheduler, geometry, device=device, dtype=dtype)


def prompts_from_files(task: EvaluateTask) -> dict[str, list[str]]:
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
    videos = Videos(folder, config, data.pretrained, [], data.embeds, data.images, {}, [])
    vae, made = data.pretrained.vae(tiling=config.memory.vae_tiling), []
    for number, each in enumerate(
        bar(asked, desc=f"videos  {variant.name}", unit="video", leave=False), start=1
    ):
        frames = videos.generate(model.transformer, vae, each.prompt, each.seed, None)
        videos.save(
            folder
            / "videos"
            / variant.name.replace(" ", "_")
            / f"{number:03d}_{each.kind}_seed{each.seed}.mp4",
            frames,
        )
        made.append(frames)
    return made


# -- more measures -----------------------------------------------------------------------------------------------------

Way = tuple[
    str, Callable[[numpy.ndarray, str], float]
]  # a measure's name, and it: of frames and prompt


def with_more(
    scored: scores.VideoScores, frames: numpy.ndarray, ways: list[Way]
) -> scores.VideoScores:
    return replace(
        scored,
        values=scored.values | {name: way(frames, scored.asked.prompt) for name, way in ways},
    )


def nearest_clip(data: Prepared, config: Config) -> list[Way]:
    """RMS distance, as a share of the pixels' range, to the nearest training clip: of a copy near 0."""
    clips = [
        small(to_bytes(read_clip(clip.example.video, config.data).frames))
        for clip in data.train[:MOST_CLIPS]
    ]
    return [
        (
            "nearest_clip",
            lambda frames, prompt: float(min(distance(small(frames), clip) for clip in clips)),
        )
    ]


def nearness_of_held_out(data: Prepared, config: Config, ways: list[Way]) -> float | None:
    """What nearest_clip is for clips that are new and of the same kind."""
    way, found = dict(ways)["nearest_clip"], []
    for clip in data.held_out:
        found.append(way(to_bytes(read_clip(clip.example.video, config.data).frames), ""))
    return float(numpy.mean(found)) if found else None


def small(frames: numpy.ndarray) -> numpy.ndarray:
    """[F, H, W, 3] uint8 -> [F, NEAR, NEAR, 3] in [0, 1]."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.interpolate(pixels, (NEAR, NEAR), mode="area").numpy()


def distance(one: numpy.ndarray, other: numpy.ndarray) -> float:
    frames = min(len(one), len(other))
    return float(numpy.sqrt(numpy.square(one[:frames] - other[:frames]).mean()))


def clip_similarity(path: str, device: torch.device) -> Way:
    """Cosine of the text's and the frames' features, the mean over four frames (CLIPSIM, Wu et al. 2021, GODIVA)."""
    from transformers import AutoModel, AutoProcessor

    try:
        model, processor = (
            AutoModel.from_pretrained(path).to(device).eval(),
            AutoProcessor.from_pretrained(path),
        )
    except Exception as error:
        raise UserError(
            f"task.clip_path={path} cannot be loaded as a CLIP model: {first_line(error)}"
        ) from error

    @torch.no_grad()
    def way(frames: numpy.ndarray, prompt: str) -> float:
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

    return "clip", way


def vbench(dimensions: list[str], folder: Path, variants: list[str]) -> dict:
    """VBench's own results for each variant's videos (Huang et al. 2024), in its mode for videos of any prompt."""
    if not dimensions:
        return {}
    try:
        from vbench import VBench
    except ImportError as error:
        raise UserError(
            f"task.vbench needs the package vbench ({error}), which wants an environment of its own: pip install vbench"
        ) from error
    found = {}
    for variant in variants:
        place, name = folder / "videos" / variant.replace(" ", "_"), variant.replace(" ", "_")
        bench = VBench(
            torch.device("cuda" if torch.cuda.is_available() else "cpu"), "", str(folder / "vbench")
        )
        bench.evaluate(
            videos_path=str(place), name=name, dimension_list=list(dimensions), mode="custom_input"
        )
        found[variant] = read_json(folder / "vbench" / f"{name}_eval_results.json")
    return found


def draw_sheet(
    path: Path, asked: list[scores.VideoRequest], videos: dict[str, list[numpy.ndarray]]
) -> None:
    """Of the first prompts of each kind, first, middle and last frame by every variant."""
    from PIL import Image, ImageDraw

    from cogvx.data.inspect import fitted, font

    chosen = [
        i
        for kind in dict.fromkeys(a.kind for a in asked)
        for i in [j for j, a in enumerate(asked) if a.kind == kind][:MOST_PICTURED]
    ]
    side, gap, title = 96, 8, 16
    sheet = Image.new(
        "RGB", (len(videos) * (3 * side + gap) + gap, title + len(chosen) * (side + title)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    pen.font = font(11)
    for column, (name, made) in enumerate(videos.items()):
        left = gap + column * (3 * side + gap)
        pen.text((left, 1), name, "black")
        for row, index in enumerate(chosen):
            top, frames = title + row * (side + title), made[index]
            for place, frame in enumerate(frames[[0, len(frames) // 2, -1]]):
                sheet.paste(
                    Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC),
                    (left + place * side, top + title),
                )
            if column == 0:
                pen.text(
                    (left, top + 1),
                    fitted(pen, asked[index].prompt, sheet.width - 2 * gap),
                    "dimgray",
                )
    sheet.save(path)
