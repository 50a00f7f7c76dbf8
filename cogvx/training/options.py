"""The settings of training, validation, memory and processes. Defaults and reasons stand in conf/."""

from dataclasses import dataclass
from enum import Enum


class Precision(Enum):
    """Of the frozen weights and the arithmetic. What is trained, and the objective, are fp32 always."""

    no = "float32"  # torch's names
    fp16 = "float16"
    bf16 = "bfloat16"


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
                "logging_steps",
                "checkpointing_steps",
                "checkpoints_total_limit",
            )
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if not 0 <= self.caption_dropout < 1:
            found.append(f"train.caption_dropout={self.caption_dropout}: must be from 0 up to, but not, 1")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            found.append(f"train.max_grad_norm={self.max_grad_norm}: must be above 0, or null for no clipping")
        return found


@dataclass
class Validation:
    validation_prompt: str | None
    validation_prompt_separator: str
    validation_prompts_file: str | None
    num_validation_videos: int
    validation_steps: int | None
    num_inference_steps: int
    guidance_scale: float
    use_dynamic_cfg: bool
    heldout_steps: int
    heldout_timesteps: int

    def problems(self) -> list[str]:
        found = [
            f"validation.{name}={value}: must be 1 or more"
            for name in ("validation_steps", "num_inference_steps", "heldout_steps", "heldout_timesteps")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if self.num_inference_steps > 1000:
            found.append(
                f"validation.num_inference_steps={self.num_inference_steps}: must be at most 1000; 50 are usual"
            )
        if self.num_validation_videos < 0:
            found.append(f"validation.num_validation_videos={self.num_validation_videos}: must be 0 (none) or more")
        if self.validation_prompt is not None and self.validation_prompts_file is not None:
            found.append(
                "validation.validation_prompt and validation.validation_prompts_file are both set: leave one null"
            )
        if not self.validation_prompt_separator:
            found.append("validation.validation_prompt_separator is empty: the usual one is :::")
        return found


@dataclass
class Memory:
    vae_tiling: bool


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
