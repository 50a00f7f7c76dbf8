"""Runs the phases of a run, each by the code of the run itself, at full size but without weights.

Only the model's configuration is needed: that of a local folder or of a released checkpoint.

F frames, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from diffusers.video_processor import VideoProcessor

from cogvx.config import Config
from cogvx.data.cuts import head
from cogvx.data.encode import EncodedClip, EncodedCut, Encoder, latent_moments
from cogvx.data.prompts import hidden_states, prompts_at_once
from cogvx.data.sharing import READ_AHEAD
from cogvx.data.sources import Example
from cogvx.inference import generate
from cogvx.model import attention, lora
from cogvx.model.geometry import Geometry
from cogvx.model.lean_vae import keep_less
from cogvx.model.offload import stored_parts
from cogvx.model.pretrained import PretrainedModel, placed
from cogvx.model.released import SCHEDULER
from cogvx.model.trained_weights import weights_of
from cogvx.options import optimizers
from cogvx.options.memory import Storage
from cogvx.options.tracking import Tracking
from cogvx.options.train import Attention, Precision
from cogvx.options.validation import Sampler
from cogvx.plan import second_device
from cogvx.plan.configs import configs_of
from cogvx.plan.trace import Meter, Recorder, metering, patched, tracing
from cogvx.training import prepare
from cogvx.training.prepare import Prepared
from cogvx.training.ranks import Ranks
from cogvx.training.setup import build_trainer, frozen_variants
from cogvx.training.state import TrainingState
from cogvx.training.step import Draw, on_device
from cogvx.training.trainer import Trainer
from cogvx.training.videos import VideoGenerator

CPU = torch.device("cpu")
# One of validation.num_inference_steps is traced: all are alike.
STEPS_OF_VIDEO = 1
# So many of the text encoder's blocks are traced. Only the first one computes the position bias.
BLOCKS_OF_T5 = 3


@dataclass(frozen=True)
class PlannedModel(PretrainedModel):
    """A model without weights: its parts are built from their configurations, at full size."""

    # Keys: transformer, vae, text_encoder.
    configs: dict[str, dict] = dataclasses.field(default_factory=dict)
    # How many of the transformer's layers to build. None: all.
    layers: int | None = None
    # Whether the run is in fp16, which is planned as bf16.
    fp16: bool = False

    def geometry(self) -> Geometry:
        return Geometry.from_configs(self.configs["transformer"], self.configs["vae"], None)

    def transformer(self, dtype: torch.dtype | None = None):
        from diffusers import CogVideoXTransformer3DModel

        settings = self.configs["transformer"]
        settings = settings | {"num_layers": self.layers or settings["num_layers"]}
        return self.built(lambda: CogVideoXTransformer3DModel(**settings), dtype or self.dtype)

    def unread_transformer(self, dtype: torch.dtype | None = None):
        return self.transformer(dtype)

    def vae(self, *, tiling: bool):
        from diffusers import AutoencoderKLCogVideoX

        count = len(self.configs["vae"]["block_out_channels"])
        kinds = {
            "down_block_types": ["CogVideoXDownBlock3D"] * count,
            "up_block_types": ["CogVideoXUpBlock3D"] * count,
        }
        vae = self.built(lambda: AutoencoderKLCogVideoX(**kinds | self.configs["vae"]), self.dtype)
        vae.to(self.device)
        keep_less(vae)
        if tiling:
            vae.enable_tiling()
        return vae

    def text_encoder(self, *, streamed: bool = False):
        from transformers import T5Config, T5EncoderModel

        settings = T5Config(**self.configs["text_encoder"])
        encoder = self.built(lambda: T5EncoderModel(settings), self.dtype)
        if self.fp16:
            # transformers leaves these in fp32 when it loads a model in fp16.
            for name, module in encoder.named_modules():
                if name.rpartition(".")[2] in T5EncoderModel._keep_in_fp32_modules:
                    module.float()
        # Loading the weights does the same.
        encoder.encoder.embed_tokens = encoder.shared
        return None, placed(encoder, self.device, streamed)

    def noise_scheduler(self, sampler: Sampler | None = None):
        import diffusers

        return getattr(diffusers, (sampler or Sampler.ddim).value)(**SCHEDULER)

    def built(self, build, dtype: torch.dtype):
        """Builds a model in the CPU's memory.

        A run reads the transformer weight by weight. So the plan has more RAM in its phase "load".
        """
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return torch.nn.Module.to(build(), dtype).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)


class Adam8bitMemory(torch.optim.Optimizer):
    """Has the states of an 8-bit Adam, whose kernels cannot run on tensors without contents.

    For each weight 2 bytes, for every 256 weights 2 scales in fp32. Tensors of fewer weights than
    `smallest` have states of their own dtype.
    """

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
                blocks, device = -(-size // 256), parameter.device
                for moment in ("first", "second"):
                    bytes_each = torch.zeros(size, dtype=torch.uint8, device=device)
                    state[moment] = bytes_each, torch.zeros(blocks, device=device)


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
    """Runs the phases, and returns everything that they allocate and compute.

    layers: how many of the transformer's layers to build; None: all. begun: the optimizer has its
    states already. steps: of training. as_cuda, fake: see tracing(). device: if it is a GPU, the
    phases really run on it, and a Meter is returned.
    """
    with planned_run(config, layers, as_cuda=as_cuda, fake=fake, device=device) as run:
        if "encode clips" in phases:
            encode_clip(run.config, run.pretrained, run.recorder)
        if "encode prompts" in phases:
            encode_prompt(run.config, run.pretrained, run.recorder)
        if "denoise" in phases:
            run_generating(run)
        elif set(phases) & {"load", "held-out loss", "train", "video"}:
            run_training(run, phases, begun, steps)
        run.recorder.begin("end")
    return run.recorder


@dataclass(frozen=True)
class PlannedRun:
    """A run without weights, and what logs its memory."""

    config: Config
    pretrained: PlannedModel
    accelerator: Accelerator
    recorder: Recorder | Meter
    folder: Path

    def trainer(self) -> Trainer:
        prepared = planned_data(self.config, self.pretrained)
        return build_trainer(self.config, self.folder, Ranks(self.accelerator), prepared)


@contextlib.contextmanager
def planned_run(
    config: Config,
    layers: int | None = None,
    *,
    as_cuda: bool = True,
    fake: bool = True,
    device: torch.device = CPU,
) -> Iterator[PlannedRun]:
    """The arguments are those of run_phases()."""
    # Nothing is sent to a tracker.
    config = dataclasses.replace(config, tracking=Tracking())
    # fp16 is planned as bf16: its tensors are as large.
    asked = config.train.mixed_precision
    precision = Precision.no if asked is Precision.no else Precision.bf16
    dtype = getattr(torch, precision.value)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    on_gpu = device.type != "cpu"
    host = None
    if as_cuda and fake and not on_gpu:
        device, host = second_device.device(), "cpu"
    with (
        tempfile.TemporaryDirectory() as scratch,
        accelerated(device, precision) as accelerator,
        metering(device) if on_gpu else tracing(fake=fake, host=host) as recorder,
        patched(Draw, normal=no_noise),
        patched(accelerator, print=lambda *texts: None),
        contextlib.nullcontext() if on_gpu else eight_bits_without_kernels(),
        nf4_without_numbers(config) if host is not None else contextlib.nullcontext(),
        attention.using(config.train.attention) if on_gpu else planned_attention(config),
    ):
        pretrained = PlannedModel(
            Path(), device, dtype, configs_of(config), layers, fp16=asked is Precision.fp16
        )
        read = functools.partial(read_nothing, config, pretrained)
        with patched(prepare, read_tensor=read):
            yield PlannedRun(config, pretrained, accelerator, recorder, Path(scratch))


def planned_attention(config: Config) -> contextlib.AbstractContextManager:
    """A trace has flash attention for every fused kernel. Only math differs."""
    wanted = config.train.attention
    return attention.using(wanted if wanted is Attention.math else Attention.auto)


@contextlib.contextmanager
def accelerated(device: torch.device, precision: Precision) -> Iterator[Accelerator]:
    """accelerate on this device. It does not know the second device by itself."""
    accelerator = Accelerator(mixed_precision=precision.name, cpu=device.type != "cuda")
    shared = [PartialState._shared_state, AcceleratorState._shared_state]
    before = [state["device"] for state in shared]
    for state in shared:
        state["device"] = device
    try:
        yield accelerator
    finally:
        for state, original in zip(shared, before, strict=True):
            state["device"] = original


def no_noise(draw: Draw, stream: int, shape: torch.Size) -> torch.Tensor:
    """Drawing the numbers takes a tenth of the time of a step without contents."""
    return on_device(torch.zeros(shape), draw.device)


@contextlib.contextmanager
def eight_bits_without_kernels() -> Iterator[None]:
    """8-bit optimizers are built as Adam8bitMemory."""

    def of_bitsandbytes(self, parameters) -> Adam8bitMemory:
        return Adam8bitMemory(parameters, self.min_8bit_size)

    def of_torchao(self, parameters) -> Adam8bitMemory:
        return Adam8bitMemory(parameters)

    with (
        patched(optimizers.Adam8bit, build=of_bitsandbytes),
        patched(optimizers.AdamW8bit, build=of_bitsandbytes),
        patched(optimizers.AdamW8bitTorchao, build=of_torchao),
    ):
        yield


@contextlib.contextmanager
def nf4_without_numbers(config: Config) -> Iterator[None]:
    """bitsandbytes copies the 16 levels of nf4 to the device from a list, which has contents."""
    if config.memory.base_storage is not Storage.nf4:
        yield
        return
    import bitsandbytes.functional

    def levels(kind: str, device: torch.device) -> torch.Tensor:
        return torch.empty(16, device=device)

    with patched(bitsandbytes.functional, get_4bit_type=levels):
        yield


def encode_clip(config: Config, pretrained: PlannedModel, recorder: Recorder) -> None:
    recorder.begin("encode clips")
    vae = pretrained.vae(tiling=config.memory.vae_tiling)
    recorder.call(vae.parameters(), "VAE weights")
    data = config.data
    shape = (data.max_num_frames, 3, data.height, data.width)
    clips = [torch.zeros(shape) for _ in range(READ_AHEAD + 1)]
    latent_moments(vae, clips[0], Encoder(None, "", pretrained.dtype, pretrained.device))
    del vae, clips
    give_back(recorder)


def encode_prompt(config: Config, pretrained: PlannedModel, recorder: Recorder) -> None:
    recorder.begin("encode prompts")
    streamed, tokens = config.memory.stream_text_encoder, pretrained.geometry().text_tokens
    _, model = pretrained.text_encoder(streamed=streamed)
    recorder.call(model.parameters(), "text encoder weights")
    encoder = Encoder(None, "", pretrained.dtype, pretrained.device, streamed=streamed)
    shape = (prompts_at_once(model, encoder, tokens), tokens)
    blocks = model.encoder.block
    # All blocks are stored, and take the same memory when they run.
    model.encoder.block = blocks[:BLOCKS_OF_T5]
    hidden_states(model, torch.zeros(shape, dtype=torch.int64, device=pretrained.device))
    recorder.repeat("encode prompts", len(blocks) / BLOCKS_OF_T5)
    del model, blocks
    give_back(recorder)


def give_back(recorder: Recorder | Meter) -> None:
    """What nothing refers to is freed, as accelerate's clear_device_cache() does it."""
    gc.collect()
    recorder.empty_cache()


