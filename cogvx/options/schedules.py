"""The learning rate of each optimizer step: multiplier(step, steps) of the peak rate.

The curves are those of diffusers.get_scheduler; a test compares every step. Steps count from 0.
The functions have no state: a resumed run, or one with more processes, gets the same values.
"""

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass
class Schedule:
    decays: ClassVar[bool] = False  # the rate falls after the warm-up

    def multiplier(self, step: int, steps: int, peak: float) -> float:
        """Share of the peak learning rate in optimizer step `step` of `steps`."""
        raise TypeError(f"{type(self).__name__} has no multiplier()")

    def problems(self) -> list[str]:
        warmup = getattr(self, "lr_warmup_steps", 0)
        return [f"scheduler.lr_warmup_steps={warmup}: must be 0 or more"] if warmup < 0 else []


@dataclass
class Constant(Schedule):
    def multiplier(self, step: int, steps: int, peak: float) -> float:
        return 1.0


@dataclass
class ConstantWithWarmup(Schedule):
    lr_warmup_steps: int

    def multiplier(self, step: int, steps: int, peak: float) -> float:
        return (
            self.after_warmup(self.progress(step, steps), peak)
            if step >= self.lr_warmup_steps
            else self.warmup(step)
        )

    def warmup(self, step: int) -> float:
        return step / max(1, self.lr_warmup_steps)

    def progress(self, step: int, steps: int) -> float:
        """0 at the end of the warm-up, 1 at the last step."""
        return (step - self.lr_warmup_steps) / max(1, steps - self.lr_warmup_steps)

    def after_warmup(self, progress: float, peak: float) -> float:
        return 1.0


@dataclass
class Linear(ConstantWithWarmup):
    decays: ClassVar[bool] = True

    def after_warmup(self, progress: float, peak: float) -> float:
        return max(0.0, 1.0 - progress)


@dataclass
class Cosine(ConstantWithWarmup):
    lr_num_cycles: float
    decays: ClassVar[bool] = True

    def after_warmup(self, progress: float, peak: float) -> float:
        return max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * self.lr_num_cycles * progress)))


@dataclass
class CosineWithRestarts(ConstantWithWarmup):
    lr_num_cycles: int
    decays: ClassVar[bool] = True

    def after_warmup(self, progress: float, peak: float) -> float:
        if progress >= 1.0:
            return 0.0
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((self.lr_num_cycles * progress) % 1.0))))


@dataclass
class Polynomial(ConstantWithWarmup):
    lr_power: float
    lr_end: float
    decays: ClassVar[bool] = True

    def after_warmup(self, progress: float, peak: float) -> float:
        if peak == 0 or progress >= 1.0:
            return self.lr_end / peak if peak else 0.0
        return ((peak - self.lr_end) * (1.0 - progress) ** self.lr_power + self.lr_end) / peak
