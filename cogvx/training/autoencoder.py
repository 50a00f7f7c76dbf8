"""task=nano_vae: trains the VAE of model=nano on moving shapes of any colour.

B batch, F frames, C channels, H height, W width. Batches are functions of (seed, step), so a
resumed run computes what an undisturbed one would.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvx.data import world
from cogvx.errors import UserError, first_line
from cogvx.files import replacing, shown
from cogvx.model import nano
from cogvx.progress import bar, counted

if TYPE_CHECKING:
    from cogvx.config import Config
    from cogvx.options.tasks import NanoVaeTask

SIZE = 64  # pixels of a frame's side
# Clips of the world, drawn with a seed that training does not use.
HELD_OUT, WORLD_SEED = 64, 1
STATE, SAVED_EVERY = "state.pt", 500


def train_vae(config: Config, task: NanoVaeTask, folder: Path) -> dict:
    """Writes folder/vae, text_encoder and tokenizer. Returns the run's summary."""
    started = time.monotonic()
    torch.manual_seed(config.seed)
    vae = nano.new_vae().train()
    optimizer = torch.optim.Adam(vae.parameters(), lr=task.learning_rate)
    done = resume(folder, vae, optimizer)
    with bar(total=task.steps, initial=done, desc="vae   ", unit="step") as progress:
        for step in range(done, task.steps):
            loss = one_step(vae, optimizer, task, config.seed, step)
            progress.update()
            if (step + 1) % SAVED_EVERY == 0:
                save_state(folder, vae, optimizer, step + 1)
                log_step(folder, progress, step + 1, loss, measure(vae))
    found = measure(vae)
    vae.register_to_config(scaling_factor=round(1 / found["latent_std"], 4))
    vae.half().save_pretrained(folder / "vae")
    torch.manual_seed(config.seed)
    nano.write_text_encoder(folder)
    (folder / STATE).unlink(missing_ok=True)
    print(
        f"done    {found['psnr']:.2f} dB on {counted(HELD_OUT, 'held-out clip')}; "
        f"scaling factor {vae.config.scaling_factor}"
    )
    print(f"result  {shown(folder / 'vae')}")
    return {
        "status": "done",
        "step": task.steps,
        **found,
        "seconds": round(time.monotonic() - started, 1),
    }


def one_step(vae, optimizer, task: NanoVaeTask, seed: int, step: int) -> float:
    """Returns the loss.

    Most steps train on many crops. The last ones train on whole frames, to see their edges.
    """
    cropped = step < task.steps * (1 - task.share_of_whole_frames)
    size, batch = (task.crop, task.batch) if cropped else (SIZE, max(1, task.batch // 4))
    clips = torch.stack([draw_crop(seed, step, place, size) for place in range(batch)])
    for group in optimizer.param_groups:
        group["lr"] = task.learning_rate * rate(step / task.steps)
    with torch.autocast("cpu", torch.bfloat16, enabled=task.bf16):
        posterior = vae.encode(clips).latent_dist
        restored = vae.decode(posterior.sample(step_generator(seed, step))).sample.float()
    restoration = F.l1_loss(restored, clips) + F.mse_loss(restored, clips)
    loss = restoration + task.kl_weight * kl_divergence(posterior)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), task.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def log_step(folder: Path, progress, step: int, loss: float, found: dict[str, float]) -> None:
    progress.write(
        f"vae     step {step}: loss {loss:.4f}, {found['psnr']:.2f} dB on held-out clips"
    )
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "loss": loss, **found}) + "\n")


def rate(progress: float) -> float:
    """The share of the learning rate: a short warm-up, then a cosine down to 5 %."""
    return min(1.0, progress * 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def kl_divergence(posterior) -> Tensor:
    """To the standard normal, as a mean over latents (Kingma and Welling 2013)."""
    mean, variance = posterior.mean.float(), posterior.var.float()
    return 0.5 * (mean.square() + variance - 1 - posterior.logvar.float()).mean()


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def draw_crop(seed: int, step: int, place: int, size: int) -> Tensor:
    """[3, F, size, size] in [-1, 1], a crop of a clip of SIZE x SIZE.

    Any shape moves in any direction. Half of the colours are the world's, the others random.
    """
    generator = numpy.random.default_rng((seed, step, place))
    shape = generator.choice([*world.SHAPES, *world.OTHER_SHAPES])
    names = generator.permutation(list(world.COLOURS))
    colours = [
        world.COLOURS[name]
        if generator.random() < 0.5
        else tuple(generator.integers(0, 256, 3).tolist())
        for name in names[:2]
    ]
    angle = generator.uniform(0, 2 * math.pi)
    scene = world.Scene(shape, "", "", "", width=SIZE, height=SIZE, fps=8)
    scene = world.with_variation(scene, generator, radius=(0.2, 0.3), start=15, turn=45)
    direction = (
        (math.cos(angle), math.sin(angle))
        if generator.random() < 0.5
        else tuple(generator.permutation([0.0, generator.choice([-1.0, 1.0])]))
    )
    frames = world.paint(scene, *colours, direction)
    top, left = generator.integers(0, SIZE - size + 1, 2)
    return as_input(frames[:, top : top + size, left : left + size])


def as_input(frames: numpy.ndarray) -> Tensor:
    """[F, H, W, C] uint8 -> [C, F, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def measure(vae) -> dict[str, float]:
    """PSNR in dB on held-out clips, and the standard deviation of their latents.

    The PSNR is that of clips decoded from the posterior's mean.
    """
    errors, latents = [], []
    with torch.no_grad():
        for scene in world.scenes(HELD_OUT, WORLD_SEED):
            frames = as_input(world.draw_clip(replace(scene, width=SIZE, height=SIZE)))[None]
            posterior = vae.encode(frames).latent_dist
            latents.append(posterior.sample(torch.Generator().manual_seed(0)))
            restored = vae.decode(posterior.mean).sample.clamp(-1, 1)
            errors.append(((restored - frames) / 2).square().mean().item())
    return {
        "psnr": float(numpy.mean([10 * math.log10(1 / error) for error in errors])),
        "latent_std": torch.cat(latents).std().item(),
    }


def save_state(folder: Path, vae, optimizer, step: int) -> None:
    state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    with replacing(folder / STATE) as partial:
        torch.save(state, partial)


def resume(folder: Path, vae, optimizer) -> int:
    """Loads the saved state, if there is one. Returns the number of steps done."""
    if not (folder / STATE).is_file():
        return 0
    try:
        state = torch.load(folder / STATE, weights_only=True)
    except Exception as error:
        raise UserError(
            f"{folder / STATE} cannot be read: {first_line(error)}. Remove it to start again"
        ) from error
    vae.load_state_dict(state["vae"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
