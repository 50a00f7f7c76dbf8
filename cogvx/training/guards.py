"""What watches over training: losses by clip and timestep, steps without a finite gradient, and which tensor has which dtype."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from torch import Tensor

from cogvx.errors import UserError, listed

Row = list  # [where the clip was listed, timestep, loss]
AT_FP16_START = (
    24  # steps more that fp16's loss scaling may leave out in a row: it begins at 2^16 and halves
)


@dataclass
class Watch:
    """The losses since the last line of metrics.jsonl, left on the device until that is written."""

    most_skipped: int
    rows: list[Row] = field(default_factory=list)  # read from the device, or of a checkpoint
    unread: list[tuple[list[str], Tensor, Tensor]] = field(
        default_factory=list
    )  # clips, timesteps [B], losses [B]
    unjudged: list[tuple[int, Tensor, int, int]] = field(
        default_factory=list
    )  # step, gradient norm, its rows: from, to
    skipped_in_a_row: int = 0

    def saw(self, clips: list[str], timesteps: Tensor, losses: Tensor) -> None:
        self.unread.append((clips, timesteps, losses.detach()))

    def stepped(self, step: int, grad_norm: Tensor, samples: int) -> None:
        """After the last saw() of an optimizer step. grad_norm: of the gradients averaged over all processes, so all processes
        come to the same answer; samples: of this process in this step."""
        end = len(self.rows) + sum(len(clips) for clips, _, _ in self.unread)
        self.unjudged.append((step, grad_norm, end - samples, end))

    def read(self) -> list[Row]:
        """All rows so far, of this process; waits for the device."""
        for clips, timesteps, losses in self.unread:
            self.rows += [
                list(row) for row in zip(clips, timesteps.tolist(), losses.tolist(), strict=True)
            ]
        self.unread.clear()
        return self.rows

    def everyones(self) -> list[Row]:
        """All rows so far, of all processes."""
        return gather_object(list(self.read()))

    def means(self) -> dict[str, float | int | str]:
        """Mean loss and the highest with its clip and timestep, of all processes; then begins anew."""
        rows = [row for row in self.everyones() if math.isfinite(row[2])]
        self.rows.clear()
        if not rows:
            return {}
        clip, timestep, highest = max(rows, key=lambda row: row[2])
        return {
            "loss": statistics.fmean(row[2] for row in rows),
            "highest_loss": highest,
            "highest_loss_timestep": timestep,
            "highest_loss_clip": clip,
        }

    def left_out(self, *, expected: bool) -> dict[int, list[str]]:
        """The steps since the last call that had no finite gradient, and the clips and timesteps each was made of; waits for the
        device. UserError after most_skipped in a row.

        expected: fp16's loss scaling overshoots now and then, and then lowers its scale; such steps are not named.
        """
        found, most = {}, self.most_skipped + (AT_FP16_START if expected else 0)
        for step, grad_norm, start, end in self.unjudged:
            if bool(grad_norm.isfinite()):
                self.skipped_in_a_row = 0
                continue
            self.skipped_in_a_row += 1
            rows = gather_object(self.read()[start:end])
            named = [f"{clip} at timestep {t}: loss {loss:.4g}" for clip, t, loss in rows]
            if self.skipped_in_a_row >= most:
                headline = (
                    f"{self.skipped_in_a_row} steps in a row had no finite gradient, so nothing is trained any more. Usual causes: "
                    f"optimizer.learning_rate too high, fp16 where bf16 is needed, a damaged base model. The last was made of:"
                )
                raise UserError(listed(headline, named))
            if not expected or not all(math.isfinite(row[2]) for row in rows):
                found[step] = named
        self.unjudged.clear()
        return found


SLOW = 2.0  # times what is expected; the planner's step times are +-35 %


def slow(seconds: float, waited: float, expected: float | None) -> str | None:
    """What to say of steps that take `seconds`, of these `waited` for data, where `expected` were planned; None if all is well."""
    if expected is None or seconds <= SLOW * expected:
        return None
    if waited > 0.5 * seconds:
        cause = f"{waited:.1f} s of it wait for data: put data.cache_dir on a local disk"
    else:
        cause = (
            "usual causes: another process on the same GPU, a hot or power-limited card (nvidia-smi shows both), GPU memory that "
            "spills over into RAM (Windows; choose a lower memory mode), with memory=minimal or low_full a slow bus, train.attention=math"
        )
    return f"a step takes {seconds:.1f} s where the plan for this card says {expected:.1f} s +-35 %; {cause}"


def audit(transformer: torch.nn.Module, arithmetic: torch.dtype) -> dict[str, dict[str, int] | str]:
    """How many weights are in which dtype, frozen and trained. TypeError unless what is trained is fp32."""
    counts = {"trained": Counter(), "frozen": Counter()}
    for parameter in transformer.parameters():
        counts["trained" if parameter.requires_grad else "frozen"][name_of(parameter.dtype)] += (
            parameter.numel()
        )
    if set(counts["trained"]) != {"float32"}:
        raise TypeError(
            f"trained weights are {dict(counts['trained'])}; small updates survive in float32 only"
        )
    return {kind: dict(count) for kind, count in counts.items()} | {
        "arithmetic": name_of(arithmetic),
        "objective": "float32",
    }


def in_words(types: dict) -> str:
    trained, frozen = (
        " + ".join(f"{count / 1e6:.2f} M {dtype}" for dtype, count in types[kind].items()) or "none"
        for kind in ("trained", "frozen")
    )
    return f"trained {trained}, frozen {frozen}; arithmetic {types['arithmetic']}; noise, objective and optimizer float32"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
