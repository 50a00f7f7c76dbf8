"""The settings of training, validation, memory and processes. Defaults and reasons stand in conf/."""

from dataclasses import dataclass
from enum import Enum

from cogvx.errors import did_you_mean
from cogvx.plan.cards import CARDS


class Precision(Enum):
    """Of the frozen weights and the arithmetic. What is trained, and the objective, are fp32 always."""

    no = "float32"  # torch's names
    fp16 = "float16"
    bf16 = "bfloat16"


class Timesteps(Enum):
    """How training timesteps are drawn."""

    uniform = "uniform"
    stratified = "stratified"
    logit_normal = "logit_normal"


@dataclass(frozen=True)
class TimestepSampling:
    """uniform; or stratified: uniform too, but evenly spread over the samples of a batch, as the explicit uniform sampling of
    CogVideoX (Yang et al. 2024) is over its processes; or logit_normal (Esser et al. 2024, Stable Diffusion 3)."""

    timesteps: Timesteps
    logit_mean: float
    logit_std: float


class Attention(Enum):
    """torch's kernels for scaled_dot_product_attention."""

    auto = "auto"
    flash = "flash"
    efficient = "efficient"
    cudnn = "cudnn"
    math = "math"


PROFILE_AFTER = 4  # steps: the first ones compile, choose kernels and fill the allocator


@dataclass
class Train:
    num_train_epochs: int
    max_train_steps: int | None  # optimizer steps, not micro-batches
    train_batch_size: int  # clips per process and micro-batch
    gradient_accumulation_steps: int
    max_grad_norm: float | None
    mixed_precision: Precision
    gradient_checkpointing: bool
    caption_dropout: float
    image_dropout: float
    timestep_sampling: Timesteps
    logit_mean: float
    logit_std: float
    min_snr_gamma: float | None
    ema_decay: float | None
    max_skipped_steps: int
    attention: Attention
    compile: bool
    profile_steps: int
    logging_steps: int
    checkpointing_steps: int
    checkpoints_total_limit: int | None
    resume: str | None

    def problems(self) -> list[str]:
        found = [
            f"train.{name}={value}: must be 1 or more"
            for name in (
                "num_train_epochs",
                "max_train_steps",
                "train_batch_size",
                "gradient_accumulation_steps",
                "max_skipped_steps",
                "logging_steps",
                "checkpointing_steps",
                "checkpoints_total_limit",
            )
            if (value := getattr(self, name)) is not None and value < 1
        ]
        for name in ("caption_dropout", "image_dropout"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"train.{name}={getattr(self, name)}: must be from 0 up to, but not, 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            found.append(f"train.ema_decay={self.ema_decay}: must be between 0 and 1; 0.999 is usual; null: no average")
        for name in ("min_snr_gamma", "logit_std"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                found.append(f"train.{name}={getattr(self, name)}: must be above 0")
        if self.profile_steps < 0:
            found.append(f"train.profile_steps={self.profile_steps}: must be 0 (none) or more steps to record")
        needed = PROFILE_AFTER + self.profile_steps
        if self.profile_steps > 0 and self.max_train_steps is not None and self.max_train_steps < needed:
            found.append(
                f"train.profile_steps={self.profile_steps} with train.max_train_steps={self.max_train_steps}: recording begins after "
                f"{PROFILE_AFTER} steps, so there must be {needed} or more"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            found.append(f"train.max_grad_norm={self.max_grad_norm}: must be above 0, or null for no clipping")
        return found


@dataclass
class Validation:
    validation_prompt: str | None
    validation_prompt_separator: str
    validation_prompts_file: str | None
    validation_images: str | None
    num_validation_videos: int
    scored_prompts: int
    validation_steps: int | None
    num_inference_steps: int
    guidance_scale: float
    use_dynamic_cfg: bool
    heldout_steps: int
    heldout_timesteps: int
    heldout_draws: int

    def problems(self) -> list[str]:
        found = [
            f"validation.{name}={value}: must be 1 or more"
            for name in (
                "validation_steps",
                "num_inference_steps",
                "heldout_steps",
                "heldout_timesteps",
                "heldout_draws",
            )
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if self.num_inference_steps > 1000:
            found.append(
                f"validation.num_inference_steps={self.num_inference_steps}: must be at most 1000; 50 are usual"
            )
        for name in ("num_validation_videos", "scored_prompts"):
            if getattr(self, name) < 0:
                found.append(f"validation.{name}={getattr(self, name)}: must be 0 (none) or more")
        if self.validation_prompt is not None and self.validation_prompts_file is not None:
            found.append(
                "validation.validation_prompt and validation.validation_prompts_file are both set: leave one null"
            )
        if not self.validation_prompt_separator:
            found.append("validation.validation_prompt_separator is empty: the usual one is :::")
        return found


class Recompute(Enum):
    """What gradient checkpointing computes again in the backward pass."""

    full = "full"
    selective = "selective"  # all but the attention


class Storage(Enum):
    """The form in which the blocks' frozen weights wait; they are computed with in the run's precision."""

    own = "own"
    fp8 = "fp8"
    int8 = "int8"
    nf4 = "nf4"


@dataclass
class Memory:
    vae_tiling: bool
    recompute: Recompute
    offload_activations: bool
    base_storage: Storage
    stream_weights: bool
    stream_text_encoder: bool
    feed_forward_chunks: int
    frugal_videos: bool
    offload_optimizer: bool
    step_in_backward: bool

    def problems(self) -> list[str]:
        found = []
        if self.feed_forward_chunks < 1:
            found.append(f"memory.feed_forward_chunks={self.feed_forward_chunks}: must be 1 (whole) or more")
        return found


@dataclass
class Plan:
    card: str
    measure: bool

    def problems(self) -> list[str]:
        if self.card not in CARDS:
            return [f"plan.card={self.card} is not known{did_you_mean(self.card, CARDS)} Known are {', '.join(CARDS)}"]
        return []


@dataclass
class Parallel:
    num_processes: int

    def problems(self) -> list[str]:
        if self.num_processes < 1:
            return [f"parallel.num_processes={self.num_processes}: must be 1 or more"]
        return []


@dataclass
class Single(Parallel):
    def problems(self) -> list[str]:
        if self.num_processes != 1:
            return [f"parallel.num_processes={self.num_processes} with parallel=single: add parallel=ddp"]
        return []


@dataclass
class DistributedDataParallel(Parallel):
    """One process per device, each with the whole model; gradients are averaged."""