def run_training(run: PlannedRun, phases: list[str], begun: bool, steps: int) -> None:
    config, recorder = run.config, run.recorder
    recorder.begin("load")
    trainer = run.trainer()
    name_weights(trainer, recorder)
    if config.parallel.num_processes > 1:
        # DistributedDataParallel's buckets. It is not built, because its peers are not there.
        buckets = [torch.empty_like(parameter) for parameter in trainer.state.parameters]
        recorder.call(buckets, "gradients")
    if "held-out loss" in phases:
        recorder.begin("held-out loss")
        with patched(config.validation, heldout_timesteps=1, heldout_draws=1):
            trainer.heldout_loss()
    # The optimizer's states appear in the first step, after its peak.
    if {"train", "video"} & set(phases) and begun:
        give_gradients(trainer.state)
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
        generator, vae = generator_of(run, trainer.data)
        generate_video(run, generator, vae, trainer.state.transformer)


def give_gradients(state: TrainingState) -> None:
    """On the CPU they have a place already."""
    on_cpu = state.fp32_weights
    places = map(torch.zeros_like, state.parameters) if on_cpu is None else on_cpu.gradients.places
    for parameter, place in zip(state.parameters, places, strict=True):
        parameter.grad = place


def run_generating(run: PlannedRun) -> None:
    """Loads the model, with a LoRA if there is one, and makes a video with it."""
    config, recorder = run.config, run.recorder
    recorder.begin("load")
    place = run.folder if weights_of(config.lora).has_strength else None
    # The LoRA's weights are as they are made. Those of a file would take the same memory.
    with patched(lora, load=lambda transformer, folder: None):
        ranks = Ranks(run.accelerator)
        transformers = frozen_variants(config, run.pretrained, ranks, [(place, 1.0)])
        transformer = next(transformers)
    name_frozen(transformer, recorder)
    data = planned_data(config, run.pretrained)
    generator, vae = generator_of(run, data)
    run_alone, encode = generate.vae_alone, vae.encode

    def encode_image(*given, **named):
        recorder.begin("encode image")
        encoded = encode(*given, **named)
        recorder.begin("denoise")
        return encoded

    # A video without a clip to start from runs the VAE alone only to decode.
    def decode(*given):
        recorder.begin("decode")
        video = run_alone(*given)
        # With memory.frugal_videos they are back on the device.
        name_frozen(transformer, recorder)
        return video

    recorder.begin("denoise")
    with (
        patched(vae, encode=encode_image),
        patched(generate, vae_alone=decode),
    ):
        generate_video(run, generator, vae, transformer)


