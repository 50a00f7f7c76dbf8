"""The recipe of model=nano's VAE: moving shapes in any colours, compressed and restored.

B batch, F frames, C channels, H height, W width. Batches are functions of (seed, step), so a stopped run goes on as it would have.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvx.data import world
from cogvx.errors import UserError
from cogvx.files import shown
from cogvx.model import nano
from cogvx.progress import bar

if TYPE_CHECKING:
    from cogvx.config import Config
    from cogvx.options.tasks import NanoVaeTask

SIZE = 64  # pixels of a frame, as nano is used
HELD_OUT, HELD_OUT_SEED = 64, 1  # clips of the world, drawn with a seed that training does not use
STATE, KEPT_EVERY = "state.pt", 500


def train(config: Config, task: NanoVaeTask, folder: Path) -> dict:
    """Trains the VAE and writes folder/vae, text_encoder and tokenizer; returns the run's summary."""
    started = time.monotonic()
    torch.manual_seed(config.seed)
    vae = nano.new_vae().train()
    optimizer = torch.optim.Adam(vae.parameters(), lr=task.learning_rate)
    with bar(
        total=task.steps, initial=resume(folder, vae, optimizer), desc="vae   ", unit="step"
    ) as progress:
        for step in range(progress.n, task.steps):
            loss = one_step(vae, optimizer, task, config.seed, step)
            progress.update()
            if (step + 1) % KEPT_EVERY == 0:
                keep(folder, vae, optimizer, step + 1)
                note(folder, progress, step + 1, loss, judge(vae))
    found = judge(vae)
    vae.register_to_config(scaling_factor=round(1 / found["latent_std"], 4))
    vae.half().save_pretrained(folder / "vae")
    torch.manual_seed(config.seed)
    nano.write_text_encoder(folder)
    (folder / STATE).unlink(missing_ok=True)
    print(
        f"done    {found['psnr']:.2f} dB on {HELD_OUT} clips held out; scaling factor {vae.config.scaling_factor}"
    )
    print(f"result  {shown(folder / 'vae')}")
    return {
        "status": "done",
        "step": task.steps,
        **found,
        "seconds": round(time.monotonic() - started, 1),
    }


def one_step(vae, optimizer, task: NanoVaeTask, seed: int, step: int) -> float:
    """Returns the loss. Crops first, many of them, then whole frames: the last steps have to see the frames' edges."""
    cropped = step < task.steps * (1 - task.share_of_whole_frames)
    size, batch = (task.crop, task.batch) if cropped else (SIZE, max(1, task.batch // 4))
    clips = torch.stack(
        [clip(seed, step, place, size) for place in range(batch)]
    )  # [B, C, F, H, W]
    for group in optimizer.param_groups:
        group["lr"] = task.learning_rate * rate(step / task.steps)
    with torch.autocast("cpu", torch.bfloat16, enabled=task.bf16):
        posterior = vae.encode(clips).latent_dist
        restored = vae.decode(posterior.sample(generator_of(seed, step))).sample.float()
    loss = F.l1_loss(restored, clips) + F.mse_loss(restored, clips) + task.kl_weight * kl(posterior)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), task.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def note(folder: Path, progress, step: int, loss: float, found: dict[str, float]) -> None:
    progress.write(
        f"vae     step {step}: loss {loss:.4f}, {found['psnr']:.2f} dB on clips held out"
    )
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "loss": loss, **found}) + "\n")


def rate(progress: float) -> float:
    """Share of the learning rate: a short warm-up, then a cosine to 5 %."""
    return min(1.0, progress * 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def kl(posterior) -> Tensor:
    """From the posterior to the standard normal, the mean over latents (Kingma and Welling 2013)."""
    return (
        0.5
        * (
            posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()
        ).mean()
    )


def generator_of(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def clip(seed: int, step: int, place: int, size: int) -> Tensor:
    """[3, F, size, size] in [-1, 1]: a shape of any kind and colour going any way, cropped out of SIZE x SIZE."""
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


def judge(vae) -> dict[str, float]:
    """PSNR in dB over clips of the world held out, from the posterior's mean, and the latents' standard deviation."""
    errors, latents = [], []
    with torch.no_grad():
        for scene in world.scenes(HELD_OUT, HELD_OUT_SEED):
            frames = as_input(world.draw_clip(smaller(scene)))[None]
            posterior = vae.encode(frames).latent_dist
            latents.append(posterior.sample(torch.Generator().manual_seed(0)))
            restored = vae.decode(posterior.mean).sample.clamp(-1, 1)
            errors.append(((restored - frames) / 2).square().mean().item())
    return {
        "psnr": float(numpy.mean([10 * math.log10(1 / error) for error in errors])),
        "latent_std": torch.cat(latents).std().item(),
    }


def smaller(scene: world.Scene) -> world.Scene:
    from dataclasses import replace

    return replace(scene, width=SIZE, height=SIZE)


def keep(folder: Path, vae, optimizer, step: int) -> None:
    partial = folder / f"{STATE}.partial"
    torch.save(
        {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial
    )
    partial.replace(folder / STATE)


def resume(folder: Path, vae, optimizer) -> int:
    """The step to go on from."""
    if not (folder / STATE).is_file():
        return 0
    try:
        kept = torch.load(folder / STATE, weights_only=True)
    except Exception as error:
        raise UserError(
            f"{folder / STATE} cannot be read: {error}. Remove it to start again"
        ) from error
    vae.load_state_dict(kept["vae"])
    optimizer.load_state_dict(kept["optimizer"])
    return kept["step"]
