"""Before the first step: processes, checkpoint and data, with everything encoded and the encoders let go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils.memory import clear_device_cache
from safetensors import safe_open

from cogvx.config import Config
from cogvx.data.cache import Cache, content_key
from cogvx.data.encode import (
    EncodedClip,
    Encoder,
    encode_clips,
    encode_images,
    encode_prompts,
    image_of,
)
from cogvx.data.inspect import write_contact_sheet, write_report
from cogvx.data.sources import Data, Example
from cogvx.data.video import BadClip, to_bytes
from cogvx.errors import UserError
from cogvx.files import shown
from cogvx.model.pretrained import PretrainedModel
from cogvx.options.memory import Memory
from cogvx.options.train import Precision
from cogvx.records import record
from cogvx.training.step import Batch, sent
from cogvx.training.validation import given_images, given_prompts


def start_processes(config: Config) -> Accelerator:
    """Accelerate on the devices present, checked to be what was asked for: it falls back silently in several ways."""
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    precision = config.train.mixed_precision
    if precision is Precision.fp16 and not gpu:
        raise UserError(
            "train.mixed_precision=fp16 needs a GPU, and torch sees none on this machine. "
            "On a CPU: train.mixed_precision=bf16, or no for fp32"
        )
    if (
        precision is Precision.bf16
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UserError(
            f"train.mixed_precision=bf16: {torch.cuda.get_device_name()} does not have it; 2B trains in fp16, 5B needs a newer GPU"
        )
    if torch.cuda.is_available() and torch.cuda.device_count() < config.parallel.num_processes:
        raise UserError(
            f"parallel.num_processes={config.parallel.num_processes}: torch sees {torch.cuda.device_count()} GPU(s), and each "
            f"process needs its own"
        )
    # Buffers never change, and sending them would wait for ranks that have no held-out clip to evaluate. The timeout is
    # for the others, while one process downloads, encodes or makes videos.
    settings = [
        DistributedDataParallelKwargs(broadcast_buffers=False),
        InitProcessGroupKwargs(timeout=timedelta(days=1)),
    ]
    accelerator = Accelerator(mixed_precision=precision.name, cpu=not gpu, kwargs_handlers=settings)
    if accelerator.num_processes != config.parallel.num_processes:
        raise UserError(
            f"parallel.num_processes={config.parallel.num_processes}, but accelerate runs {accelerator.num_processes}: "
            f"start it with python launch.py, without torchrun or accelerate launch"
        )
    return accelerator


@dataclass
class Prepared:
    """The data, encoded: nothing of the two encoders is left in memory."""

    pretrained: PretrainedModel
    train: list[EncodedClip]
    held_out: list[EncodedClip]
    prompts: dict[str, Path]  # the cached embedding of every caption, validation prompt and ""
    validation_prompts: list[str]
    example_prompt: str  # to show how the result is used
    images: dict[
        str, numpy.ndarray
    ]  # image-to-video: for these prompts the first frame, [H, W, 3] uint8

    @classmethod
    def from_config(
        cls, config: Config, folder: Path, accelerator: Accelerator, prompts: Iterable[str] = ()
    ) -> Prepared:
        """`prompts`: more that are to be encoded."""
        say, cache = accelerator.print, Cache(config.data.cache_dir)
        validation_prompts = given_prompts(config)
        start_images = given_images(
            config, 1 if validation_prompts is None else len(validation_prompts)
        )
        with (
            accelerator.main_process_first()
        ):  # what it downloads or renders is there for the others
            examples = config.data.read()
            config.data.trained_on(len(examples))  # too few are said before they are encoded
            model_folder = config.model.prepare(**config.asked_of_model())
        pretrained = PretrainedModel(
            model_folder, accelerator.device, getattr(torch, config.train.mixed_precision.value)
        )
        say(f"model   {shown(Path(config.model.path))}, {pretrained.dtype} on {accelerator.device}")

        vae, text = encoders(pretrained, cache, config.memory)
        clips, rejected = encode_clips(examples, config.data, cache, vae, say)
        if pretrained.geometry().image_to_video:
            clips, without_image = encode_images(clips, config.data, cache, vae, say)
            rejected += without_image
        out, used = config.data.held_out(len(clips)), config.data.trained_on(len(clips))
        if accelerator.is_main_process:
            uses = [
                "held out" if aside else "train" if trained else "left out: data.max_train_clips"
                for aside, trained in zip(out, used, strict=True)
            ]
            write_report(folder, clips, uses, rejected)
            write_contact_sheet(folder, clips, uses)
            fingerprint = content_key([fingerprint_of(clip.example, cache) for clip in clips])
            commit = pretrained.hub_commit()
            record.note(
                folder, device=device_name(accelerator.device), processes=accelerator.num_processes,
                model_folder=str(model_folder), model_commit=commit, data_fingerprint=fingerprint,
                model_fingerprint=cache.fingerprint(model_folder) if commit is None else None,  # a commit says it without reading 20 GB
            )  # fmt: skip
            drift = record.drift(folder)
            if drift is not None:
                say(f"warning {drift}")
        train = [clip for clip, trained in zip(clips, used, strict=True) if trained]
        aside = [clip for clip, aside in zip(clips, out, strict=True) if aside]
        describe_clips([*train, *aside], len(train), config, say)
        sheet = shown(folder / "contact_sheet.png")
        say(f"clips   {sheet} shows what the model sees of them, dataset_report.csv says it")
        require_equal_lengths(train, config)
        for frames in sorted({clip.about["frames"] for clip in clips}):
            for caution in pretrained.geometry().cautions(frames):
                say(f"warning {caution}")
        first = (aside or train)[0].example
        if validation_prompts is None:
            validation_prompts = [first.prompt]
        example, images = [*validation_prompts, first.prompt][0], {}
        if pretrained.geometry().image_to_video:
            given = start_images or [None] * len(validation_prompts)
            images[example] = picture(first, config.data)
            for prompt, path in zip(validation_prompts, given, strict=True):
                images[prompt] = picture(
                    first if path is None else replace(first, image=path), config.data
                )
        all_prompts = ["", *(clip.example.prompt for clip in clips), *validation_prompts, *prompts]
        embeds = encode_prompts(all_prompts, cache, text, pretrained.geometry().text_tokens, say)
        clear_device_cache(
            garbage_collection=True
        )  # of the two encoders, which nothing refers to any more
        return cls(pretrained, train, aside, embeds, validation_prompts, example, images)

    def embeds(self, prompt: str) -> torch.Tensor:
        return read_tensor(self.prompts[prompt], "prompt_embeds")

    def load_batch(self, clips: list[EncodedClip], prompts: list[str], images: list[int]) -> Batch:
        """On the device. `images`: which encoding of its image each clip starts from; 0 is without noise."""
        device, image_moments = self.pretrained.device, None
        latents = [read_tensor(clip.path, "latent_moments") for clip in clips]
        if clips[0].image_path is not None:
            rows = [
                read_tensor(c.image_path, "image_moments", row)
                for c, row in zip(clips, images, strict=True)
            ]
            image_moments = sent(torch.stack(rows), device)
        return Batch(
            latent_moments=sent(torch.stack(latents), device),
            prompt_embeds=sent(torch.stack([self.embeds(prompt) for prompt in prompts]), device),
            image_moments=image_moments,
        )

    def held_out_batch(self, index: int) -> Batch:
        clip = self.held_out[index]
        return self.load_batch([clip], [clip.example.prompt], [0])

    def clip_beside(self, prompt: str) -> EncodedClip:
        """The clip whose caption shares most words with the prompt."""
        words = set(prompt.lower().split())
        return max(
            [*self.held_out, *self.train],
            key=lambda clip: len(words & set(clip.example.prompt.lower().split())),
        )


def require_equal_lengths(clips: list[EncodedClip], config: Config) -> None:
    """Clips of a batch are stacked."""
    frames = sorted({clip.about["frames"] for clip in clips})
    if config.train.train_batch_size > 1 and len(frames) > 1:
        shapes = [
            f"{sum(clip.about['frames'] == n for clip in clips)} clips of {n} frames"
            for n in frames
        ]
        raise UserError(
            f"train.train_batch_size={config.train.train_batch_size} needs clips of one length, and there are {', '.join(shapes)}. "
            f"Either train.train_batch_size=1 train.gradient_accumulation_steps={config.train.train_batch_size}, "
            f"or data.max_num_frames={frames[0]}, or data.min_num_frames={frames[-1]} to leave the shorter ones out"
        )


def fingerprint_of(example: Example, cache: Cache) -> list[str]:
    files = [example.video, *([] if example.image is None else [example.image])]
    return [example.prompt, *(cache.fingerprint(path) for path in files)]


def picture(example: Example, data: Data) -> numpy.ndarray:
    """What an image-to-video clip starts from, [H, W, 3] uint8. UserError when the file yields none."""
    try:
        return to_bytes(image_of(example, data))[0]
    except BadClip as bad:
        raise UserError(f"a validation video's {bad}") from bad


def encoders(pretrained: PretrainedModel, cache: Cache, memory: Memory) -> tuple[Encoder, Encoder]:
    """The VAE and the text encoder, not loaded yet."""
    vae, text, tokenizer = (
        cache.fingerprint(pretrained.folder / p) for p in ("vae", "text_encoder", "tokenizer")
    )
    return (
        Encoder(
            lambda: pretrained.vae(tiling=memory.vae_tiling),
            f"{vae} tiling={memory.vae_tiling}",
            pretrained.dtype,
            pretrained.device,
        ),
        Encoder(
            lambda: pretrained.text_encoder(streamed=memory.stream_text_encoder),
            f"{text} {tokenizer}",
            pretrained.dtype,
            pretrained.device,
        ),
    )


def describe_clips(
    clips: list[EncodedClip], train: int, config: Config, say: Callable[[str], None]
) -> None:
    frames = sorted({clip.about["frames"] for clip in clips})
    size = f"{config.data.width}x{config.data.height}"
    lengths = f"{frames[0]}" if len(frames) == 1 else f"{frames[0]} to {frames[-1]}"
    say(
        f"data    {train} clips to train on, {len(clips) - train} held out; {lengths} frames of {size} at {config.data.fps or 'their own'} fps"
    )
    slow = [clip for clip in clips if clip.about["repeated"]]
    if slow:
        say(
            f"warning {len(slow)} clips have a lower frame rate than data.fps={config.data.fps}: some of their frames are used twice "
            f"(dataset_report.csv, column repeated). data.fps={math.floor(min(c.about['file_fps'] for c in slow))} would avoid it"
        )
    if train == len(clips):
        say(
            "warning no clip is held out, so there is no held-out loss: add clips, or set data.validation_fraction"
        )


def read_tensor(path: Path, name: str, row: int | None = None) -> torch.Tensor:
    """A tensor of a file, or one row of it."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name) if row is None else file.get_slice(name)[row]


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )
