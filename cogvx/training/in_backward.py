"""Full fine-tuning whose optimizer steps during the backward pass, so that of all the gradients only one exists at a time.

As LOMO does for SGD (Lv et al. 2023, Full Parameter Fine-tuning with Limited Resources), here with Adam and its moments. There is
no moment at which all gradients are known, so they cannot be clipped to a common norm.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from cogvx.training.torch_optimizer import can_skip_on_device


class SteppingInBackward:
    """Steps `optimizer`, torch's fused Adam or AdamW with one group, for each weight when its gradient is complete."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.squares: list[Tensor] = []  # of the norms of this step's gradients
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.register_post_accumulate_grad_hook(self.step_for)

    @torch.no_grad()
    def step_for(self, parameter: torch.nn.Parameter) -> None:
        norm, [group] = parameter.grad.norm(), self.optimizer.param_groups
        # A weight whose gradient is not finite does not change.
        can_skip_on_device(self.optimizer, norm)
        every, group["params"] = group["params"], [parameter]
        self.optimizer.step()
        group["params"], parameter.grad = every, None
        self.squares.append(norm.square())

    def grad_norm(self) -> Tensor:
        """Of all gradients of the backward pass just done."""
        total = torch.stack(self.squares).sum().sqrt()
        self.squares.clear()
        return total
