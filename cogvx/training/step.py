"""The objective of CogVideoX, and every random number in it.

B batch, F latent frames, C channels, H W latent size, S text tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy
import torch
from torch import Tensor

from cogvx.model.cogvideox import CogVideoX
from cogvx.options.train import Timesteps, TimestepSampling


@dataclass(frozen=True)
class Batch:
    """Clips and prompts as the encoders left them; image_moments only for image-to-video."""

    latent_moments: Tensor  # [B, 2C, F, H, W], mean and log variance from the VAE, unscaled
    prompt_embeds: Tensor  # [B, S, D]
    image_moments: Tensor | None = None  # [B, 2C, 1, H, W], the image each clip starts from


def training_losses(model: CogVideoX, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
    """Each clip's mean squared error of the predicted velocity [B], fp32, and its timestep [B].

    At every timestep this equals mean((x0_predicted - x0)^2 / (1 - alphas_cumprod)), the form that
    diffusers, CogVideo and finetrainers write. Computed in bf16, that form is wrong near t = 0.
    """
    latents = model.scale(draw.posterior(batch.latent_moments))  # [B, F, C, H, W]
    noise, timesteps = draw.noise(latents), draw.timesteps(model.num_timesteps)
    noisy_latents = model.add_noise(latents, noise, timesteps)
    condition = model.image_condition(draw.image(batch.image_moments), frames=latents.shape[1])
    predicted = model.predict_velocity(noisy_latents, condition, batch.prompt_embeds, timesteps)
    velocity = model.velocity(latents, noise, timesteps)
    return (predicted.float() - velocity).square().mean(dim=(1, 2, 3, 4)), timesteps


# -- random numbers ------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One use of a clip in training."""

    epoch: int
    index: int  # of the clip
    place: int  # in the sequence of all samples of the run


# Each kind of random number has its own stream.
ORDER, POSTERIOR, NOISE, TIMESTEP, CAPTION = 1, 2, 3, 4, 5
IMAGE_POSTERIOR, IMAGE_NOISE, IMAGE_DROPOUT = 6, 7, 8
CUT, CAPTION_CHOICE, ID_TOKEN, TURNS = 9, 10, 11, 12
Drawn = TypeVar("Drawn")
# (sqrt(5) - 1) / 2. Its multiples, modulo 1, fill any interval evenly.
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Draw:
    """The random numbers of a batch. Each is a function of (seed, epoch, clip) alone.

    So they do not depend on the number of processes, on a resume, or on validation in between.
    """

    seed: int
    samples: list[Sample]
    device: torch.device
    timestep_sampling: TimestepSampling = field(
        default_factory=lambda: TimestepSampling(Timesteps.uniform, 0.0, 1.0)
    )
    caption_dropout: float = 0.0
    image_dropout: float = 0.0

    def generator(self, stream: int, sample: Sample) -> numpy.random.Generator:
        return numpy.random.default_rng((stream, self.seed, sample.epoch, sample.index))

    def normal(self, stream: int, shape: torch.Size) -> Tensor:
        """Standard normal, fp32, of shape [B, ...]."""
        rows = [
            self.generator(stream, sample).standard_normal(shape[1:], dtype=numpy.float32)
            for sample in self.samples
        ]
        return on_device(torch.from_numpy(numpy.stack(rows)), self.device)

    def posterior(self, moments: Tensor, stream: int = POSTERIOR) -> Tensor:
        """A sample of the VAE's posterior, [B, 2C, F, H, W] -> [B, C, F, H, W].

        The arithmetic is that of diffusers' DiagonalGaussianDistribution.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * self.normal(stream, mean.shape)

    def noise(self, latents: Tensor) -> Tensor:
        return self.normal(NOISE, latents.shape)

    def timesteps(self, num_timesteps: int) -> Tensor:
        """[B], each from 0 to num_timesteps - 1."""
        positions = [self.schedule_position(sample) for sample in self.samples]
        timesteps = [min(int(p * num_timesteps), num_timesteps - 1) for p in positions]
        return on_device(torch.tensor(timesteps), self.device)

    def schedule_position(self, sample: Sample) -> float:
        """The timestep as a share of the schedule, from 0 up to 1."""
        sampling = self.timestep_sampling
        if sampling.timesteps is Timesteps.stratified:
            start = numpy.random.default_rng((TIMESTEP, self.seed)).random()
            return (start + sample.place * GOLDEN) % 1.0
        generator = self.generator(TIMESTEP, sample)
        if sampling.timesteps is Timesteps.logit_normal:
            normal = generator.normal(sampling.logit_mean, sampling.logit_std)
            return float(1 / (1 + numpy.exp(-normal)))
        return generator.random()

    def drops_caption(self) -> list[bool]:
        """For each sample whether it is trained without its caption."""
        values = [self.generator(CAPTION, sample).random() for sample in self.samples]
        return [bool(value < self.caption_dropout) for value in values]

    def leaves_out_id_token(self, shares: Sequence[float]) -> list[bool]:
        """For each sample whether its caption has no data.id_token. shares: of epochs without."""
        return [
            share > 0 and bool(self.generator(ID_TOKEN, sample).random() < share)
            for sample, share in zip(self.samples, shares, strict=True)
        ]

    def choose(self, stream: int, choices: Sequence[Sequence[Drawn]]) -> list[Drawn]:
        """For each sample one of its choices: of its images, captions or cuts.

        A clip uses all of them, in its own order, before one comes again.
        """
        chosen = []
        for sample, among in zip(self.samples, choices, strict=True):
            round_number, place = divmod(sample.epoch, len(among))
            seeds = (stream, self.seed, round_number, sample.index)
            order = numpy.random.default_rng(seeds).permutation(len(among))
            chosen.append(among[order[place]])
        return chosen

    def image(self, moments: Tensor | None) -> Tensor | None:
        """Image latents, [B, 2C, 1, H, W] -> [B, C, 1, H, W].

        A share image_dropout of the samples gets zeros.
        """
        if moments is None:
            return None
        values = [self.generator(IMAGE_DROPOUT, sample).random() for sample in self.samples]
        latents = self.posterior(moments, IMAGE_POSTERIOR)
        kept = torch.tensor([v >= self.image_dropout for v in values], dtype=latents.dtype)
        return latents * on_device(kept, self.device).view(-1, 1, 1, 1, 1)


@dataclass(frozen=True)
class FixedDraw(Draw):
    """For held-out losses: the timestep is given, and the noise is always the same."""

    timestep: int = 0

    def timesteps(self, num_timesteps: int) -> Tensor:
        return torch.full((len(self.samples),), self.timestep, device=self.device)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to the device without waiting for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
