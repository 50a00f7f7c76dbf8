"""The optimizers: one YAML under conf/optimizer/ and one class here each.   [no torch at import]"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cogvx.errors import UserError, lacking

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer as TorchOptimizer


@dataclass
class Optimizer:
    """What an optimizer can do is written here, so that no other code asks for its name."""

    learning_rate: float  # the peak; the scheduler multiplies it

    package: ClassVar[str] = "torch"  # where it is implemented
    configured: ClassVar[tuple[str, ...]] = ()  # keys of torch's parameter groups that are set here
    averages_weights: ClassVar[bool] = False  # evaluates and delivers an average of the weights
    matrices_only: ClassVar[bool] = False  # cannot train vectors, such as biases and norms
    finds_its_own_rate: ClassVar[bool] = False  # learning_rate is a factor on its own estimate
    steps_in_backward: ClassVar[bool] = False  # can step each weight during the backward pass

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        raise TypeError(f"{type(self).__name__} has no build()")

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.learning_rate < 100:
            found.append(
                f"optimizer.learning_rate={self.learning_rate}: must be 0 or more, below 100"
            )
        for name in ("beta1", "beta2", "beta3", "momentum"):
            value = getattr(self, name, None)
            if value is not None and not 0 <= value < 1:
                found.append(f"optimizer.{name}={value}: must be 0 or more, below 1")
        for name in ("epsilon", "weight_decay"):
            value = getattr(self, name, 0)
            if not 0 <= value < 100:
                found.append(f"optimizer.{name}={value}: must be 0 or more, below 100")
        return found + lacking(self.package, "this optimizer")

    def warnings(self) -> list[str]:
        """Settings that are allowed but rarely intended."""
        return []


@dataclass
class Adam(Optimizer):
    beta1: float
    beta2: float
    epsilon: float
    configured: ClassVar[tuple[str, ...]] = ("betas", "eps")
    steps_in_backward: ClassVar[bool] = True

    def settings(self) -> dict:
        return {"lr": self.learning_rate, "betas": (self.beta1, self.beta2), "eps": self.epsilon}

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import torch

        return torch.optim.Adam(parameters, **self.settings(), fused=True)


@dataclass
class AdamW(Adam):
    weight_decay: float
    configured: ClassVar[tuple[str, ...]] = ("betas", "eps", "weight_decay")

    def settings(self) -> dict:
        return {**super().settings(), "weight_decay": self.weight_decay}

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import torch

        return torch.optim.AdamW(parameters, **self.settings(), fused=True)


@dataclass
class Adam8bit(Adam):
    """bitsandbytes: one byte for each moment, in tensors of min_8bit_size elements or more."""

    min_8bit_size: int
    package: ClassVar[str] = "bitsandbytes"
    steps_in_backward: ClassVar[bool] = False

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import bitsandbytes

        return bitsandbytes.optim.Adam8bit(
            parameters, **self.settings(), min_8bit_size=self.min_8bit_size
        )


@dataclass
class AdamW8bit(AdamW):
    """bitsandbytes: one byte for each moment, in tensors of min_8bit_size elements or more."""

    min_8bit_size: int
    package: ClassVar[str] = "bitsandbytes"
    steps_in_backward: ClassVar[bool] = False

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(
            parameters, **self.settings(), min_8bit_size=self.min_8bit_size
        )


@dataclass
class AdamW8bitTorchao(AdamW):
    """torchao: 8-bit moments in plain torch, compiled. The first step of a shape takes seconds."""

    package: ClassVar[str] = "torchao"
    steps_in_backward: ClassVar[bool] = False

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import torch
        import torchao.optim
        from torchao.optim.subclass_8bit import OptimState8bit

        # Checkpoints are loaded with weights_only=True, which must know this class.
        torch.serialization.add_safe_globals([OptimState8bit])
        return torchao.optim.AdamW8bit(parameters, **self.settings())


@dataclass
class Prodigy(AdamW):
    """Estimates the learning rate itself (Mishchenko and Defazio 2023).

    The rate in use is d x learning_rate; metrics.jsonl records both d and the product.
    """

    beta3: float | None
    decouple: bool
    use_bias_correction: bool
    safeguard_warmup: bool
    package: ClassVar[str] = "prodigyopt"
    configured: ClassVar[tuple[str, ...]] = (
        *AdamW.configured,
        "beta3",
        "decouple",
        "use_bias_correction",
        "safeguard_warmup",
    )
    finds_its_own_rate: ClassVar[bool] = True
    steps_in_backward: ClassVar[bool] = False

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
            f"optimizer.learning_rate={self.learning_rate:g}: Prodigy finds the rate itself and "
            f"multiplies it by this; 0.5 to 1 are usual, below 0.1 the model hardly learns"
        ]


@dataclass
class ScheduleFree(AdamW):
    """AdamW without a schedule (Defazio et al. 2024, The Road Less Scheduled).

    The weights that are evaluated and delivered are an average of the trained ones.
    """

    package: ClassVar[str] = "schedulefree"
    averages_weights: ClassVar[bool] = True
    steps_in_backward: ClassVar[bool] = False

    def problems(self) -> list[str]:
        found = super().problems()
        if self.beta1 == 0:
            found.append("optimizer.beta1=0: must be above 0; schedule_free averages with it")
        return found

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import schedulefree

        optimizer = schedulefree.AdamWScheduleFree(parameters, **self.settings())
        optimizer.train()
        return optimizer


@dataclass
class Muon(Optimizer):
    """Orthogonalized momentum (Jordan et al. 2024). A plain LoRA has matrices only, so it fits."""

    momentum: float
    weight_decay: float
    configured: ClassVar[tuple[str, ...]] = ("momentum", "weight_decay")
    matrices_only: ClassVar[bool] = True

    def build(self, parameters: list[Parameter]) -> TorchOptimizer:
        import torch

        if any(parameter.ndim != 2 for parameter in parameters):
            raise UserError(
                "optimizer=muon trains matrices only, and this run trains other tensors too: "
                "it needs a LoRA on linear layers, with lora.use_dora=false"
            )
        return torch.optim.Muon(
            parameters,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
        )
