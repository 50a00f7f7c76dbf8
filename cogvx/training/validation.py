"""How good is the model now: the held-out loss, and videos beside the base model's. Neither touches training's state."""

from __future__ import annotations

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
from cogvx.data.sources import text_of
from cogvx.data.video import write_video
from cogvx.errors import UserError
from cogvx.inference.generate import generate
from cogvx.model.checkpoint import Checkpoint
from cogvx.model.cogvideox import CogVideoX
from cogvx.training.options import Validation
from cogvx.training.step import Batch, FixedDraw, Sample, training_losses

HELD_OUT_SEED = 0  # of the held-out noise: the same for every run, so that runs can be compared


@dataclass(frozen=True)
class HeldOutLoss:
    mean: float  # over clips, timesteps and draws of noise
    standard_error: float | None  # of the mean over clips; None for a single clip
    noise_floor: float | None  # standard error of the mean over draws of noise; None for a single draw
    by_timestep: dict[int, float]

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.standard_error is None else f" +- {self.standard_error:.4f}")


def heldout_loss(
    model: CogVideoX, clips: int, load: Callable[[int], Batch], validation: Validation, accelerator: Accelerator
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
                    draw = FixedDraw(HELD_OUT_SEED + number, samples, model.device, timestep=timestep)
                    losses, _ = training_losses(model, batch, draw)
                    mine.append((index, timestep, number, losses))
    # Read from the device at the end, in one go.
    read = [(index, t, number, losses.item()) for index, t, number, losses in mine]
    losses = {(index, t, number): loss for index, t, number, loss in gather_object(read)}
    per_clip = [statistics.fmean(losses[index, t, d] for t in fixed for d in draws) for index in range(clips)]
    per_draw = [statistics.fmean(losses[index, t, d] for t in fixed for index in range(clips)) for d in draws]
    return HeldOutLoss(
        mean=statistics.fmean(per_clip),
        standard_error=standard_error(per_clip),
        noise_floor=standard_error(per_draw),
        by_timestep={t: statistics.fmean(losses[index, t, d] for index in range(clips) for d in draws) for t in fixed},
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
        given = text_of(Path(validation.validation_prompts_file)).splitlines()
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
    given = [Path(name.strip()) for name in validation.validation_images.split(validation.validation_prompt_separator)]
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
    checkpoint: Checkpoint
    prompt_embeds: dict[str, torch.Tensor]  # of every validation prompt
    images: dict[str, numpy.ndarray]  # image-to-video: their first frames, [H, W, 3] uint8
    negative_prompt_embeds: torch.Tensor

    def write_base(self, transformer) -> None:
        """The base model's videos, unless they are there. `transformer` has its adapters switched off."""
        missing = [
            (name, prompt, seed) for name, prompt, seed in self.wanted() if not self.frames_of_base(name).is_file()
        ]
        vae = self.checkpoint.vae(tiling=self.config.memory.vae_tiling) if missing else None
        for name, prompt, seed in missing:
            frames = self.generate(transformer, vae, prompt, seed, f"video {name}, base model")
            self.save(self.frames_of_base(name).with_suffix(".mp4"), frames)
            partial = self.frames_of_base(name).with_suffix(".partial.npz")
            numpy.savez_compressed(partial, frames=frames)
            partial.replace(self.frames_of_base(name))

    def frames_of_base(self, name: str) -> Path:
        """Kept beside the mp4 without its losses, for the later comparisons."""
        return self.folder / "validation" / "base" / f"{name}.npz"

    def write(self, transformer, step: int) -> list[Path]:
        """The mp4 files of this step: before (base) on the left, after on the right. write_base() comes first."""
        if not self.prompt_embeds:
            return []
        vae = self.checkpoint.vae(tiling=self.config.memory.vae_tiling)
        here = self.folder / "validation" / f"step_{step:06d}"
        written = []
        for name, prompt, seed in self.wanted():
            tuned = self.generate(transformer, vae, prompt, seed, f"video {name}, step {step}")
            self.save(here / f"{name}.mp4", tuned)
            both = side_by_side(numpy.load(self.frames_of_base(name))["frames"], tuned)
            self.save(here / f"{name}_before_after.mp4", both)
            written.append(here / f"{name}_before_after.mp4")
            write_strip(here / f"{name}_before_after.png", both)
        return written

    def wanted(self) -> list[tuple[str, str, int]]:
        """Name, prompt and seed of each video."""
        count = self.config.validation.num_validation_videos
        seeds = range(self.config.seed, self.config.seed + count)
        return [
            (f"{number:02d}_seed{seed}", prompt, seed)
            for number, prompt in enumerate(self.prompt_embeds, start=1)
            for seed in seeds
        ]

    def generate(self, transformer, vae, prompt: str, seed: int, description: str) -> numpy.ndarray:
        return generate(
            transformer=transformer, vae=vae, noise_scheduler=self.checkpoint.noise_scheduler(),
            prompt_embeds=self.prompt_embeds[prompt], negative_prompt_embeds=self.negative_prompt_embeds,
            image=self.images.get(prompt), data=self.config.data, sampling=self.config.validation,
            frugal=self.config.memory.frugal_videos, seed=seed, description=description,
        )  # fmt: skip

    def save(self, path: Path, frames: numpy.ndarray) -> None:
        write_video(path, frames, fps=self.config.data.fps or self.config.model.fps)


def side_by_side(left: numpy.ndarray, right: numpy.ndarray) -> numpy.ndarray:
    """[F, H, W, 3] twice -> [F, H, 2W + gap, 3], with a white gap."""
    gap = numpy.full((*left.shape[:2], 8, 3), 255, dtype=left.dtype)
    return numpy.concatenate([left, gap, right], axis=2)


def write_strip(path: Path, frames: numpy.ndarray, count: int = 4) -> None:
    """`count` frames of a video under each other, as one picture."""
    from PIL import Image

    chosen = frames[numpy.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
    framed = numpy.pad(chosen, ((0, 0), (0, 4), (0, 0), (0, 0)), constant_values=255)  # a white line under each
    Image.fromarray(numpy.concatenate(list(framed), axis=0)).save(path)
