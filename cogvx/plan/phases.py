"""A run's phases, each by the code that runs it, on a released or local checkpoint's own configuration at full size.

F frames, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from diffusers.video_processor import VideoProcessor

from cogvx.config import Config
from cogvx.data.encode import EncodedClip, Encoder, latent_moments
from cogvx.data.sources import Example
from cogvx.inference import generate
from cogvx.model import blocks
from cogvx.model.geometry import Geometry, read_config
from cogvx.model.pretrained import PretrainedModel, placed
from cogvx.model.released import NAMES, RELEASED, SCHEDULER, T5_XXL
from cogvx.options import optimizers
from cogvx.options.tracking import Tracking
from cogvx.options.train import Precision
from cogvx.plan.trace import Meter, Recorder, metering, patched, tracing
from cogvx.training.prepare import Prepared
from cogvx.training.step import Batch, Draw
from cogvx.training.trainer import Trainer
from cogvx.training.validation import Videos

CPU = torch.device("cpu")
PHASES = ["encode clips", "encode prompts", "load", "held-out loss", "train", "video"]
STEPS_OF_VIDEO = 1  # traced of validation.num_inference_steps, which are all alike


@dataclass(frozen=True)
class PlannedModel(PretrainedModel):
    """A checkpoint without weights: its parts are built from their configuration, at full size."""

    configs: dict[str, dict] = dataclasses.field(
        default_factory=dict
    )  # transformer, vae, text_encoder
    recorder: Recorder = dataclasses.field(default_factory=Recorder)
    layers: int | None = None  # only so many of the transformer's

    def geometry(self) -> Geometry:
        return Geometry.from_configs(self.configs["transformer"], self.configs["vae"], None)

    def transformer(self, dtype: torch.dtype | None = None):
        from diffusers import CogVideoXTransformer3DModel

        settings = self.configs["transformer"]
        settings = settings | {"num_layers": self.layers or settings["num_layers"]}
        return self.built(lambda: CogVideoXTransformer3DModel(**settings), dtype or self.dtype)

    def vae(self, *, tiling: bool):
        from diffusers import AutoencoderKLCogVideoX

        kinds = {f"{way}_block_types": [f"CogVideoX{way.capitalize()}Block3D"] * len(self.configs["vae"]["block_out_channels"])
                 for way in ("down", "up")}  # fmt: skip
        vae = self.built(lambda: AutoencoderKLCogVideoX(**kinds | self.configs["vae"]), self.dtype)
        blocks.bring(vae, self.device)
        if tiling:
            vae.enable_tiling()
        return vae

    def text_encoder(self, *, streamed: bool = False):
        from transformers import T5Config, T5EncoderModel

        encoder = self.built(
            lambda: T5EncoderModel(T5Config(**self.configs["text_encoder"])), self.dtype
        )
        encoder.encoder.embed_tokens = encoder.shared  # as loading it does
        return None, placed(encoder, self.device, streamed)

    def noise_scheduler(self):
        from diffusers import CogVideoXDDIMScheduler

        return CogVideoXDDIMScheduler(**SCHEDULER)

    def built(self, build, dtype: torch.dtype):
        """On the host, as loading leaves it."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.recorder.putting(on_host=True):
                return torch.nn.Module.to(build(), dtype).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)


def configs_of(config: Config) -> dict[str, dict]:
    """Of a local folder, or of a released checkpoint by its name."""
    folder = Path(config.model.path)
    if (folder / "transformer" / "config.json").is_file():
        found = {part: read_config(folder, part) for part in ("transformer", "vae", "text_encoder")}
        return {
            part: {k: v for k, v in c.items() if not k.startswith("_")} for part, c in found.items()
        }
    transformer, vae, _, _ = RELEASED[NAMES[config.model.path.split("/")[-1]]]
    return {"transformer": transformer, "vae": vae, "text_encoder": T5_XXL}


