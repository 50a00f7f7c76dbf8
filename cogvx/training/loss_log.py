"""Losses by clip and timestep, and the steps whose gradient is not finite."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from accelerate.utils import gather_object
from torch import Tensor

from cogvx.errors import UserError, listed

# fp16's loss scale begins at 2^16 and halves, so it may skip this many more steps in a row.
FIRST_SKIPS_OF_FP16 = 24


@dataclass
class LossLog:
    """The losses since the last line of metrics.jsonl.

    They stay on the device until that line is written, so that no step waits for them.
    """

    max_skipped: int  # steps in a row; then the run ends
    rows: list[list] = field(default_factory=list)  # [clip, timestep, loss]
    # Clips, timesteps [B] and losses [B] that are not read from the device yet.
    on_device: list[tuple[list[str], Tensor, Tensor]] = field(default_factory=list)
    # Step, gradient norm, and the step's rows: from, to.
    unchecked: list[tuple[int, Tensor, int, int]] = field(default_factory=list)
    skipped_in_a_row: int = 0

    def add(self, clips: list[str], timesteps: Tensor, losses: Tensor) -> None:
        self.on_device.append((clips, timesteps, losses.detach()))

    def end_step(self, step: int, grad_norm: Tensor, samples: int) -> None:
        """Comes after the last add() of an optimizer step.

        grad_norm is that of the gradients averaged over all processes, so all of them skip the
        same steps. `samples` is the number of this process in this step.
        """
        end = len(self.rows) + sum(len(clips) for clips, _, _ in self.on_device)
        self.unchecked.append((step, grad_norm, end - samples, end))

    def read(self) -> list[list]:
        """This process's rows. Waits for the device."""
        for clips, timesteps, losses in self.on_device:
            rows = zip(clips, timesteps.tolist(), losses.tolist(), strict=True)
            self.rows += [list(row) for row in rows]
        self.on_device.clear()
        return self.rows

    def of_all_processes(self) -> list[list]:
        return gather_object(list(self.read()))

    def means(self) -> dict[str, float | int | str]:
        """The mean loss, and the highest with its clip and timestep. Then starts again."""
        rows = [row for row in self.of_all_processes() if math.isfinite(row[2])]
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

    def skipped(self, *, expected: bool) -> dict[int, list[str]]:
        """The steps since the last call whose gradient was not finite, with their clips.

        Waits for the device. UserError after max_skipped steps in a row. `expected`: fp16's loss
        scaling skips a step now and then to lower its scale; such steps are not returned.
        """
        found, most = {}, self.max_skipped + (FIRST_SKIPS_OF_FP16 if expected else 0)
        for step, grad_norm, start, end in self.unchecked:
            if bool(grad_norm.isfinite()):
                self.skipped_in_a_row = 0
                continue
            self.skipped_in_a_row += 1
            rows = gather_object(self.read()[start:end])
            clips = [f"{clip} at timestep {t}: loss {loss:.4g}" for clip, t, loss in rows]
            if self.skipped_in_a_row >= most:
                raise UserError(listed(self.headline(), clips))
            if not expected or not all(math.isfinite(row[2]) for row in rows):
                found[step] = clips
        self.unchecked.clear()
        return found

    def headline(self) -> str:
        return (
            f"{self.skipped_in_a_row} steps in a row had no finite gradient, so the model does not "
            f"learn any more. Usual causes: optimizer.learning_rate too high, fp16 where bf16 is "
            f"needed, a damaged base model. Clips of the last step:"
        )
