"""Full fine-tuning that steps the optimizer during the backward pass.

Only one gradient exists at a time. LOMO does this for SGD (Lv et al. 2023, Full Parameter
Fine-tuning for Large Language Models with Limited Resources); here it is Adam with its moments.
The gradients never exist together, so they cannot be clipped to a common norm.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from cogvx.training.torch_optimizer import can_skip_on_device


class SteppingInBackward:
    """Steps torch's fused Adam or AdamW for each weight as soon as its gradient is complete."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.squared_norms: list[Tensor] = []  # of this step's gradients
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.register_post_accumulate_grad_hook(self.step_for)

    @torch.no_grad()
    def step_for(self, parameter: torch.nn.Parameter) -> None:
        norm, [group] = parameter.grad.norm(), self.optimizer.param_groups
        # A weight whose gradient is not finite does not change.
        can_skip_on_device(self.optimizer, norm)
        all_parameters, group["params"] = group["params"], [parameter]
        self.optimizer.step()
        group["params"], parameter.grad = all_parameters, None
        self.squared_norms.append(norm.square())

    def grad_norm(self) -> Tensor:
        """The norm of all gradients of the last backward pass."""
        total = torch.stack(self.squared_norms).sum().sqrt()
        self.squared_norms.clear()
        return total
