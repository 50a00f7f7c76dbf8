"""How good is the model now: the held-out loss, and videos beside the base model's. Neither touches training's state."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from cogvx.config import Config
from cogvx.data.listed import text_of
from cogvx.data.mp4 import write_video
from cogvx.errors import UserError
from cogvx.files import write_text
from cogvx.inference import scores
from cogvx.inference.generate import generate
from cogvx.model.cogvideox import CogVideoX
from cogvx.model.pretrained import PretrainedModel
from cogvx.options.validation import Validation
from cogvx.progress import bar
from cogvx.training.step import Batch, FixedDraw, Sample, training_losses

HELD_OUT_SEED = 0  # of the held-out noise: the same for every run, so that runs can be compared


@dataclass(frozen=True)
class HeldOutLoss:
    mean: float  # over clips, timesteps and draws of noise
    standard_error: float | None  # of the mean over clips; None for a single clip
    noise_floor: (
        float | None
    )  # standard error of the mean over draws of noise; None for a single draw
    by_timestep: dict[int, float]
    by_clip: list[float]  # in the order of the held-out clips: runs can be compared clip by clip

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (
            "" if self.standard_error is None else f" +- {self.standard_error:.4f}"
        )


def heldout_loss(
    model: CogVideoX,
    clips: int,
    load: Callable[[int], Batch],
    validation: Validation,
    accelerator: Accelerator,
) -> HeldOutLoss | None:
    """The training loss without dropout and weights, at fixed timesteps with fixed noise; None without held-out clips.

    The timesteps are the middles of validation.heldout_timesteps equal bands of the schedule, so by_timestep is the loss by band.
    load(index) gives a clip as a batch of one. Processes share the clips.
    """
    if not clips:
        return None
    bands, draws = validation.heldout_timesteps, range(validation.heldout_draws)
    fixed = [int((k + 0.5) * model.num_timesteps / bands) for k in range(bands)]
    mine = []
    with torch.no_grad():
        for index in range(accelerator.process_index, clips, accelerator.num_processes):
            batch = load(index)
            for timestep in fixed:
                for number in draws:
                    samples = [Sample(epoch=timestep, index=index, place=0)]
                    draw = FixedDraw(
                        HELD_OUT_SEED + number, samples, model.device, timestep=timestep
                    )
                    losses, _ = training_losses(model, batch, draw)
                    mine.append((index, timestep, number, losses))
    # Read from the device at the end, in one go.
    read = [(index, t, number, losses.item()) for index, t, number, losses in mine]
    losses = {(index, t, number): loss for index, t, number, loss in gather_object(read)}
    per_clip = [
        statistics.fmean(losses[index, t, d] for t in fixed for d in draws)
        for index in range(clips)
    ]
    per_draw = [
        statistics.fmean(losses[index, t, d] for t in fixed for index in range(clips))
        for d in draws
    ]
    return HeldOutLoss(
        mean=statistics.fmean(per_clip),
        standard_error=standard_error(per_clip),
        noise_floor=standard_error(per_draw),
        by_timestep={
            t: statistics.fmean(losses[index, t, d] for index in range(clips) for d in draws)
            for t in fixed
        },
        by_clip=per_clip,
    )


def standard_error(values: list[float]) -> float | None:
    """Of the mean; None for less than two finite values."""
    finite = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.stdev(values) / len(values) ** 0.5 if finite else None


def given_prompts(config: Config) -> list[str] | None:
    """The prompts of the validation videos, as given or from the file; None when the data's own are to be used."""
    validation = config.validation
    if validation.num_validation_videos == 0:
        return []
    if validation.validation_prompts_file is not None:
        given = text_of(validation.validation_prompts_file).splitlines()
    elif validation.validation_prompt is not None:
        given = validation.validation_prompt.split(validation.validation_prompt_separator)
    else:
        return None
    prompts = [line.strip() for line in given if line.strip()]
    if not prompts:
        raise UserError(
            "the validation prompts are all blank: give at least one, or validation.num_validation_videos=0"
        )
    return list(dict.fromkeys(prompts))


