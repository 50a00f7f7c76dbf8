"""How training goes: steps, precision, timesteps, checkpoints. Values: conf/config.yaml."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cogvx.files import absolute
from cogvx.hub_upload import repo_id_problems

FP16_WITHOUT_GPU = (
    "train.mixed_precision=fp16 needs a GPU, and none was found on this machine. "
    "On a CPU: train.mixed_precision=bf16, or no for fp32"
)


class Precision(Enum):
    """Precision of frozen weights and arithmetic. Trained weights and the loss are always fp32."""

    # The values are torch's names.
    no = "float32"
    fp16 = "float16"
    bf16 = "bfloat16"


class Timesteps(Enum):
    """How training timesteps are drawn."""

    uniform = "uniform"
    stratified = "stratified"
    logit_normal = "logit_normal"


@dataclass(frozen=True)
class TimestepSampling:
    """uniform, stratified or logit_normal.

    stratified: uniform, and evenly spread over the samples of a batch. CogVideoX (Yang et al. 2024)
    spreads its explicit uniform sampling over processes in the same way. logit_normal: Esser et al.
    2024, Stable Diffusion 3.
    """

    timesteps: Timesteps
    logit_mean: float
    logit_std: float


class Attention(Enum):
    """Kernels for scaled_dot_product_attention: torch's own, and two that need a package.

    auto: the fastest of those that the card runs, measured when the run starts.
    """

    auto = "auto"
    flash = "flash"  # FlashAttention-2
    efficient = "efficient"
    cudnn = "cudnn"
    math = "math"
    fa3 = "fa3"  # FlashAttention-3
    fa4 = "fa4"  # FlashAttention-4

    @property
    def needs_16_bits(self) -> bool:
        return self in (Attention.fa3, Attention.fa4)


# Steps before the profile: they compile, choose kernels and fill the allocator.
PROFILE_AFTER = 4


@dataclass
class Train:
    num_train_epochs: int
    max_train_steps: int | None  # optimizer steps, not micro-batches
    train_batch_size: int  # clips per process and micro-batch
    gradient_accumulation_steps: int
    max_grad_norm: float | None
    mixed_precision: Precision
    caption_dropout: float
    image_dropout: float
    timestep_sampling: Timesteps
    logit_mean: float
    logit_std: float
    min_snr_gamma: float | None
    ema_decay: float | None
    max_skipped_steps: int
    attention: Attention
    deterministic: bool
    compile: bool
    profile_steps: int
    logging_steps: int
    checkpointing_steps: int
    checkpoints_total_limit: int | None
    resume: str | None  # a folder, or auto
    hub_repo_id: str | None
    hub_private: bool
    hub_checkpoints: bool

    def make_paths_absolute(self) -> None:
        if self.resume not in (None, "auto"):
            self.resume = str(absolute(Path(self.resume)))

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
                found.append(f"train.{name}={getattr(self, name)}: must be at least 0 and below 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            found.append(
                f"train.ema_decay={self.ema_decay}: must be between 0 and 1; 0.999 is usual; "
                f"null: no average"
            )
        for name in ("min_snr_gamma", "logit_std"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                found.append(f"train.{name}={getattr(self, name)}: must be above 0")
        if self.attention.needs_16_bits and self.mixed_precision is Precision.no:
            found.append(
                f"train.attention={self.attention.name} computes in 16 bits: "
                f"train.mixed_precision=bf16, or train.attention=auto"
            )
        if self.deterministic and self.attention is Attention.cudnn:
            found.append(
                "train.attention=cudnn with train.deterministic=true, for which torch leaves this "
                "kernel out: train.attention=flash, or auto"
            )
        if self.profile_steps < 0:
            found.append(
                f"train.profile_steps={self.profile_steps}: must be 0 (no profile) or more"
            )
        needed = PROFILE_AFTER + self.profile_steps
        if (
            self.profile_steps > 0
            and self.max_train_steps is not None
            and self.max_train_steps < needed
        ):
            found.append(
                f"train.profile_steps={self.profile_steps} with "
                f"train.max_train_steps={self.max_train_steps}: the profile begins after "
                f"{PROFILE_AFTER} steps, so there must be {needed} or more"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            found.append(
                f"train.max_grad_norm={self.max_grad_norm}: must be above 0; null: no clipping"
            )
        return found + repo_id_problems("train.hub_repo_id", self.hub_repo_id)
