"""From the configuration and the prepared data to a Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cogvx.config import Config, as_dict, flat, read
from cogvx.errors import UserError
from cogvx.files import shown
from cogvx.inference import scores
from cogvx.model import attention, blocks, lora
from cogvx.model.cogvideox import CogVideoX
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.trained_weights import FullWeights, LoraWeights, weights_of
from cogvx.model.unread import read_weights
from cogvx.options.validation import Preview
from cogvx.progress import counted
from cogvx.records import record
from cogvx.training import checkpoint as checkpoints
from cogvx.training.batches import Batches
from cogvx.training.dtypes import count_dtypes, dtypes_line
from cogvx.training.in_backward import SteppingInBackward
from cogvx.training.loss_log import LossLog
from cogvx.training.metrics import Metrics
from cogvx.training.on_cpu import Fp32Weights
from cogvx.training.order import number_of_steps, samples_per_step
from cogvx.training.prepare import Prepared
from cogvx.training.previews import Previews
from cogvx.training.ranks import Ranks
from cogvx.training.state import TrainingState
from cogvx.training.timing import StepTimer
from cogvx.training.trainer import Trainer
from cogvx.training.videos import ValidationVideos, VideoGenerator


def build_trainer(
    config: Config,
    folder: Path,
    ranks: Ranks,
    data: Prepared,
    *,
    scored: list[scores.VideoRequest] | None = None,
    source: Path | None = None,
    expected: Callable[[], float | None] = lambda: None,
) -> Trainer:
    """`scored`: videos to score before and after; source: the checkpoint to resume from;
    expected(): the planned seconds per step.
    """
    accelerator, pretrained = ranks.accelerator, data.pretrained
    state, dtypes = load_state(config, pretrained, ranks, resumed=source is not None)
    step, pending = resume_point(config, state, source, ranks)
    steps = number_of_steps(config, len(data.train), ranks.count)
    if step > steps:
        raise UserError(
            f"the checkpoint is at step {step} and train.max_train_steps is {steps}: "
            f"raise it to go on"
        )
    model = CogVideoX(
        accelerator.prepare(state.transformer),
        pretrained.noise_scheduler(),
        pretrained.geometry(),
        device=accelerator.device,
        dtype=pretrained.dtype,
    )
    metrics = None
    if ranks.logs:
        record.note(folder, dtypes=dtypes, steps=steps)
        metrics = metrics_of(config, folder, source, step)
    return Trainer(
        config,
        folder,
        ranks,
        data,
        model,
        state,
        batches=Batches(config, data, ranks),
        losses=LossLog(config.train.max_skipped_steps, rows=pending),
        timer=StepTimer(expected, first_step=step),
        videos=validation_videos(config, folder, data, scored or []),
        previews=previews_of(config, folder, data, model),
        metrics=metrics,
        in_backward=in_backward_of(config, state),
        source=source,
        steps=steps,
        step=step,
    )


def load_state(
    config: Config, pretrained: PretrainedModel, ranks: Ranks, *, resumed: bool
) -> tuple[TrainingState, dict]:
    """The transformer on the device, with what is trained, its optimizer and the dtypes."""
    weights = weights_of(config.lora)
    transformer = weights.attach(pretrained, config.seed)
    lines = [weights.describe(transformer), *([] if resumed else weights.start(transformer))]
    dtypes, fp32_weights = count_dtypes(transformer, pretrained.dtype), None
    if config.memory.offload_optimizer:
        read_weights(transformer, torch.device("cpu"))
        fp32_weights = Fp32Weights(transformer, pretrained.device, pretrained.dtype)
    blocks.arrange(
        transformer,
        config.memory,
        recompute=config.memory.gradient_checkpointing,
        device=pretrained.device,
        compiled=config.train.compile,
    )
    lines += [dtypes_line(dtypes), speed_line(config, transformer, pretrained)]
    lines += [f"warning {warning}" for warning in optimizer_warnings(config, weights)]
    for line in lines:
        ranks.say(line)
    return training_state(config, transformer, weights, fp32_weights, ranks), dtypes


def frozen_variants(
    config: Config,
    pretrained: PretrainedModel,
    ranks: Ranks,
    wanted: list[tuple[Path | None, float]],
) -> Iterator[torch.nn.Module]:
    """For each folder with trained weights and strength its transformer; for None the base model.

    They are arranged as config.memory says, one after the other, and are not trained.
    """

    def arrange(transformer: torch.nn.Module) -> None:
        blocks.arrange(
            transformer,
            config.memory,
            recompute=False,
            device=pretrained.device,
            compiled=config.train.compile,
        )
        # With the autocast of training, the same weights get the same held-out loss as there.
        ranks.accelerator.prepare_model(transformer, device_placement=False, evaluation_mode=True)

    # The base model alone needs no LoRA.
    settings = config.lora if any(place for place, _ in wanted) else None
    return weights_of(settings).variants(pretrained, config.seed, wanted, arrange)


def training_state(
    config: Config,
    transformer: torch.nn.Module,
    weights: LoraWeights | FullWeights,
    fp32_weights: Fp32Weights | None,
    ranks: Ranks,
) -> TrainingState:
    on_cpu = fp32_weights is not None
    parameters = fp32_weights.weights if on_cpu else lora.trainable(transformer)
    optimizer = ranks.accelerator.prepare(
        config.optimizer.build(parameters), device_placement=[not on_cpu]
    )
    if on_cpu:
        optimizer.optimizer.register_step_post_hook(fp32_weights.update_copies)
    return TrainingState(
        transformer,
        weights,
        parameters,
        optimizer,
        config.optimizer,
        scaler=ranks.accelerator.scaler,
        average=average_of(parameters, config.train.ema_decay),
        fp32_weights=fp32_weights,
    )


def average_of(parameters: list[torch.Tensor], decay: float | None):
    """diffusers' EMAModel of the trained weights, or None."""
    if decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=decay)