def given_images(config: Config, prompts: int) -> list[Path] | None:
    """The first frames of the validation videos, one for each prompt or one for all; None when the data's own are to be used."""
    validation = config.validation
    if validation.validation_images is None:
        return None
    given = [
        Path(name.strip())
        for name in validation.validation_images.split(validation.validation_prompt_separator)
    ]
    if len(given) not in (1, prompts):
        raise UserError(
            f"validation.validation_images names {len(given)} images for {prompts} prompts (the same one twice counts once): "
            f"give one for each, or one for all"
        )
    for path in given:
        if not path.is_file():
            raise UserError(f"validation.validation_images: {path} does not exist")
    return given * prompts if len(given) == 1 else given


@dataclass(frozen=True)
class Videos:
    """Validation videos of one run: the tuned model's under validation/step_*/, the base model's, made once, under validation/base/."""

    folder: Path
    config: Config
    pretrained: PretrainedModel
    prompts: list[str]
    embeds: Callable[[str], torch.Tensor]  # of a prompt, [S, D]
    images: dict[str, numpy.ndarray]  # image-to-video: the prompts' first frames, [H, W, 3] uint8
    beside: dict[
        str, numpy.ndarray
    ]  # a training clip to show beside a prompt's videos, [F, H, W, 3] uint8
    asked: list[scores.VideoRequest]  # of the videos that are only scored

    def write_base(self, transformer) -> None:
        """The base model's videos and scores, unless they are there. `transformer` has its adapters switched off."""
        missing = [
            (name, prompt, seed)
            for name, prompt, seed in self.wanted()
            if not self.frames_of_base(name).is_file()
        ]
        if self.prompts:
            self.frames_of_base("").parent.mkdir(parents=True, exist_ok=True)
            prompts = {name: prompt for name, prompt, _ in self.wanted()}
            write_text(
                self.folder / "validation" / "prompts.json", json.dumps(prompts, ensure_ascii=False)
            )
        unscored = bool(self.asked) and not self.base_scores().is_file()
        vae = (
            self.pretrained.vae(tiling=self.config.memory.vae_tiling)
            if missing or unscored
            else None
        )
        for name, prompt, seed in missing:
            frames = self.generate(transformer, vae, prompt, seed, f"video {name}, base model")
            self.save(self.frames_of_base(name).with_suffix(".mp4"), frames)
            partial = self.frames_of_base(name).with_suffix(".partial.npz")
            numpy.savez_compressed(partial, frames=frames)
            partial.replace(self.frames_of_base(name))
        if unscored:
            values = [scored.values for scored in self.score(transformer, vae, "base model")]
            self.base_scores().parent.mkdir(parents=True, exist_ok=True)
            write_text(self.base_scores(), json.dumps(values))

    def frames_of_base(self, name: str) -> Path:
        """Kept beside the mp4 without its losses, for the later comparisons."""
        return self.folder / "validation" / "base" / f"{name}.npz"

    def base_scores(self) -> Path:
        return self.folder / "validation" / "base" / "scores.json"

    def score(self, transformer, vae, whose: str) -> list[scores.VideoScores]:
        asked = bar(self.asked, desc=f"score  {whose}", unit="video", leave=False)
        return scores.score_videos(
            lambda each: self.generate(transformer, vae, each.prompt, each.seed, None), asked
        )

    def score_both(self, transformer, step: int) -> dict[str, list[scores.VideoScores]]:
        """Of the base model and of this step. write_base() comes first."""
        vae = self.pretrained.vae(tiling=self.config.memory.vae_tiling)
        values = json.loads(self.base_scores().read_text(encoding="utf-8"))
        base = [
            scores.VideoScores(asked, found)
            for asked, found in zip(self.asked, values, strict=True)
        ]
        return {"base": base, "result": self.score(transformer, vae, f"step {step}")}

    def write(self, transformer, step: int) -> list[Path]:
        """The mp4 files of this step: before (base) on the left, after in the middle, a training clip on the right; beside them the
        same as gif and as a strip of frames. write_base() comes first."""
        if not self.prompts:
            return []
        vae = self.pretrained.vae(tiling=self.config.memory.vae_tiling)
        here = self.folder / "validation" / f"step_{step:06d}"
        written = []
        for name, prompt, seed in self.wanted():
            tuned = self.generate(transformer, vae, prompt, seed, f"video {name}, step {step}")
            self.save(here / f"{name}.mp4", tuned)
            panels = {"base model": numpy.load(self.frames_of_base(name))["frames"], "tuned": tuned}
            if prompt in self.beside:
                panels["training clip"] = self.beside[prompt]
            together = side_by_side(panels)
            self.save(here / f"{name}_before_after.mp4", together)
            write_gif(here / f"{name}_before_after.gif", together, self.fps())
            write_strip(here / f"{name}_before_after.png", together)
            written.append(here / f"{name}_before_after.mp4")
        return written

    def wanted(self) -> list[tuple[str, str, int]]:
        """Name, prompt and seed of each video."""
        count = self.config.validation.num_validation_videos
        seeds = range(self.config.seed, self.config.seed + count)
        return [
            (f"{number:02d}_seed{seed}", prompt, seed)
            for number, prompt in enumerate(self.prompts, start=1)
            for seed in seeds
        ]

    def generate(
        self, transformer, vae, prompt: str, seed: int, description: str | None
    ) -> numpy.ndarray:
        return generate(
            transformer=transformer, vae=vae, noise_scheduler=self.pretrained.noise_scheduler(),
            prompt_embeds=self.embeds(prompt), negative_prompt_embeds=self.embeds(""),
            image=self.images.get(prompt), data=self.config.data, sampling=self.config.validation,
            frugal=self.config.memory.frugal_videos, seed=seed, description=description,
        )  # fmt: skip

    def save(self, path: Path, frames: numpy.ndarray) -> None:
        write_video(path, frames, fps=self.fps())

    def fps(self) -> float:
        return self.config.data.fps or self.config.model.fps


