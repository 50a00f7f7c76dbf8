"""What changes while training: trained weights, optimizer states, and an average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvx.errors import UserError, listed
from cogvx.export.result import AVERAGED
from cogvx.model.trained_weights import FullWeights, LoraWeights
from cogvx.options import optimizers
from cogvx.training.on_cpu import Fp32Weights
from cogvx.training.torch_optimizer import unwrapped

OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True)
class TrainingState:
    """`optimizer` and `scaler` are anything with state_dict and load_state_dict.

    `average` is a diffusers EMAModel. `fp32_weights` is set where the transformer only holds
    copies of the trained weights.
    """

    transformer: object
    weights: LoraWeights | FullWeights
    parameters: list[torch.nn.Parameter]  # what the optimizer updates
    optimizer: object
    settings: optimizers.Optimizer  # of conf/optimizer/
    scaler: object | None
    average: object | None
    fp32_weights: Fp32Weights | None = None

    # -- saving and loading ------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        with self.trained_weights():
            self.weights.save(self.transformer, folder)
        if self.delivers_an_average():
            with self.averaged(), self.trained_weights():
                self.weights.save(self.transformer, folder / AVERAGED)
        parts = {"optimizer": self.optimizer, "scaler": self.scaler, "average": self.average}
        states = {name: None if part is None else part.state_dict() for name, part in parts.items()}
        torch.save(states, folder / OPTIMIZER)

    def load(self, folder: Path) -> None:
        with self.trained_weights():
            self.weights.load(self.transformer, folder)
        stored = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        self.load_optimizer(stored["optimizer"])
        if self.scaler is not None and stored["scaler"] is not None:
            self.scaler.load_state_dict(stored["scaler"])
        if self.average is not None:
            self.load_average(stored["average"])

    def load_optimizer(self, stored: dict) -> None:
        """The states are the stored ones, the settings those of this run's configuration."""
        groups = self.optimizer.param_groups
        configured = [{name: group[name] for name in self.settings.configured} for group in groups]
        self.optimizer.load_state_dict(stored)
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)

    def load_average(self, stored: dict | None) -> None:
        """The decay is this run's. Without a stored average, the average begins here."""
        if stored is None:
            copies = [parameter.detach().clone() for parameter in self.parameters]
            self.average.shadow_params = copies
            return
        decay = self.average.decay
        self.average.load_state_dict(stored)
        self.average.to(self.parameters[0].device)
        self.average.decay = decay

    def require_fit(self, folder: Path, trained_with: str) -> None:
        """UserError if a checkpoint is of another model or configuration.

        `trained_with`: the name of its optimizer.
        """
        found = self.differences(folder, values=False)
        if trained_with != self.optimizer_name():
            found.append(
                f"its optimizer is {trained_with}, not {self.optimizer_name()}; "
                f"to start from the weights of a LoRA alone: lora.init_from={folder}"
            )
        if found:
            raise UserError(listed(f"{folder} does not fit this model and these settings:", found))

    def differences(self, folder: Path, *, values: bool) -> list[str]:
        """How saved weights differ from those in memory."""
        with self.trained_weights():
            return self.weights.differences(self.transformer, folder, values=values)

    def require_finite(self, step: int, folder: Path) -> None:
        """UserError if a trained weight is not a number."""
        if all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            return
        raise UserError(
            f"trained weights are not finite after step {step}. "
            f"The checkpoints in {folder} are from before. Usual cause: "
            f"optimizer.learning_rate={self.settings.learning_rate:g} too high"
        )

    def optimizer_name(self) -> str:
        kind = type(unwrapped(self.optimizer))
        return f"{kind.__module__.split('.')[0]} {kind.__name__}"

    # -- which weights the transformer holds -------------------------------------------------

    def trained_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the transformer holds the trained weights in fp32."""
        if self.fp32_weights is None:
            return contextlib.nullcontext()
        return self.fp32_weights.in_the_model()

    def base_model(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the transformer is the base model."""
        return self.weights.base_model(self.transformer)

    def delivers_an_average(self) -> bool:
        return self.average is not None or self.settings.averages_weights

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the transformer holds the weights that are delivered.

        If they are an average, the trained weights are restored afterwards, bit for bit.
        """
        if not self.delivers_an_average():
            yield
            return
        trained = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]
        self.load_averaged()
        self.update_copies()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, trained, strict=True):
                    parameter.copy_(value)
            if self.settings.averages_weights:
                for group in self.optimizer.param_groups:
                    group["train_mode"] = True
            self.update_copies()

    def load_averaged(self) -> None:
        if self.settings.averages_weights:
            unwrapped(self.optimizer).eval()
        else:
            self.average.copy_to(self.parameters)

    def wait_for_gradients(self) -> None:
        """They may be on their way to the CPU. Must come before they are read."""
        if self.fp32_weights is not None:
            self.fp32_weights.gradients.wait()

    def update_copies(self) -> None:
        if self.fp32_weights is not None:
            self.fp32_weights.update_copies()
