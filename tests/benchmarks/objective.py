"""The time of a training step with the velocity loss, over that with the published loss of x0.

python tests/benchmarks/objective.py        on an idle machine; prints the median of the rounds
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent.parent)]

from cogvx.progress import quiet_libraries  # noqa: E402

quiet_libraries()

from cogvx.model import nano  # noqa: E402
from cogvx.model.cogvideox import CogVideoX  # noqa: E402
from cogvx.model.pretrained import PretrainedModel  # noqa: E402
from cogvx.training.step import Batch, Draw, Sample, training_losses  # noqa: E402

ROUNDS, STEPS = 15, 40
CPU = torch.device("cpu")


def velocity_loss(model: CogVideoX, batch: Batch, draw: Draw) -> torch.Tensor:
    return training_losses(model, batch, draw)[0].mean()


def weighted_x0_loss(model: CogVideoX, batch: Batch, draw: Draw) -> torch.Tensor:
    """The error of x0, weighted by 1 / (1 - alphas_cumprod).

    As the example of diffusers, CogVideo and finetrainers compute it.
    """
    latents = model.scale(draw.posterior(batch.latent_moments))
    noise, timesteps = draw.noise(latents), draw.timesteps(model.num_timesteps)
    noisy_latents = model.add_noise(latents, noise, timesteps)
    predicted = model.predict_velocity(noisy_latents, None, batch.prompt_embeds, timesteps)
    # The formula of the velocity also gives x0: sqrt(a) noisy - sqrt(1 - a) predicted.
    x0 = model.velocity(predicted, noisy_latents, timesteps)
    weights = 1 / (1 - model.alphas_cumprod[timesteps])
    while weights.ndim < x0.ndim:
        weights = weights.unsqueeze(-1)
    return (weights * (x0 - latents) ** 2).reshape(len(latents), -1).mean(dim=1).mean()


def seconds(loss, model: CogVideoX, batch: Batch) -> float:
    started = time.perf_counter()
    for step in range(STEPS):
        loss(model, batch, Draw(0, [Sample(step, 0, step)], CPU)).backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        pretrained = PretrainedModel(nano.write_nano(Path(scratch) / "nano"), CPU, torch.float32)
        transformer = pretrained.transformer()
    transformer.requires_grad_(True)
    model = CogVideoX(
        transformer, nano.noise_scheduler(), nano.NANO.geometry, device=CPU, dtype=torch.float32
    )
    batch = Batch(torch.randn(1, 32, 3, 16, 16), torch.randn(1, nano.TEXT_TOKENS, nano.TEXT_WIDTH))
    first = Draw(0, [Sample(0, 0, 0)], CPU)
    torch.testing.assert_close(
        velocity_loss(model, batch, first), weighted_x0_loss(model, batch, first)
    )
    ratios = []
    for number in range(ROUNDS):
        order = (
            [velocity_loss, weighted_x0_loss] if number % 2 else [weighted_x0_loss, velocity_loss]
        )
        times = {loss: seconds(loss, model, batch) for loss in order}
        ratios.append(times[velocity_loss] / times[weighted_x0_loss])
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    median, rounds = statistics.median(ratios), f"{ROUNDS} rounds of {STEPS} steps"
    print(f"velocity / weighted x0: median {median:.3f}, {spread}, {rounds}")
