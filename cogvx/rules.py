"""What is wrong between settings that are each allowed: rules over two sections or more.   [no torch]"""

from __future__ import annotations

from cogvx.data import sources
from cogvx.options.memory import Memory, Recompute, Storage
from cogvx.options.optimizers import Optimizer
from cogvx.options.parallel import Parallel
from cogvx.options.train import Attention, Precision, Train


def rules(values: dict[str, object], choices: dict[str, str], *, full: bool) -> list[str]:
    """All that is wrong. `values`: the sections; one with a value of the wrong type is None. `full`:
    lora=null, every weight is trained."""
    return [*between_sections(values), *between_choices(values, choices, full=full)]


def between_sections(values: dict[str, object]) -> list[str]:
    found = []
    for section in values.values():
        own = getattr(section, "problems", None)
        found += own() if own else []
    model, data, scheduler, train, memory = (
        values.get(name) for name in ("model", "data", "scheduler", "train", "memory")
    )
    if model and data:
        found += model.refusals(**asked_of_model(data, train))
    if model and not model.image_to_video:
        for name, section in (
            ("data.image_column", data),
            ("validation.validation_images", values.get("validation")),
        ):
            if getattr(section, name.split(".")[1], None) is not None:
                found.append(
                    f"{name} is for image-to-video, and this is text-to-video: model=5b_i2v, or {name}=null"
                )
    if memory and not memory.gradient_checkpointing:
        for name, used in (
            ("offload_activations", memory.offload_activations), ("stream_weights", memory.stream_weights),
            ("base_storage", memory.base_storage is not Storage.own),
        ):  # fmt: skip
            if used:
                found.append(
                    f"memory.{name} without memory.gradient_checkpointing=true saves nothing: every block's weights and "
                    f"inputs would be kept for the backward pass"
                )
    if (
        memory
        and train
        and memory.gradient_checkpointing
        and memory.recompute is Recompute.selective
    ):
        for name, used in (
            ("compile=true", train.compile),
            ("attention=math", train.attention is Attention.math),
        ):
            if used:
                found.append(
                    f"train.{name} with memory.recompute=selective, which keeps the results of fused attention by watching the "
                    f"operations of a block: memory.recompute=full"
                )
    if memory and train and train.compile and memory.feed_forward_chunks > 1:
        found.append(
            "train.compile=true with memory.feed_forward_chunks above 1: every block would be compiled by itself, and soon none any "
            "more: memory.feed_forward_chunks=1"
        )
    warmup = getattr(scheduler, "lr_warmup_steps", 0)
    if train and train.max_train_steps is not None and 0 < train.max_train_steps <= warmup:
        found.append(
            f"scheduler.lr_warmup_steps={warmup} with train.max_train_steps={train.max_train_steps}: the full learning rate is "
            f"never reached; lower the first (0: no warm-up) or raise the second"
        )
    return found


def between_choices(values: dict[str, object], choices: dict[str, str], *, full: bool) -> list[str]:
    """What is wrong between the options chosen; `full`: lora=null, every weight is trained."""
    found = []
    optimizer, train, memory, parallel = (
        values.get(name) for name in ("optimizer", "train", "memory", "parallel")
    )
    if optimizer and optimizer.averages_weights and train and train.ema_decay is not None:
        found.append(
            f"train.ema_decay with optimizer={choices['optimizer']}, which averages by itself: "
            f"train.ema_decay=null"
        )
    if full and optimizer and optimizer.matrices_only:
        found.append(
            f"optimizer={choices['optimizer']} trains matrices only, and lora=null trains other "
            f"weights too: optimizer=adamw"
        )
    if full and memory and (memory.stream_weights or memory.base_storage is not Storage.own):
        found.append(
            "memory.base_storage and memory.stream_weights are for frozen weights, and lora=null trains all: "
            "memory=balanced or low_full"
        )
    if memory and memory.step_in_backward:
        found += refusals_of_stepping_in_backward(memory, train, parallel, optimizer, full)
    if memory and memory.offload_optimizer:
        if not full:
            found.append("memory.offload_optimizer is for lora=null: what a LoRA trains is small")
        if parallel and parallel.num_processes > 1:
            found.append("memory.offload_optimizer runs in one process: parallel=single")
        if train and train.mixed_precision is Precision.fp16:
            found.append(
                "memory.offload_optimizer has no loss scaling, which fp16 needs: train.mixed_precision=bf16"
            )
    return found


def refusals_of_stepping_in_backward(
    memory: Memory,
    train: Train | None,
    parallel: Parallel | None,
    optimizer: Optimizer | None,
    full: bool,
) -> list[str]:
    """Each weight steps by itself, as soon as its gradient is there: what needs all gradients at once cannot be had."""
    needed = [("lora=null", full)]
    if optimizer:
        needed.append(("optimizer=adam or adamw", optimizer.steps_in_backward))
    needed.append(("memory.offload_optimizer=false", not memory.offload_optimizer))
    if train:
        needed += [
            ("train.max_grad_norm=null", train.max_grad_norm is None),
            ("train.gradient_accumulation_steps=1", train.gradient_accumulation_steps == 1),
            ("train.mixed_precision=bf16 or no", train.mixed_precision is not Precision.fp16),
        ]
    if parallel:
        needed.append(("parallel=single", parallel.num_processes == 1))
    missing = [what for what, there in needed if not there]
    return [f"memory.step_in_backward needs {', '.join(missing)}"] if missing else []


def asked_of_model(data: sources.Data, train: Train | None) -> dict:
    """What decides whether a checkpoint can be trained so, as far as it has the right types."""
    return {
        "frames": data.max_num_frames,
        "height": data.height,
        "width": data.width,
        "precision": train.mixed_precision.name if train else "no",
    }
