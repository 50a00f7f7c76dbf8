"""What training asks of a torch optimizer, whichever of conf/optimizer/ it is."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        # torchao keeps the rate in a tensor.
        if hasattr(group["lr"], "fill_"):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def can_skip_on_device(optimizer: Optimizer, grad_norm: Tensor) -> bool:
    """Tells the optimizer to change no weight if the gradient norm is not finite.

    The device decides, so the CPU does not wait for it. Returns False if the optimizer has no way
    to be told: of torch's optimizers, the fused Adam and AdamW have one.
    """
    inner = unwrapped(optimizer)
    if not getattr(inner, "_step_supports_amp_scaling", False):
        return False
    inner.grad_scale, inner.found_inf = None, (~grad_norm.isfinite()).float()
    return True


def estimated_rate(optimizer: Optimizer) -> dict[str, float]:
    """Prodigy's estimate d, and the learning rate that results from it."""
    group = optimizer.param_groups[0]
    return {"d": float(group["d"]), "effective_lr": float(group["d"]) * float(group["lr"])}