def in_backward_of(config: Config, state: TrainingState) -> SteppingInBackward | None:
    if not config.memory.step_in_backward:
        return None
    return SteppingInBackward(state.optimizer.optimizer)


def resume_point(
    config: Config, state: TrainingState, source: Path | None, ranks: Ranks
) -> tuple[int, list]:
    """The step to resume after, and this process's losses that were not logged yet."""
    if source is None:
        if config.train.resume == "auto":
            ranks.say("resume  there is no checkpoint yet: starting at step 0")
        return 0, []
    manifest = checkpoints.read_manifest(source)
    state.require_fit(source, manifest["optimizer"])
    ranks.say(f"resume  {shown(source)} after step {manifest['step']}")
    for line in said_of_other_steps(config, source.parent.parent / record.CONFIG):
        ranks.say(line)
    return manifest["step"], manifest["pending"][ranks.index :: ranks.count]


def metrics_of(config: Config, folder: Path, source: Path | None, step: int) -> Metrics:
    settings = config.choices | flat(as_dict(config))
    # A run that starts from another one's checkpoint has no lines of that one.
    is_own = source is not None and source.parent.parent == folder
    logged = step - step % config.train.logging_steps if is_own else 0
    return Metrics(folder, config.tracking, settings, resumed_at=step, logged_until=logged)


def said_of_other_steps(config: Config, recorded: Path) -> list[str]:
    """What cannot be as in the run with this config.yaml, if a step is made up in another way."""
    try:
        before = read(recorded)
    # A checkpoint may have been moved away from its run, or be of another version.
    except UserError:
        return []
    sizes, ways = [], []
    for each in (before, config):
        train, processes = each.train, each.parallel.num_processes
        sizes.append(samples_per_step(train, processes))
        ways.append((processes, train.train_batch_size, train.gradient_accumulation_steps))
    if sizes[0] != sizes[1]:
        return [
            f"warning a step has {counted(sizes[1], 'sample')} now, and had {sizes[0]}: from here "
            f"on its clips, noise and timesteps are others than they would have been"
        ]
    if ways[0] == ways[1]:
        return []
    before, now = (f"{p} x {batch} x {accumulated}" for p, batch, accumulated in ways)
    return [
        f"        the samples of a step are shared out as {now} (processes x batch x accumulation) "
        f"now, and were as {before}: its clips, noise and timesteps are the same, but sums over "
        f"them are rounded otherwise"
    ]


def validation_videos(
    config: Config, folder: Path, data: Prepared, scored: list[scores.VideoRequest]
) -> ValidationVideos:
    return ValidationVideos(
        folder,
        VideoGenerator(config, data.pretrained, data.embeds, data.images),
        data.validation_prompts,
        # Read once: a clip that goes missing later does not end the run.
        functools.cache(functools.partial(data.real_clip, data=config.data)),
        scored,
    )


def previews_of(config: Config, folder: Path, data: Prepared, model: CogVideoX) -> Previews | None:
    if config.validation.preview is Preview.none:
        return None
    return Previews(config, folder, data, model)


def speed_line(config: Config, transformer: torch.nn.Module, pretrained: PretrainedModel) -> str:
    heads, width = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    kernel = attention.in_use(heads, width, pretrained.device, pretrained.dtype)
    compiled = "; blocks compiled by torch" if config.train.compile else ""
    return f"speed   attention by {kernel.name}{compiled}"


def optimizer_warnings(config: Config, weights: LoraWeights | FullWeights) -> list[str]:
    optimizer, scheduler = config.optimizer, config.scheduler
    found = [*optimizer.warnings(), *weights.warnings(optimizer)]
    if optimizer.averages_weights and scheduler.decays:
        found.append(
            f"optimizer={config.choices['optimizer']} is meant for scheduler=constant_with_warmup; "
            f"this run has scheduler={config.choices['scheduler']}"
        )
    return found
