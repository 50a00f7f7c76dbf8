"""Rules between settings, each of which is allowed by itself.   [no torch]

A rule is a function that returns a sentence for each thing that is wrong: which settings do not go
together, why, and what to type. Rules of one section are in its class: problems().
"""

from __future__ import annotations

from dataclasses import dataclass

from cogvx.data import sources
from cogvx.data.buckets import problems_of_buckets, read_size
from cogvx.data.folder import Folder
from cogvx.data.mix import Mix
from cogvx.data.tables import TableOfClips
from cogvx.model import pretrained
from cogvx.options import optimizers, parallel, schedules, tasks
from cogvx.options.memory import Memory, Recompute, Storage
from cogvx.options.train import Attention, Precision, Train
from cogvx.options.validation import Validation


@dataclass(frozen=True)
class Sections:
    """What a rule may look at."""

    task: tasks.Task
    model: pretrained.Model
    data: sources.Data
    optimizer: optimizers.Optimizer
    scheduler: schedules.Schedule
    train: Train
    validation: Validation
    memory: Memory
    parallel: parallel.Parallel
    choices: dict[str, str]  # the chosen option of each group
    full: bool  # lora=null: every weight is trained


def rules(values: dict[str, object], choices: dict[str, str], *, full: bool) -> list[str]:
    """Everything that is wrong with these sections. None stands for one that is no section."""
    found = []
    for section in values.values():
        found += section.problems() if hasattr(section, "problems") else []
    given = {name: values[name] for name in Sections.__dataclass_fields__ if name in values}
    if None in given.values():
        return found
    sections = Sections(**given, choices=choices, full=full)
    chosen = RULES + (RULES_OF_TRAINING if sections.task.trains else ())
    return found + [problem for rule in chosen for problem in rule(sections)]


def clips_are_given(s: Sections) -> list[str]:
    if not s.task.needs_data or not s.data.needs_root or s.data.instance_data_root is not None:
        return []
    return ["data.instance_data_root must be given: data.instance_data_root=..."]


def training_needs_every_clip(s: Sections) -> list[str]:
    if s.data.shard is None or isinstance(s.task, tasks.EncodeTask):
        return []
    return [
        f"data.shard={s.data.shard} is for task=encode: everything else needs all clips. "
        f"When all parts are encoded: data.shard=null"
    ]


def a_mix_has_sources(s: Sections) -> list[str]:
    if not s.task.needs_data or not isinstance(s.data, Mix) or s.data.sources:
        return []
    return [
        "data=mix needs sources, each under a name: data.sources.new.instance_data_root=/clips "
        "data.sources.old.instance_data_root=/others"
    ]


def captions_have_a_place(s: Sections) -> list[str]:
    if not isinstance(s.task, tasks.CaptionTask) or isinstance(s.data, Folder | TableOfClips):
        return []
    option = s.choices["data"]
    return [
        f"task=caption writes a text file beside each clip, or into a table: data=folder or "
        f"data=table, not data={option}"
    ]


def model_takes_the_clips(s: Sections) -> list[str]:
    """The checkpoint's own limits on frames, sizes and precision."""
    return s.model.refusals(**asked_of_model(s.data, s.train))


def buckets_are_sizes(s: Sections) -> list[str]:
    return problems_of_buckets(s.data)


def images_need_image_to_video(s: Sections) -> list[str]:
    if s.model.image_to_video:
        return []
    given = {
        "data.image_column": s.data.image_column,
        "validation.validation_images": s.validation.validation_images,
    }
    return [
        f"{name} is for image-to-video, and this is text-to-video: model=5b_i2v, or {name}=null"
        for name, value in given.items()
        if value is not None
    ]


def savings_need_gradient_checkpointing(s: Sections) -> list[str]:
    used = {
        "offload_activations": s.memory.offload_activations,
        "stream_weights": s.memory.stream_weights,
        "base_storage": s.memory.base_storage is not Storage.own,
    }
    if s.memory.gradient_checkpointing:
        return []
    return [
        f"memory.{name} without memory.gradient_checkpointing=true saves nothing: the weights and "
        f"inputs of every block would be kept for the backward pass"
        for name, on in used.items()
        if on
    ]


def selective_recompute_needs_plain_blocks(s: Sections) -> list[str]:
    if not s.memory.gradient_checkpointing or s.memory.recompute is not Recompute.selective:
        return []
    used = {"compile=true": s.train.compile, "attention=math": s.train.attention is Attention.math}
    return [
        f"train.{setting} with memory.recompute=selective, which finds the fused attention among "
        f"the operations of a block and keeps its results: memory.recompute=full"
        for setting, on in used.items()
        if on
    ]