SMALL, GAP, TITLE = (
    160,
    6,
    18,
)  # pixels: frames lower than this are enlarged; between panels; the height of their titles


def side_by_side(panels: dict[str, numpy.ndarray]) -> numpy.ndarray:
    """Videos [F, H, W, 3] uint8 with their titles -> one, enlarged where they are small; as long as the shortest."""
    from PIL import Image, ImageDraw

    from cogvx.data.inspect import font

    frames, (height, width) = min(map(len, panels.values())), next(iter(panels.values())).shape[1:3]
    times = -(-SMALL // height) if height < SMALL else 1
    size = (width * times, height * times)
    made = []
    for number in range(frames):
        sheet = Image.new("RGB", (len(panels) * (size[0] + GAP) - GAP, size[1] + TITLE), "white")
        pen = ImageDraw.Draw(sheet)
        for place, (title, video) in enumerate(panels.items()):
            left = place * (size[0] + GAP)
            pen.text((left + 2, 2), title, "black", font=font(12))
            sheet.paste(
                Image.fromarray(video[number]).resize(size, Image.Resampling.BICUBIC), (left, TITLE)
            )
        made.append(numpy.asarray(sheet))
    even = (made[0].shape[0] // 2 * 2, made[0].shape[1] // 2 * 2)  # which H.264 wants
    return numpy.stack(made)[:, : even[0], : even[1]]


def write_gif(path: Path, frames: numpy.ndarray, fps: float) -> None:
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0
    )


def write_strip(path: Path, frames: numpy.ndarray, count: int = 4) -> None:
    """`count` frames of a video under each other, as one picture."""
    from PIL import Image

    chosen = frames[numpy.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
    chosen = [chosen[0], *(frame[TITLE:] for frame in chosen[1:])]
    Image.fromarray(
        numpy.concatenate(
            [numpy.pad(f, ((0, 4), (0, 0), (0, 0)), constant_values=255) for f in chosen]
        )
    ).save(path)
