"""The objective of CogVideoX, whole, and every random number in it.

B batch, F latent frames, C channels, H W latent size, S text tokens, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from cogvx.model.cogvideox import CogVideoX
from cogvx.options.train import Timesteps, TimestepSampling


@dataclass(frozen=True)
class Batch:
    latent_moments: (
        Tensor  # [B, 2C, F, H, W], mean and log variance of the VAE's posterior, unscaled
    )
    prompt_embeds: Tensor  # [B, S, D]
    image_moments: Tensor | None = (
        None  # [B, 2C, 1, H, W], of the image a clip starts from; None for text-to-video
    )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def training_losses(model: CogVideoX, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
    """Mean squared error of the predicted velocity and the timestep it was taken at, for each clip: [B] fp32 and [B].

    It equals mean((x0_predicted - x0)^2 / (1 - alphas_cumprod)), the form diffusers, CogVideo and finetrainers write, at
    every timestep; that form, computed in bf16, is wrong near t = 0.
    """
    latents = model.scale(draw.posterior(batch.latent_moments))  # [B, F, C, H, W]
    noise, timesteps = draw.noise(latents), draw.timesteps(model.num_timesteps)
    noisy_latents = model.add_noise(latents, noise, timesteps)
    condition = model.image_condition(draw.image(batch.image_moments), frames=latents.shape[1])
    predicted = model.predict_velocity(noisy_latents, condition, batch.prompt_embeds, timesteps)
    velocity = model.velocity(latents, noise, timesteps)
    return (predicted.float() - velocity).square().mean(dim=(1, 2, 3, 4)), timesteps


class Sample(NamedTuple):
    """A clip's turn in training."""

    epoch: int
    index: int  # of the clip
    place: int  # in the sequence of all samples of the run


# Each kind of draw has a stream of its own.
ORDER, POSTERIOR, NOISE, TIMESTEP, CAPTION, IMAGE_POSTERIOR, IMAGE_NOISE, IMAGE_DROPOUT = range(
    1, 9
)
GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2: its multiples, modulo 1, fill any stretch evenly


@dataclass(frozen=True)
class Draw:
    """The random numbers of a batch: each a function of (seed, epoch, clip) and of nothing that came before.

    So they are the same for any number of processes, after a resume, and whatever validation did in between.
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
        return sent(torch.from_numpy(numpy.stack(rows)), self.device)

    def posterior(self, moments: Tensor, stream: int = POSTERIOR) -> Tensor:
        """A sample of the VAE's posterior, [B, 2C, F, H, W] -> [B, C, F, H, W], as diffusers' DiagonalGaussianDistribution."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * self.normal(stream, mean.shape)

    def noise(self, latents: Tensor) -> Tensor:
        return self.normal(NOISE, latents.shape)

    def timesteps(self, num_timesteps: int) -> Tensor:
        """[B], each from 0 to num_timesteps - 1."""
        shares = [self.share_of_schedule(sample) for sample in self.samples]
        return sent(
            torch.tensor([min(int(share * num_timesteps), num_timesteps - 1) for share in shares]),
            self.device,
        )

    def share_of_schedule(self, sample: Sample) -> float:
        """The timestep in [0, 1)."""
        sampling = self.timestep_sampling
        if sampling.timesteps is Timesteps.stratified:
            start = numpy.random.default_rng((TIMESTEP, self.seed)).random()
            return (start + sample.place * GOLDEN) % 1.0
        generator = self.generator(TIMESTEP, sample)
        if sampling.timesteps is Timesteps.logit_normal:
            return float(
                1 / (1 + numpy.exp(-generator.normal(sampling.logit_mean, sampling.logit_std)))
            )
        return generator.random()

    def drops_caption(self) -> list[bool]:
        return [
            bool(self.generator(CAPTION, sample).random() < self.caption_dropout)
            for sample in self.samples
        ]

    def image_variants(self, count: int) -> list[int]:
        """Which of `count` noisy encodings of its image each clip starts from: all of them, in an order of the clip's own,
        before one comes again."""
        rounds = [
            numpy.random.default_rng((IMAGE_NOISE, self.seed, s.epoch // count, s.index))
            for s in self.samples
        ]
        return [
            int(generator.permutation(count)[sample.epoch % count])
            for generator, sample in zip(rounds, self.samples, strict=True)
        ]

    def image(self, moments: Tensor | None) -> Tensor | None:
        """Image latents, [B, 2C, 1, H, W] -> [B, C, 1, H, W]; zeros for a share image_dropout of the samples."""
        if moments is None:
            return None
        kept = [
            self.generator(IMAGE_DROPOUT, sample).random() >= self.image_dropout
            for sample in self.samples
        ]
        latents = self.posterior(moments, IMAGE_POSTERIOR)
        return latents * sent(torch.tensor(kept, dtype=latents.dtype), self.device).view(
            -1, 1, 1, 1, 1
        )


@dataclass(frozen=True)
class FixedDraw(Draw):
    """For held-out losses: the timestep is given; the noise is drawn once per clip and timestep, and stays."""

    timestep: int = 0

    def timesteps(self, num_timesteps: int) -> Tensor:
        return torch.full((len(self.samples),), self.timestep, device=self.device)


def sample_order(seed: int, examples: int, start: int, count: int) -> list[Sample]:
    """Places start ... start + count - 1 of an endless sequence of epochs, each a seeded permutation of the examples."""
    order = []
    for place in range(start, start + count):
        epoch, position = divmod(place, examples)
        permutation = numpy.random.default_rng((ORDER, seed, epoch)).permutation(examples)
        order.append(Sample(epoch, int(permutation[position]), place))
    return order