def compile_needs_whole_feed_forwards(s: Sections) -> list[str]:
    if not s.train.compile or s.memory.feed_forward_chunks <= 1:
        return []
    return [
        "train.compile=true with memory.feed_forward_chunks above 1: every block would be compiled "
        "by itself, until torch gives up compiling: memory.feed_forward_chunks=1"
    ]


def warmup_ends(s: Sections) -> list[str]:
    warmup, steps = getattr(s.scheduler, "lr_warmup_steps", 0), s.train.max_train_steps
    if steps is None or not 0 < steps <= warmup:
        return []
    return [
        f"scheduler.lr_warmup_steps={warmup} with train.max_train_steps={steps}: the full learning "
        f"rate is never reached. Lower the first (0: no warm-up) or raise the second"
    ]


def weights_are_averaged_once(s: Sections) -> list[str]:
    if s.train.ema_decay is None or not s.optimizer.averages_weights:
        return []
    return [
        f"train.ema_decay with optimizer={s.choices['optimizer']}, which averages by itself: "
        f"train.ema_decay=null"
    ]


def optimizer_takes_every_weight(s: Sections) -> list[str]:
    if not s.full or not s.optimizer.matrices_only:
        return []
    return [
        f"optimizer={s.choices['optimizer']} trains matrices only, and lora=null trains other "
        f"weights too: optimizer=adamw"
    ]


def frozen_weights_are_there(s: Sections) -> list[str]:
    stored_otherwise = s.memory.stream_weights or s.memory.base_storage is not Storage.own
    if not s.full or not stored_otherwise:
        return []
    return [
        "memory.base_storage and memory.stream_weights are for frozen weights, and lora=null "
        "trains every weight: memory=balanced or memory=low_full"
    ]


def optimizer_can_be_offloaded(s: Sections) -> list[str]:
    if not s.memory.offload_optimizer:
        return []
    found = []
    if not s.full:
        found.append("memory.offload_optimizer is for lora=null: a LoRA has few trained weights")
    if s.parallel.num_processes > 1:
        found.append("memory.offload_optimizer runs in one process: parallel=single")
    if s.train.mixed_precision is Precision.fp16:
        found.append(
            "memory.offload_optimizer has no loss scaling, which fp16 needs: "
            "train.mixed_precision=bf16"
        )
    return found


def steps_in_backward_are_possible(s: Sections) -> list[str]:
    """Each weight is changed as soon as its gradient is there, so no gradient can wait."""
    if not s.memory.step_in_backward:
        return []
    needed = {
        "lora=null": s.full,
        "optimizer=adam or adamw": s.optimizer.steps_in_backward,
        "memory.offload_optimizer=false": not s.memory.offload_optimizer,
        "train.max_grad_norm=null": s.train.max_grad_norm is None,
        "train.gradient_accumulation_steps=1": s.train.gradient_accumulation_steps == 1,
        "train.mixed_precision=bf16 or no": s.train.mixed_precision is not Precision.fp16,
        "parallel=single": s.parallel.num_processes == 1,
    }
    missing = [setting for setting, there in needed.items() if not there]
    return [f"memory.step_in_backward needs {', '.join(missing)}"] if missing else []


def videos_are_made_in_one_process(s: Sections) -> list[str]:
    if not isinstance(s.task, tasks.GenerateTask) or s.parallel.num_processes == 1:
        return []
    return ["task=generate runs in one process: parallel=single"]


RULES = (
    clips_are_given,
    a_mix_has_sources,
    training_needs_every_clip,
    captions_have_a_place,
    buckets_are_sizes,
    model_takes_the_clips,
    images_need_image_to_video,
    compile_needs_whole_feed_forwards,
    videos_are_made_in_one_process,
)
# What makes videos only has no use for these settings, and no harm from them.
RULES_OF_TRAINING = (
    savings_need_gradient_checkpointing,
    selective_recompute_needs_plain_blocks,
    warmup_ends,
    weights_are_averaged_once,
    optimizer_takes_every_weight,
    frozen_weights_are_there,
    steps_in_backward_are_possible,
    optimizer_can_be_offloaded,
)


def asked_of_model(data: sources.Data, train: Train) -> dict:
    """The settings that decide whether a checkpoint can be trained, for Model.refusals()."""
    buckets = None
    # What is no size is another rule's.
    if data.buckets is not None:
        given = data.buckets if isinstance(data.buckets, list) else []
        buckets = [size for text in given if (size := read_size(text)) is not None]
    return {
        "frames": data.max_num_frames,
        "height": data.height,
        "width": data.width,
        "precision": train.mixed_precision.name,
        "buckets": buckets,
    }