class MomentsOfEightBits(torch.optim.Optimizer):
    """The memory of an 8-bit Adam: two bytes a weight and two scales for every 256; its kernels cannot run without contents."""

    def __init__(self, parameters, smallest: int = 4096):
        super().__init__(parameters, {"lr": 1e-3})
        self.smallest = smallest

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state, size = self.state[parameter], parameter.numel()
            if not state and size < self.smallest:
                state.update(first=torch.zeros_like(parameter), second=torch.zeros_like(parameter))
            elif not state:
                blocks = -(-size // 256)
                for moment in ("first", "second"):
                    state[moment] = torch.zeros(size, dtype=torch.uint8), torch.zeros(blocks)


@dataclass
class PlannedData(Prepared):
    """Batches without contents."""

    config: Config

    def load_batch(self, clips: list[EncodedClip], prompts: list[str], images: list[int]) -> Batch:
        data, pretrained, geometry = self.config.data, self.pretrained, self.pretrained.geometry()
        frames = (data.max_num_frames - 1) // geometry.temporal_stride + 1
        size = (data.height // geometry.spatial_stride, data.width // geometry.spatial_stride)
        channels, count = 2 * geometry.latent_channels, len(clips)
        width = pretrained.configs["transformer"]["text_embed_dim"]
        zeros = functools.partial(torch.zeros, dtype=pretrained.dtype, device=pretrained.device)
        first = zeros(count, channels, 1, *size) if geometry.image_to_video else None
        return Batch(
            zeros(count, channels, frames, *size), zeros(count, geometry.text_tokens, width), first
        )


def run_phases(
    config: Config,
    phases: list[str],
    *,
    layers: int | None = None,
    begun: bool = True,
    steps: int = 1,
    as_cuda: bool = True,
    fake: bool = True,
    device: torch.device = CPU,
) -> Recorder | Meter:
    """Everything that the phases allocate and compute. fp16 is planned as bf16, whose tensors are as large.

    layers: only so many of the transformer's; begun: the optimizer has its states already; as_cuda, fake: see tracing();
    device: a GPU on which all this really runs, with a Meter in the Recorder's place.
    """
    config = dataclasses.replace(config, tracking=Tracking())  # a plan is no run to track
    precision = Precision.no if config.train.mixed_precision is Precision.no else Precision.bf16
    dtype = getattr(torch, precision.value)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    on_gpu = device.type != "cpu"
    accelerator = Accelerator(mixed_precision=precision.name, cpu=not on_gpu)
    nothing = lambda self, stream, shape: torch.zeros(shape, device=self.device)  # noqa: E731
    with (
        tempfile.TemporaryDirectory() as scratch,
        metering(device) if on_gpu else tracing(as_cuda=as_cuda, fake=fake) as recorder,
        patched(Draw, normal=nothing),
        contextlib.nullcontext() if on_gpu else eight_bits_without_kernels(),
    ):
        pretrained = PlannedModel(Path(), device, dtype, configs_of(config), recorder, layers)
        if "encode clips" in phases:
            encode_clip(config, pretrained, recorder)
        if "encode prompts" in phases:
            encode_prompt(config, pretrained, recorder)
        if set(phases) & {"load", "held-out loss", "train", "video"}:
            with patched(accelerator, print=lambda *texts: None):
                run_training(
                    config, pretrained, accelerator, recorder, Path(scratch), phases, begun, steps
                )
        recorder.begin("end")
    return recorder


@contextlib.contextmanager
def eight_bits_without_kernels() -> Iterator[None]:
    """8-bit optimizers as MomentsOfEightBits."""
    with (
        patched(
            optimizers.Adam8bit, build=lambda self, p: MomentsOfEightBits(p, self.min_8bit_size)
        ),
        patched(
            optimizers.AdamW8bit, build=lambda self, p: MomentsOfEightBits(p, self.min_8bit_size)
        ),
        patched(optimizers.AdamW8bitTorchao, build=lambda self, p: MomentsOfEightBits(p)),
    ):
        yield


def encode_clip(config: Config, pretrained: PlannedModel, recorder: Recorder) -> None:
    recorder.begin("encode clips")
    vae = pretrained.vae(tiling=config.memory.vae_tiling)
    recorder.call(vae.parameters(), "VAE weights")
    data = config.data
    with recorder.putting(on_host=True):
        frames = torch.zeros(data.max_num_frames, 3, data.height, data.width)
    latent_moments(vae, frames, Encoder(None, "", pretrained.dtype, pretrained.device))
    del vae, frames
    recorder.empty_cache()


def encode_prompt(config: Config, pretrained: PlannedModel, recorder: Recorder) -> None:
    recorder.begin("encode prompts")
    _, model = pretrained.text_encoder(streamed=config.memory.stream_text_encoder)
    recorder.call(model.parameters(), "text encoder weights")
    with torch.no_grad():
        model(
            torch.zeros(
                1, pretrained.geometry().text_tokens, dtype=torch.int64, device=pretrained.device
            )
        )
    del model
    recorder.empty_cache()


def run_training(
    config,
    pretrained,
    accelerator,
    recorder: Recorder,
    folder: Path,
    phases: list[str],
    begun: bool,
    steps: int,
) -> None:
    data = config.data
    clip = EncodedClip(
        Example("prompt", Path("clip.mp4"), "plan"), Path(), {"frames": data.max_num_frames}
    )
    clips = [clip] * (config.train.train_batch_size * config.train.gradient_accumulation_steps)
    picture = numpy.zeros((data.height, data.width, 3), numpy.uint8)
    images = {"prompt": picture} if pretrained.geometry().image_to_video else {}
    prepared = PlannedData(pretrained, clips, [clip], {}, ["prompt"], "prompt", images, config)
    recorder.begin("load")
    trainer = Trainer.build(config, folder, accelerator, prepared)
    transformer = trainer.state.transformer
    recorder.call((p for p in transformer.parameters() if not p.requires_grad), "frozen weights")
    recorder.call(trainer.state.parameters, "trained weights")
    if trainer.state.masters is None:
        for parameter in trainer.state.parameters:
            parameter.register_post_accumulate_grad_hook(functools.partial(name_gradient, recorder))
    else:
        recorder.call(trainer.state.masters.copies, "trained weights")
    if (
        config.parallel.num_processes > 1
    ):  # DistributedDataParallel's buckets; it is not built, as its peers are not there
        buckets = [torch.empty_like(parameter) for parameter in trainer.state.parameters]
        recorder.call(buckets, "gradients")
    if "held-out loss" in phases:
        recorder.begin("held-out loss")
        with patched(config.validation, heldout_timesteps=1, heldout_draws=1):
            trainer.heldout_loss()
    if {"train", "video"} & set(
        phases
    ) and begun:  # the states appear with the first step, after its peak
        for parameter in trainer.state.parameters:
            parameter.grad = torch.zeros_like(parameter)
        trainer.state.optimizer.step()
        trainer.state.optimizer.zero_grad()
        recorder.call(states_of(trainer.state.optimizer), "optimizer states")
    if "train" in phases:
        recorder.empty_cache()
        recorder.begin("train")
        for _ in range(steps):
            trainer.optimizer_step()
            recorder.lap()
    if "video" in phases:
        recorder.empty_cache()
        recorder.begin("video")
        width = pretrained.configs["transformer"]["text_embed_dim"]
        embeds = torch.zeros(
            pretrained.geometry().text_tokens,
            width,
            dtype=pretrained.dtype,
            device=pretrained.device,
        )
        videos = Videos(
            folder, config, pretrained, ["prompt"], lambda prompt: embeds, images, {}, []
        )
        vae = pretrained.vae(tiling=config.memory.vae_tiling)
        recorder.call(vae.parameters(), "VAE weights")
        nothing = [numpy.zeros((1, 1, 1, 3))]
        with (
            patched(generate, clear_device_cache=recorder.empty_cache),
            patched(VideoProcessor, postprocess_video=lambda self, **given: nothing),
            patched(config.validation, num_inference_steps=STEPS_OF_VIDEO),
        ):
            videos.generate(transformer, vae, "prompt", 0, "")


def name_gradient(recorder: Recorder | Meter, parameter: torch.nn.Parameter) -> None:
    if parameter.grad is not None:  # it has stepped already with memory.step_in_backward
        recorder.call([parameter.grad], "gradients")


def states_of(optimizer) -> Iterator[torch.Tensor]:
    for state in optimizer.state.values():
        for value in state.values():
            yield from (
                v
                for v in (value if isinstance(value, tuple) else [value])
                if isinstance(v, torch.Tensor)
            )
