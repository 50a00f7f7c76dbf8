"""Cheap previews while training: a short sampling whose latents become colours without the VAE.

F latent frames, C channels, H W latent size; S text tokens, D their width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from cogvx.config import Config
from cogvx.data.cache import content_key
from cogvx.data.encode import EncodedClip, frames_of
from cogvx.data.mp4 import write_video
from cogvx.data.sources import Data
from cogvx.errors import first_line
from cogvx.files import replacing, write_json
from cogvx.inference import pictures
from cogvx.model.cogvideox import CogVideoX
from cogvx.model.geometry import Geometry
from cogvx.options.validation import Sampler
from cogvx.training.prepare import Prepared, read_tensor
from cogvx.training.stop import REQUESTS

COLOURS_VERSION = 1  # raise it when the same clips give another map
SAMPLING_STEPS = 8
CLIPS_TO_FIT = 4
LEAST_SIDE = 160  # pixels of a preview's shorter side; a latent pixel becomes a square of them
FRAMES_IN_STRIP = 4


@dataclass
class Previews:
    """The previews of one run, RUN/previews/step_*/. The process that makes videos makes them."""

    config: Config
    folder: Path  # of the run
    data: Prepared
    model: CogVideoX
    works: bool = True  # False after an error: then there are no more

    NAME: ClassVar[str] = "01_preview"

    def write(self, step: int) -> list[Path]:
        """Makes the preview of this step; returns its mp4. A gif and a png stand beside.

        An error is a warning, and there are no more previews then: the run goes on.
        """
        if not self.works:
            return []
        try:
            return [self.write_files(step)]
        except Exception as error:
            self.works = False
            tqdm.write(
                f"warning the preview of step {step} failed: {first_line(error)}; the run goes on "
                f"without previews"
            )
            return []

    def write_files(self, step: int) -> Path:
        colours = self.latent_colours
        frames = colours.pixels(self.latents(), self.geometry.temporal_stride)
        path = self.folder / "previews" / f"step_{step:06d}" / f"{self.NAME}.mp4"
        fps = self.config.data.fps or self.config.model.fps
        write_video(path, frames, fps=fps)
        pictures.write_gif(path.with_suffix(".gif"), frames, fps)
        write_frames(path.with_suffix(".png"), frames)
        return path

    @property
    def geometry(self) -> Geometry:
        return self.model.geometry

    @property
    def clip(self) -> EncodedClip:
        """Image-to-video starts from its first frame: other images are not encoded."""
        return (self.data.held_out or self.data.train)[0]

    @property
    def prompt(self) -> str:
        """The first validation prompt; for image-to-video the caption of the clip."""
        if self.geometry.image_to_video:
            return self.clip.example.prompt
        return self.data.example_prompt

    # -- sampling ----------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self) -> Tensor:
        """[F, C, H, W] as the VAE's encoder gives them, on the CPU.

        The transformer is used as it is in training, and none of the random numbers of training.
        One prompt at a time goes through it: that takes no more memory than a training step.
        """
        data, validation, device = self.config.data, self.config.validation, self.model.device
        scheduler = self.data.pretrained.noise_scheduler(Sampler.ddim)
        scheduler.set_timesteps(SAMPLING_STEPS, device=device)
        noise = torch.Generator("cpu").manual_seed(self.config.seed)
        latents = torch.randn(self.shape(data), generator=noise).to(device)
        condition = self.condition(latents.shape[1])
        prompts = [self.data.embeds(p) for p in (self.prompt, validation.negative_prompt)]
        prompts = [embeds[None].to(device) for embeds in prompts]
        for timestep in scheduler.timesteps:
            REQUESTS.cut_short_if_asked()
            towards, away = (
                self.model.predict_velocity(latents, condition, embeds, timestep[None]).float()
                for embeds in prompts
            )
            velocity = away + validation.guidance_scale * (towards - away)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        padding = self.geometry.padding(self.frames(data))
        return (latents[0, padding:] / self.geometry.scaling_factor).cpu()

    def frames(self, data: Data) -> int:
        return (data.max_num_frames - 1) // self.geometry.temporal_stride + 1

    def shape(self, data: Data) -> tuple[int, ...]:
        """[1, F, C, H, W], with the frames that 1.5 needs in front."""
        geometry, frames = self.geometry, self.frames(data)
        size = (data.height // geometry.spatial_stride, data.width // geometry.spatial_stride)
        # Its image has the size of the clip's bucket.
        if geometry.image_to_video:
            size = tuple(self.clip.latent_shape[2:])
        return (1, frames + geometry.padding(frames), geometry.latent_channels, *size)

    def condition(self, frames: int) -> Tensor | None:
        if not self.geometry.image_to_video:
            return None
        moments = read_tensor(self.clip.first.image_path, "image_moments", 0)
        mean = moments.float().chunk(2)[0][None]  # [1, C, 1, H, W]
        return self.model.image_condition(mean.to(self.model.device), frames)

    # -- colours -----------------------------------------------------------------------------

    @functools.cached_property
    def latent_colours(self) -> LatentColours:
        """Fitted at the first preview, and kept in the cache for this VAE and these clips."""
        pretrained, cache = self.data.pretrained, self.data.pretrained.cache
        clips = self.data.train[:CLIPS_TO_FIT]
        tested = (self.data.held_out or clips)[0]
        vae = cache.fingerprint(pretrained.folder / "vae")
        names = [clip.first.path.name for clip in (*clips, tested)]
        path = cache.path("colours", content_key(COLOURS_VERSION, vae, names))
        if cache.about(path) is None:
            fitted = fit_colours(
                [pairs_of(clip, self.config.data, self.geometry) for clip in clips]
            )
            inputs, colours = pairs_of(tested, self.config.data, self.geometry)
            about = {"r2": round(explained_share(fitted, inputs, colours), 3)}
            cache.write(path, {"weights": fitted.float().contiguous()}, about=about)
        r2 = cache.about(path)["r2"]
        held_out = "held-out" if self.data.held_out else "training"
        write_json(
            self.folder / "previews" / "about.json",
            {
                "prompt": self.prompt,
                "r2": r2,
                "about": f"{SAMPLING_STEPS} sampling steps, and colours guessed from the latents "
                f"without the VAE: coarse. The guess explains {r2:.0%} of the colours of a "
                f"{held_out} clip (R2).",
            },
        )
        return LatentColours(read_tensor(path, "weights"))


@dataclass(frozen=True)
class LatentColours:
    """The colour of a latent pixel, as a linear function of its channels."""

    weights: Tensor  # [C + 1, 3]; the last row is the colour of zeros

    def pixels(self, latents: Tensor, temporal_stride: int) -> numpy.ndarray:
        """[F, C, H, W] -> [1 + temporal_stride * (F - 1), height, width, 3] uint8.

        Every latent pixel is a square, and every latent frame but the first stands for several.
        """
        colours = with_ones(latents.permute(0, 2, 3, 1).float()) @ self.weights  # [F, H, W, 3]
        frames = ((colours + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        height, width = frames.shape[1:3]
        times = -(-LEAST_SIDE // min(height, width))
        times += times % 2  # H.264 needs an even height and width
        frames = frames.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
        return torch.cat([frames[:1], frames[1:].repeat_interleave(temporal_stride, dim=0)]).numpy()


def with_ones(values: Tensor) -> Tensor:
    """[..., C] -> [..., C + 1]"""
    return torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)


def pairs_of(clip: EncodedClip, data: Data, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """A clip's latent pixels [N, C + 1] and the mean colours [N, 3] of what they stand for.

    A latent frame but the first stands for `temporal_stride` frames, a latent pixel for a square.
    """
    moments = read_tensor(clip.first.path, "latent_moments")
    latents = moments.float().chunk(2)[0]  # [C, F, H, W]
    stride, space = geometry.temporal_stride, geometry.spatial_stride
    pixels = frames_of(clip, data, frame_multiple=stride)  # [F, 3, H, W]
    squares = torch.nn.functional.avg_pool2d(pixels.float(), space)
    later = squares[1:].unflatten(0, (-1, stride)).mean(dim=1)
    colours = torch.cat([squares[:1], later])
    inputs = with_ones(latents.permute(1, 2, 3, 0)).flatten(0, 2)
    return inputs.double(), colours.permute(0, 2, 3, 1).flatten(0, 2).double()


def fit_colours(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The weights [C + 1, 3] with the least squared error over all pairs.

    The sums over clips are enough: [C + 1, C + 1] and [C + 1, 3]. Flat clips leave some weights
    open; a little ridge makes those small.
    """
    squares = sum(inputs.T @ inputs for inputs, _ in pairs)
    products = sum(inputs.T @ colours for inputs, colours in pairs)
    ridge = 1e-6 * squares.trace() / len(squares)
    return torch.linalg.solve(squares + ridge * torch.eye(len(squares)), products)


def explained_share(weights: Tensor, inputs: Tensor, colours: Tensor) -> float:
    """R2: 1 is a perfect guess, 0 one that is as good as the mean colour."""
    errors = (inputs @ weights - colours).square().sum()
    return float(1 - errors / (colours - colours.mean(dim=0)).square().sum())


def write_frames(path: Path, frames: numpy.ndarray) -> None:
    """Some frames beside each other, as one picture."""
    from PIL import Image

    chosen = numpy.linspace(0, len(frames) - 1, min(FRAMES_IN_STRIP, len(frames))).round()
    with replacing(path) as partial:
        strip = numpy.concatenate([frames[int(number)] for number in chosen], axis=1)
        Image.fromarray(strip).save(partial, format="PNG")
