"""The learning rate of every step is that of diffusers.get_scheduler."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from cogvx.options import schedules
from cogvx.training.order import number_of_steps

CASES = {
    "constant": schedules.Constant(),
    "constant_with_warmup": schedules.ConstantWithWarmup(7),
    "linear": schedules.Linear(7),
    "cosine": schedules.Cosine(7, 0.5),
    "cosine_with_restarts": schedules.CosineWithRestarts(7, 3),
    "polynomial": schedules.Polynomial(7, 2.0, 1e-7),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("peak", [1e-3, 0.5])
def test_every_step_equals_diffusers(name, peak):
    ours, steps = CASES[name], 50
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    cycles = {"cosine_with_restarts": 3}.get(name, 1)
    theirs = get_scheduler(
        name, optimizer, num_warmup_steps=7, num_training_steps=steps, num_cycles=cycles, power=2.0
    )
    for step in range(steps):
        # get_scheduler("cosine", num_cycles=1) ignores num_cycles and goes half a wave, as ours
        # does with 0.5.
        assert peak * ours.multiplier(step, steps, peak) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12
        )
        optimizer.step()
        theirs.step()


def test_no_warmup_starts_at_the_peak():
    assert schedules.Linear(0).multiplier(0, 10, 1e-3) == 1.0


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_processes_has_the_same_rates(compose, name):
    """Four clips per optimizer step, in 1, 2 and 4 processes: the same steps and rates."""
    found = []
    for processes in (1, 2, 4):
        settings = [
            f"scheduler={name}",
            f"train.train_batch_size={4 // processes}",
            "train.num_train_epochs=10",
        ]
        config = compose(*settings, "parallel=ddp", f"parallel.num_processes={processes}")
        steps = number_of_steps(config, clips=70, processes=processes)
        found.append([config.scheduler.multiplier(step, steps, 1e-3) for step in range(steps)])
    assert len(found[0]) == 175 and found[0] == found[1] == found[2]
