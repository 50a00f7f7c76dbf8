"""Validation videos: the tuned model's beside the base model's and a clip of the data.

F frames, H height, W width, S text tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
from torch import Tensor

from cogvx.config import Config
from cogvx.data.listed import text_of
from cogvx.data.mp4 import write_video
from cogvx.errors import UserError
from cogvx.files import read_json, replacing, write_json
from cogvx.inference import pictures, scores
from cogvx.inference.generate import SourceClip, generate
from cogvx.model.pretrained import PretrainedModel
from cogvx.options.validation import Validation
from cogvx.progress import bar, counted
from cogvx.records.pages import REAL_CLIPS
from cogvx.training.stop import REQUESTS


def validation_prompts(validation: Validation) -> list[str] | None:
    """The prompts of the validation videos; None if the prompt of a clip is to be used."""
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
            "the validation prompts are all blank: give at least one, "
            "or validation.num_validation_videos=0"
        )
    return list(dict.fromkeys(prompts))


def validation_images(validation: Validation, prompts: int) -> list[Path] | None:
    """The first frame for each prompt; None if the first frame of a clip is to be used."""
    if validation.validation_images is None:
        return None
    names = validation.validation_images.split(validation.validation_prompt_separator)
    paths = [Path(name.strip()) for name in names]
    if len(paths) not in (1, prompts):
        raise UserError(
            f"validation.validation_images names {counted(len(paths), 'image')} for "
            f"{counted(prompts, 'prompt')} (a repeated prompt counts once): "
            f"give one image for each prompt, or one for all"
        )
    for path in paths:
        if not path.is_file():
            raise UserError(f"validation.validation_images: {path} does not exist")
    return paths * prompts if len(paths) == 1 else paths


@dataclass(frozen=True)
class RealClip:
    """A clip of the data, to be shown beside the generated videos."""

    title: str  # "held-out clip" or "training clip"
    frames: numpy.ndarray  # [F, H, W, 3] uint8


@dataclass(frozen=True)
class VideoGenerator:
    """Generates videos with the run's size, sampling settings and prompt embeddings."""

    config: Config
    pretrained: PretrainedModel
    embeds: Callable[[str], Tensor]  # the embedding [S, D] of a prompt
    images: dict[str, numpy.ndarray]  # image-to-video: first frame [H, W, 3] uint8 by prompt
    clip: SourceClip | None = None  # video-to-video

    def vae(self):
        return self.pretrained.vae(tiling=self.config.memory.vae_tiling)

    def generate(
        self, transformer, vae, prompt: str, seed: int, description: str | None = None
    ) -> numpy.ndarray:
        """[F, H, W, 3] uint8. `description` stands before the progress bar; None: no bar."""
        return generate(
            self.pretrained.geometry().pipeline,
            transformer=transformer,
            vae=vae,
            noise_scheduler=self.pretrained.noise_scheduler(self.config.validation.scheduler),
            prompt_embeds=self.embeds(prompt),
            negative_prompt_embeds=self.embeds(self.config.validation.negative_prompt),
            image=self.images.get(prompt),
            clip=self.clip,
            data=self.config.data,
            sampling=self.config.validation,
            frugal=self.config.memory.frugal_videos,
            seed=seed,
            description=description,
            after_each_step=REQUESTS.cut_short_if_asked,
        )

    def save(self, path: Path, frames: numpy.ndarray) -> None:
        write_video(path, frames, fps=self.fps)

    @property
    def fps(self) -> float:
        return self.config.data.fps or self.config.model.fps


