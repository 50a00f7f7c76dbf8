"""Our steps beside a plain loop like that of diffusers' example; compiled blocks beside plain.

python tests/benchmarks/speed.py            5 minutes on 2 quiet cores

Every figure is a ratio within one session. The plain loop encodes the caption in every step,
weights the error of x0 by 1 / (1 - alphas_cumprod), and reads the loss after every step. Text
encoders of three sizes stand in for T5-XXL: what caching saves depends on the encoder's share of a
step alone.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(PROJECT)]

import torch  # noqa: E402
from transformers import T5Config, T5EncoderModel  # noqa: E402

from cogvx.compose import compose_config  # noqa: E402
from cogvx.model import nano  # noqa: E402
from cogvx.model.pretrained import PretrainedModel  # noqa: E402
from cogvx.progress import quiet_libraries  # noqa: E402
from cogvx.records import record  # noqa: E402
from cogvx.training.prepare import prepare  # noqa: E402
from cogvx.training.ranks import start_processes  # noqa: E402
from cogvx.training.setup import build_trainer  # noqa: E402
from cogvx.training.trainer import Trainer  # noqa: E402

STEPS, ROUNDS, TOKENS = 30, 5, nano.TEXT_TOKENS
ENCODERS = {
    "nano's, 2 layers of 64": (2, 64, 4),
    "T5-small's, 6 of 512": (6, 512, 8),
    "T5-base's, 12 of 768": (12, 768, 12),
}


def trainer_of(*overrides: str) -> Trainer:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    folder = Path(tempfile.mkdtemp())
    config = compose_config(
        [f"output_dir={folder}", "validation.num_validation_videos=0", *overrides]
    )
    record.open_folder(config)
    ranks = start_processes(config)
    ranks.accelerator.print = lambda *texts: None
    return build_trainer(config, folder, ranks, prepare(config, folder, ranks))


def our_steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.optimizer_step()
        trainer.step += 1


def plain_steps(trainer: Trainer, tokenizer, encoder, count: int) -> None:
    """As examples/cogvideo/train_cogvideox_lora.py of diffusers.

    The latents are in memory; everything else is done in the loop.
    """
    transformer, scheduler = trainer.state.transformer, trainer.data.pretrained.noise_scheduler()
    optimizer = torch.optim.AdamW(trainer.state.parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    factor, width = trainer.model.geometry.scaling_factor, transformer.config.text_embed_dim
    for step in range(count):
        clip = trainer.data.train[step % len(trainer.data.train)]
        moments = trainer.data.load_batch([clip.first], [clip.example.prompt], [0]).latent_moments
        ids = tokenizer(
            [clip.example.prompt],
            padding="max_length",
            max_length=TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            embeds = encoder(ids)[0][..., :width]
        mean, log_variance = moments.chunk(2, dim=1)
        latents = (mean + (0.5 * log_variance).exp() * torch.randn_like(mean)).permute(
            0, 2, 1, 3, 4
        ) * factor
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (1,))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        output = transformer(
            hidden_states=noisy, encoder_hidden_states=embeds, timestep=timesteps, return_dict=False
        )[0]
        predicted = scheduler.get_velocity(output, noisy, timesteps)
        weights = 1 / (1 - scheduler.alphas_cumprod[timesteps])
        while weights.ndim < predicted.ndim:
            weights = weights.unsqueeze(-1)
        loss = (weights * (predicted - latents) ** 2).reshape(1, -1).mean(dim=1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.state.parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.detach().item()


def seconds(work, *arguments) -> float:
    started = time.perf_counter()
    work(*arguments, STEPS)
    return (time.perf_counter() - started) / STEPS


def ratio(one, other) -> str:
    """How many times faster `other` is than `one`: median, lowest and highest of the rounds.

    They are called in turn.
    """
    # The first calls compile and fill caches.
    one(), other()
    ratios = [one() / other() for _ in range(ROUNDS)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    quiet_libraries()
    print(f"{torch.get_num_threads()} threads; {STEPS} steps, {ROUNDS} rounds, in turn\n")
    trainer = trainer_of()
    tokenizer, _ = PretrainedModel(
        trainer.data.pretrained.folder, torch.device("cpu"), torch.float32
    ).text_encoder()
    print("| text encoder beside nano | its share of the plain step | ours beside the plain loop |")
    print("|---|---|---|")
    for name, (layers, width, heads) in ENCODERS.items():
        settings = {
            "d_model": width,
            "d_ff": 4 * width,
            "d_kv": width // heads,
            "num_layers": layers,
            "num_heads": heads,
        }
        encoder = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **settings)
        ).eval()
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)

        def encode(count: int, encoder=encoder, ids=ids) -> None:
            with torch.no_grad():
                for _ in range(count):
                    encoder(ids)

        def plain(encoder=encoder) -> float:
            return seconds(plain_steps, trainer, tokenizer, encoder)

        encode(3)
        share = statistics.median(seconds(encode) / plain() for _ in range(3))
        print(
            f"| {name} | {share:.0%} | {ratio(plain, lambda: seconds(our_steps, trainer))} |",
            flush=True,
        )
    print("\n| compiled beside plain blocks | |\n|---|---|")
    for kind in (
        [],
        ["memory.gradient_checkpointing=true"],
        ["lora=null"],
        ["data.height=128", "data.width=128"],
    ):
        plain_trainer, compiled = trainer_of(*kind), trainer_of(*kind, "train.compile=true")
        faster = ratio(
            lambda t=plain_trainer: seconds(our_steps, t), lambda t=compiled: seconds(our_steps, t)
        )
        print(f"| nano, {' '.join(kind) or 'LoRA'} | {faster} |", flush=True)


if __name__ == "__main__":
    main()
