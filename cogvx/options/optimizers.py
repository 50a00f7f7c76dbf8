"""The optimizers: one YAML under conf/optimizer/ and one class here each."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cogvx.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer as TorchOptimizer


@dataclass
class Optimizer:
    learning_rate: float  # the peak; the scheduler multiplies it
    package: ClassVar[str] = "torch"  # that holds it

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        raise TypeError(f"{type(self).__name__} has no build()")

    def problems(self) -> list[str]:
        found = (
            []
            if 0 <= self.learning_rate < 100
            else [
                f"optimizer.learning_rate={self.learning_rate}: must be from 0 up to, but not, 100"
            ]
        )
        for name in ("beta1", "beta2", "beta3", "momentum"):
            value = getattr(self, name, None)
            if value is not None and not 0 <= value < 1:
                found.append(f"optimizer.{name}={value}: must be from 0 up to, but not, 1")
        if importlib.util.find_spec(self.package) is None:
            found.append(
                f"this optimizer is in the package {self.package}, which is not installed: pip install {self.package}"
            )
        for name in ("epsilon", "weight_decay"):
            if not 0 <= getattr(self, name, 0) < 100:
                found.append(
                    f"optimizer.{name}={getattr(self, name)}: must be from 0 up to, but not, 100"
                )
        return found

    def warnings(self) -> list[str]:
        """What is allowed and yet seldom meant."""
        return []


@dataclass
class Adam(Optimizer):
    beta1: float
    beta2: float
    epsilon: float

    def settings(self) -> dict:
        return {"lr": self.learning_rate, "betas": (self.beta1, self.beta2), "eps": self.epsilon}

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import torch

        return torch.optim.Adam(parameters, **self.settings(), fused=True)


@dataclass
class AdamW(Adam):
    weight_decay: float

    def settings(self) -> dict:
        return {**super().settings(), "weight_decay": self.weight_decay}

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import torch

        return torch.optim.AdamW(parameters, **self.settings(), fused=True)


@dataclass
class Adam8bit(Adam):
    """bitsandbytes: the moments of tensors of min_8bit_size elements or more take one byte each."""

    min_8bit_size: int
    package: ClassVar[str] = "bitsandbytes"

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import bitsandbytes

        return bitsandbytes.optim.Adam8bit(
            parameters, **self.settings(), min_8bit_size=self.min_8bit_size
        )


@dataclass
class AdamW8bit(AdamW):
    min_8bit_size: int
    package: ClassVar[str] = "bitsandbytes"

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(
            parameters, **self.settings(), min_8bit_size=self.min_8bit_size
        )


@dataclass
class AdamW8bitTorchao(AdamW):
    """torchao: 8-bit moments in plain torch, compiled; the first step of each shape takes seconds."""

    package: ClassVar[str] = "torchao"

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import torch
        import torchao.optim
        from torchao.optim.subclass_8bit import OptimState8bit

        torch.serialization.add_safe_globals(
            [OptimState8bit]
        )  # so that checkpoints load with weights_only
        return torchao.optim.AdamW8bit(parameters, **self.settings())


@dataclass
class Prodigy(AdamW):
    """Estimates the learning rate itself (Mishchenko and Defazio 2023): it is d x learning_rate, both in metrics.jsonl."""

    beta3: float | None
    decouple: bool
    use_bias_correction: bool
    safeguard_warmup: bool
    package: ClassVar[str] = "prodigyopt"

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import prodigyopt

        return prodigyopt.Prodigy(
            parameters,
            **self.settings(),
            beta3=self.beta3,
            decouple=self.decouple,
            use_bias_correction=self.use_bias_correction,
            safeguard_warmup=self.safeguard_warmup,
        )

    def warnings(self) -> list[str]:
        if self.learning_rate >= 0.1:
            return []
        return [
            f"optimizer.learning_rate={self.learning_rate:g}: Prodigy finds the rate itself and multiplies it by this; 0.5 to 1 are "
            f"usual, below 0.1 it hardly moves"
        ]


@dataclass
class ScheduleFree(AdamW):
    """AdamW without a schedule (Defazio et al. 2024, The Road Less Scheduled): judged and delivered is an average of the weights."""

    package: ClassVar[str] = "schedulefree"

    def problems(self) -> list[str]:
        zero = (
            ["optimizer.beta1=0: must be above 0 for schedule_free, which averages by it"]
            if self.beta1 == 0
            else []
        )
        return super().problems() + zero

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import schedulefree

        optimizer = schedulefree.AdamWScheduleFree(parameters, **self.settings())
        optimizer.train()
        return optimizer


@dataclass
class Muon(Optimizer):
    """Orthogonalized momentum (Jordan et al. 2024), for matrices alone, which the weights of a plain LoRA are."""

    momentum: float
    weight_decay: float

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import torch

        if any(parameter.ndim != 2 for parameter in parameters):
            raise UserError(
                "optimizer=muon trains matrices only, and here are other tensors too: it needs a LoRA without lora.use_dora, "
                "on linear layers"
            )
        return torch.optim.Muon(
            parameters,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
        )


def set_learning_rate(optimizer: TorchOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if hasattr(group["lr"], "fill_"):  # torchao keeps it in a tensor
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def leaves_out_by_itself(optimizer: TorchOptimizer, grad_norm: Tensor) -> bool:
    """Tells the optimizer, on its device, to change nothing in a step whose gradient is not finite. False when it cannot be
    told: torch's fused Adam and AdamW can."""
    inner = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapping
    if not getattr(inner, "_step_supports_amp_scaling", False):
        return False
    inner.grad_scale, inner.found_inf = None, (~grad_norm.isfinite()).float()
    return True


def adaptation(optimizer: TorchOptimizer) -> dict[str, float]:
    """Prodigy's estimate d and the rate that comes of it, for the record; nothing for other optimizers."""
    group = optimizer.param_groups[0]
    return (
        {"d": float(group["d"]), "effective_lr": float(group["d"]) * float(group["lr"])}
        if "d" in group
        else {}
    )