@dataclass(frozen=True)
class ValidationVideos:
    """The videos of one run.

    Those of the base model are made once, under validation/base/. Those of the tuned model are
    made every validation.validation_steps steps, under validation/step_*/.
    """

    folder: Path  # of the run
    generator: VideoGenerator
    prompts: list[str]
    real_clip: Callable[[str], RealClip]  # the clip to show beside a prompt's videos
    scored: list[scores.VideoRequest]  # videos that are scored and not kept

    @property
    def place(self) -> Path:
        return self.folder / "validation"

    def requests(self) -> list[tuple[str, str, int]]:
        """Name, prompt and seed of each video."""
        config = self.generator.config
        seeds = range(config.seed, config.seed + config.validation.num_validation_videos)
        return [
            (f"{number:02d}_seed{seed}", prompt, seed)
            for number, prompt in enumerate(self.prompts, start=1)
            for seed in seeds
        ]

    # -- the base model ----------------------------------------------------------------------

    def write_base(self, transformer) -> None:
        """Makes the base model's videos and scores, unless they exist.

        `transformer` is the base model at this moment.
        """
        requests = self.requests()
        missing = [each for each in requests if self.kept_base(each[0]) is None]
        unscored = len(self.kept_base_scores()) != len(self.scored)
        if self.prompts:
            self.write_real_clips(requests)
        if not missing and not unscored:
            return
        vae = self.generator.vae()
        for name, prompt, seed in missing:
            title = f"video {name}, base model"
            frames = self.generator.generate(transformer, vae, prompt, seed, title)
            self.generator.save(self.place / "base" / f"{name}.mp4", frames)
            with replacing(self.base_frames(name)) as partial, partial.open("wb") as file:
                numpy.savez_compressed(file, frames=frames)
        if unscored:
            values = [scored.values for scored in self.score(transformer, vae, "base model")]
            write_json(self.base_scores, values)

    def write_real_clips(self, requests: list[tuple[str, str, int]]) -> None:
        """The prompts, and the clip beside each video with its title, as report.html wants them."""
        titles = {}
        for name, prompt, _ in requests:
            real = self.real_clip(prompt)
            titles[name] = real.title
            self.generator.save(self.place / REAL_CLIPS / f"{name}.mp4", real.frames)
        write_json(self.place / f"{REAL_CLIPS}.json", titles)
        write_json(self.place / "prompts.json", {name: prompt for name, prompt, _ in requests})

    def base_frames(self, name: str) -> Path:
        """The frames without the losses of an mp4, for later comparisons."""
        return self.place / "base" / f"{name}.npz"

    def kept_base(self, name: str) -> numpy.ndarray | None:
        """The base model's frames, [F, H, W, 3] uint8; None if they are not there or damaged."""
        try:
            with numpy.load(self.base_frames(name)) as file:
                return file["frames"]
        # Damaged files raise errors of many kinds. The video is then made again.
        except Exception:
            return None

    def kept_base_scores(self) -> list[dict]:
        return list(read_json(self.base_scores))

    @property
    def base_scores(self) -> Path:
        return self.place / "base" / "scores.json"

    # -- the tuned model, after write_base() ---------------------------------------------------

    def write(self, transformer, step: int) -> list[tuple[Path, str]]:
        """Makes this step's videos, each beside the base model's and a real clip.

        Returns each mp4 with the title of its real clip. A GIF and a strip of frames stand beside.
        """
        if not self.prompts:
            return []
        vae, written = self.generator.vae(), []
        here = self.place / f"step_{step:06d}"
        for name, prompt, seed in self.requests():
            title = f"video {name}, step {step}"
            tuned = self.generator.generate(transformer, vae, prompt, seed, title)
            self.generator.save(here / f"{name}.mp4", tuned)
            path = here / f"{name}_before_after.mp4"
            written.append((path, self.write_comparison(path, name, prompt, tuned)))
        return written

    def write_comparison(self, path: Path, name: str, prompt: str, tuned: numpy.ndarray) -> str:
        """Base model, tuned model and a real clip, from left to right. Returns the clip's title."""
        real = self.real_clip(prompt)
        base = self.kept_base(name)
        together = pictures.side_by_side(
            {"base model": base, "tuned": tuned, real.title: real.frames}
        )
        self.generator.save(path, together)
        pictures.write_gif(path.with_suffix(".gif"), together, self.generator.fps)
        pictures.write_strip(path.with_suffix(".png"), together)
        return real.title

    def score_both(self, transformer, step: int) -> dict[str, list[scores.VideoScores]]:
        """The scored videos of the base model and of this step."""
        pairs = zip(self.scored, self.kept_base_scores(), strict=True)
        base = [scores.VideoScores(*pair) for pair in pairs]
        tuned = self.score(transformer, self.generator.vae(), f"step {step}")
        return {"base": base, "result": tuned}

    def score(self, transformer, vae, whose: str) -> list[scores.VideoScores]:
        requests = bar(self.scored, desc=f"score  {whose}", unit="video", leave=False)
        return scores.score_videos(
            lambda each: self.generator.generate(transformer, vae, each.prompt, each.seed),
            requests,
        )