def planned_data(config: Config, pretrained: PlannedModel) -> Prepared:
    """As many clips as one optimizer step needs, and a held-out clip."""
    data, train = config.data, config.train
    pictured = pretrained.geometry().image_to_video
    example = Example("prompt", Path("clip.mp4"), "plan")
    image = Path("image_moments") if pictured else None
    about = {"frames": data.max_num_frames}
    clip = EncodedClip(example, (EncodedCut(head(data), Path("latent_moments"), about, image),))
    clips = [clip] * (train.train_batch_size * train.gradient_accumulation_steps)
    picture = numpy.zeros((data.height, data.width, 3), numpy.uint8)
    images = {"prompt": picture} if pictured else {}
    needed = ("prompt", "", config.validation.negative_prompt)
    prompts = {prompt: Path("prompt_embeds") for prompt in needed}
    return Prepared(pretrained, clips, [clip], prompts, ["prompt"], "prompt", images)


def read_nothing(
    config: Config, pretrained: PlannedModel, path: Path, name: str, row: int | None = None
) -> torch.Tensor:
    """As prepare.read_tensor() reads it from the cache, but without contents."""
    data, geometry = config.data, pretrained.geometry()
    if name == "prompt_embeds":
        shape = (geometry.text_tokens, pretrained.configs["transformer"]["text_embed_dim"])
        return torch.zeros(shape, dtype=pretrained.dtype)
    frames = (data.max_num_frames - 1) // geometry.temporal_stride + 1
    size = (data.height // geometry.spatial_stride, data.width // geometry.spatial_stride)
    shape = (2 * geometry.latent_channels, 1 if name == "image_moments" else frames, *size)
    return torch.zeros(shape, dtype=pretrained.dtype)


def name_weights(trainer: Trainer, recorder: Recorder | Meter) -> None:
    """Tells the recorder what the run's tensors are for."""
    state = trainer.state
    frozen = (weight for weight in state.transformer.parameters() if not weight.requires_grad)
    recorder.call(frozen, "frozen weights")
    recorder.call(state.parameters, "trained weights")
    if state.fp32_weights is not None:
        recorder.call(state.fp32_weights.copies, "trained weights")
        return
    for parameter in state.parameters:
        parameter.register_post_accumulate_grad_hook(functools.partial(name_gradient, recorder))


def name_frozen(transformer: torch.nn.Module, recorder: Recorder | Meter) -> None:
    recorder.call(transformer.parameters(), "frozen weights")
    offloader = getattr(transformer, "offloader", None)
    for weights in [] if offloader is None else offloader.stored:
        recorder.call(stored_parts(weights), "frozen weights")


def generator_of(run: PlannedRun, data: Prepared) -> tuple[VideoGenerator, torch.nn.Module]:
    """What makes videos, and the VAE."""
    generator = VideoGenerator(run.config, run.pretrained, data.embeds, data.images)
    vae = generator.vae()
    run.recorder.call(vae.parameters(), "VAE weights")
    return generator, vae


def generate_video(
    run: PlannedRun, generator: VideoGenerator, vae: torch.nn.Module, transformer: torch.nn.Module
) -> None:
    recorder, nothing = run.recorder, [numpy.zeros((1, 1, 1, 3))]
    with (
        patched(generate, clear_device_cache=recorder.empty_cache),
        patched(VideoProcessor, postprocess_video=lambda self, **given: nothing),
        patched(run.config.validation, num_inference_steps=STEPS_OF_VIDEO),
    ):
        generator.generate(transformer, vae, "prompt", 0, "")


def name_gradient(recorder: Recorder | Meter, parameter: torch.nn.Parameter) -> None:
    # With memory.step_in_backward the gradient is used and gone already.
    if parameter.grad is not None:
        recorder.call([parameter.grad], "gradients")


def states_of(optimizer) -> Iterator[torch.Tensor]:
    for state in optimizer.state.values():
        for value in state.values():
            values = value if isinstance(value, tuple) else [value]
            yield from (each for each in values if isinstance(each, torch.Tensor))
