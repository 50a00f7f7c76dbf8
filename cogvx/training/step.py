"""The objective of CogVideoX, whole, and every random number in it.

B batch, F latent frames, C channels, H W latent size, S text tokens, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvx.model.cogvideox import CogVideoX


@dataclass(frozen=True)
class Batch:
    latent_moments: Tensor  # [B, 2C, F, H, W], mean and log variance of the VAE's posterior, unscaled
    prompt_embeds: Tensor  # [B, S, D]


def training_loss(model: CogVideoX, batch: Batch, draw: Draw) -> Tensor:
    """Mean squared error of the predicted velocity, fp32.

    It equals mean((x0_predicted - x0)^2 / (1 - alphas_cumprod)), the form diffusers, CogVideo and finetrainers write, at
    every timestep; that form, computed in bf16, is wrong near t = 0.
    """
    latents = model.scale(draw.posterior(batch.latent_moments))  # [B, F, C, H, W]
    noise, timesteps = draw.noise(latents), draw.timesteps(model.num_timesteps)
    noisy_latents = model.add_noise(latents, noise, timesteps)
    velocity = model.predict_velocity(noisy_latents, batch.prompt_embeds, timesteps)
    return F.mse_loss(velocity.float(), model.velocity(latents, noise, timesteps))


ORDER, POSTERIOR, NOISE, TIMESTEP, CAPTION = range(1, 6)  # each kind of draw has a stream of its own


@dataclass(frozen=True)
class Draw:
    """The random numbers of a batch: each a function of (seed, epoch, sample) and of nothing that came before.

    So they are the same for any number of processes, after a resume, and whatever validation did in between.
    """

    seed: int
    samples: list[tuple[int, int]]  # epoch and index of each clip of the batch
    device: torch.device

    def generator(self, stream: int, sample: tuple[int, int]) -> numpy.random.Generator:
        return numpy.random.default_rng((stream, self.seed, *sample))

    def normal(self, stream: int, shape: torch.Size) -> Tensor:
        """Standard normal, fp32, of shape [B, ...]."""
        rows = [
            self.generator(stream, sample).standard_normal(shape[1:], dtype=numpy.float32) for sample in self.samples
        ]
        return torch.from_numpy(numpy.stack(rows)).to(self.device)

    def posterior(self, moments: Tensor) -> Tensor:
        """A sample of the VAE's posterior, [B, 2C, F, H, W] -> [B, C, F, H, W], as diffusers' DiagonalGaussianDistribution."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * self.normal(POSTERIOR, mean.shape)

    def noise(self, latents: Tensor) -> Tensor:
        return self.normal(NOISE, latents.shape)

    def timesteps(self, num_timesteps: int) -> Tensor:
        """Uniform, [B]."""
        drawn = [self.generator(TIMESTEP, sample).integers(num_timesteps) for sample in self.samples]
        return torch.tensor(drawn, device=self.device)

    def drops_caption(self, probability: float) -> list[bool]:
        return [bool(self.generator(CAPTION, sample).random() < probability) for sample in self.samples]


@dataclass(frozen=True)
class FixedDraw(Draw):
    """For held-out losses: the timestep is given; the noise is drawn once per clip and timestep, and stays."""

    timestep: int

    def timesteps(self, num_timesteps: int) -> Tensor:
        return torch.full((len(self.samples),), self.timestep, device=self.device)


def sample_order(seed: int, examples: int, start: int, count: int) -> list[tuple[int, int]]:
    """Places start ... start + count - 1 of an endless sequence of epochs, each a seeded permutation of the examples.

    Returns (epoch, index) of each.
    """
    order = []
    for place in range(start, start + count):
        epoch, position = divmod(place, examples)
        permutation = numpy.random.default_rng((ORDER, seed, epoch)).permutation(examples)
        order.append((epoch, int(permutation[position])))
    return order
