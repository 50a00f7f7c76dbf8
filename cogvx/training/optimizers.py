"""The optimizers: one YAML under conf/optimizer/ and one class here each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer as TorchOptimizer


@dataclass
class Optimizer:
    learning_rate: float  # the peak; the scheduler multiplies it

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        raise TypeError(f"{type(self).__name__} has no build()")

    def problems(self) -> list[str]:
        found = (
            []
            if 0 <= self.learning_rate < 100
            else [f"optimizer.learning_rate={self.learning_rate}: must be 0 or more"]
        )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name, 0) < 1:
                found.append(f"optimizer.{name}={getattr(self, name)}: must be from 0 up to, but not, 1")
        for name in ("epsilon", "weight_decay"):
            if not 0 <= getattr(self, name, 0) < 100:
                found.append(f"optimizer.{name}={getattr(self, name)}: must be 0 or more")
        return found


@dataclass
class Adam(Optimizer):
    beta1: float
    beta2: float
    epsilon: float

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import torch

        return torch.optim.Adam(
            parameters, lr=self.learning_rate, betas=(self.beta1, self.beta2), eps=self.epsilon, fused=True
        )


@dataclass
class AdamW(Optimizer):
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import torch

        return torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            fused=True,
        )
