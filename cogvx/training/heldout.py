"""The held-out loss: how good the model is now, on clips that it is not trained on."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate.utils import gather_object

from cogvx.config import Config
from cogvx.errors import UserError, first_line
from cogvx.model.cogvideox import CogVideoX
from cogvx.options.validation import Validation
from cogvx.training.out_of_memory import LackElsewhere, forget_frames, lack_of
from cogvx.training.ranks import Ranks
from cogvx.training.step import Batch, FixedDraw, Sample, training_losses
from cogvx.training.stop import REQUESTS, CutShort

# Seeds the held-out noise. It is the same in every run, so that runs can be compared.
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class HeldOutLoss:
    mean: float  # over clips, timesteps and draws of noise
    standard_error: float | None  # of the mean over clips; None for a single clip
    noise_floor: float | None  # standard error over draws of noise; None for a single draw
    by_timestep: dict[int, float]
    by_clip: list[float]  # in the order of the held-out clips: runs can be compared clip by clip
    by_source: dict[str, float] = field(default_factory=dict)  # of data=mix, else empty

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" +- {self.standard_error:.4f}"
        return f"{self.mean:.4f}{error}"

    def for_metrics(self) -> dict[str, object]:
        """The values of a line of metrics.jsonl."""
        return {
            "heldout_loss": self.mean,
            "heldout_standard_error": self.standard_error,
            "heldout_noise_floor": self.noise_floor,
            "heldout_by_timestep": {str(t): loss for t, loss in self.by_timestep.items()},
            "heldout_by_clip": self.by_clip,
            **({"heldout_by_source": self.by_source} if self.by_source else {}),
        }

    def apart(self, sources: Sequence[str]) -> HeldOutLoss:
        """With the mean of each source. sources: of each held-out clip; "" if there are none."""
        losses = defaultdict(list)
        for source, loss in zip(sources, self.by_clip, strict=True):
            losses[source].append(loss)
        found = {source: statistics.fmean(each) for source, each in losses.items() if source}
        return replace(self, by_source=found)


def heldout_loss(
    model: CogVideoX,
    clips: int,
    load: Callable[[int], Batch],
    validation: Validation,
    ranks: Ranks,
) -> HeldOutLoss | None:
    """The training loss at fixed timesteps with fixed noise, without dropout and loss weights.

    The timesteps are the middles of validation.heldout_timesteps equal bands of the schedule, so
    by_timestep is the loss by band. load(index) returns a clip as a batch of one. The processes
    share the clips. Returns None if there are none. CutShort in all processes, if one of them is
    asked to stop.
    """
    if not clips:
        return None
    bands, draws = validation.heldout_timesteps, range(validation.heldout_draws)
    timesteps = [int((k + 0.5) * model.num_timesteps / bands) for k in range(bands)]
    own = range(ranks.index, clips, ranks.count)
    try:
        mine = losses_of_process(model, own, load, timesteps, draws)
    except Exception as error:
        lack = lack_of(error)
        if lack is None or ranks.count == 1:
            raise
        forget_frames(error)
        # The others wait for this process.
        mine = [LackElsewhere(lack, first_line(error))]
    found = gather_object(mine)
    for each in found:
        if isinstance(each, LackElsewhere):
            raise each
    losses = {(index, t, number): loss for index, t, number, loss in found}
    if len(losses) < clips * bands * len(draws):
        raise CutShort(signal.SIGTERM)
    return summarize(losses, range(clips), timesteps, draws)


def losses_of_process(
    model: CogVideoX,
    clips: range,
    load: Callable[[int], Batch],
    timesteps: list[int],
    draws: range,
) -> list[tuple[int, int, int, float]]:
    """(clip, timestep, number of the draw, loss)"""
    on_device = []
    # The others wait for this process's losses, however few they are.
    with torch.no_grad(), contextlib.suppress(CutShort):
        for index in clips:
            batch = load(index)
            for timestep, number in itertools.product(timesteps, draws):
                REQUESTS.cut_short_if_asked()
                draw = fixed_draw(model.device, index, timestep, number)
                losses, _ = training_losses(model, batch, draw)
                on_device.append((index, timestep, number, losses))
    # The losses are read from the device at the end, all together.
    return [(index, t, number, losses.item()) for index, t, number, losses in on_device]


def fixed_draw(device: torch.device, index: int, timestep: int, number: int) -> FixedDraw:
    samples = [Sample(epoch=timestep, index=index, place=0)]
    return FixedDraw(HELD_OUT_SEED + number, samples, device, timestep=timestep)


def summarize(
    losses: dict[tuple[int, int, int], float], clips: range, timesteps: list[int], draws: range
) -> HeldOutLoss:
    """`losses` by (clip, timestep, number of the draw)."""
    mean = statistics.fmean
    by_clip = [mean(losses[i, t, d] for t in timesteps for d in draws) for i in clips]
    by_draw = [mean(losses[i, t, d] for t in timesteps for i in clips) for d in draws]
    return HeldOutLoss(
        mean=mean(by_clip),
        standard_error=standard_error(by_clip),
        noise_floor=standard_error(by_draw),
        by_timestep={t: mean(losses[i, t, d] for i in clips for d in draws) for t in timesteps},
        by_clip=by_clip,
    )


def require_finite(loss: HeldOutLoss, config: Config, folder: Path, step: int | None) -> None:
    """UserError if the loss is not a number. `step`: None for the base model's loss."""
    if math.isfinite(loss.mean):
        return
    if step is None:
        raise UserError(
            f"the base model's held-out loss is {loss.mean}: its weights are damaged, or too "
            f"large for train.mixed_precision={config.train.mixed_precision.name}"
        )
    raise UserError(
        f"the held-out loss is {loss.mean} after step {step}: the weights are spoilt. "
        f"The checkpoints in {folder} are from before. Usual causes: "
        f"optimizer.learning_rate={config.optimizer.learning_rate:g} too high, "
        f"fp16 where bf16 is needed"
    )


def standard_error(values: list[float]) -> float | None:
    """Of the mean. None for fewer than two values, or if one is not finite."""
    finite = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.stdev(values) / len(values) ** 0.5 if finite else None
