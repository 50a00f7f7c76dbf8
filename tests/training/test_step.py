"""Draws are functions of (seed, epoch, sample), and of nothing else."""

import torch

from cogvx.training.step import Draw, sample_order

CPU = torch.device("cpu")
SHAPE = torch.Size((1, 3, 16, 8, 8))


def noise(seed=0, sample=(0, 0)):
    return Draw(seed, [sample], CPU).noise(torch.empty(SHAPE))


def test_the_same_key_draws_the_same_and_another_draws_other_noise():
    assert torch.equal(noise(), noise())
    for other in (noise(seed=1), noise(sample=(1, 0)), noise(sample=(0, 1))):
        assert torch.corrcoef(torch.stack([noise().flatten(), other.flatten()]))[0, 1].abs() < 0.1


def test_a_sample_draws_the_same_in_any_batch():
    together = Draw(0, [(0, 3), (2, 5)], CPU)
    apart = [Draw(0, [(0, 3)], CPU), Draw(0, [(2, 5)], CPU)]
    latents = torch.empty(2, *SHAPE[1:])
    assert torch.equal(together.noise(latents), torch.cat([draw.noise(latents[:1]) for draw in apart]))
    assert torch.equal(together.timesteps(1000), torch.cat([draw.timesteps(1000) for draw in apart]))
    assert together.drops_caption(0.5) == [draw.drops_caption(0.5)[0] for draw in apart]


def test_kinds_of_draws_do_not_repeat_each_other():
    draw = Draw(0, [(0, 0)], CPU)
    posterior = draw.posterior(torch.zeros(1, 32, 3, 8, 8)).permute(0, 2, 1, 3, 4)
    assert torch.corrcoef(torch.stack([posterior.flatten(), noise().flatten()]))[0, 1].abs() < 0.1


def test_no_global_generator_is_read_or_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = noise()
    torch.manual_seed(7)
    assert torch.equal(first, noise())
    torch.manual_seed(0)
    noise(), sample_order(0, 5, 0, 9)
    assert torch.equal(before, torch.get_rng_state())


def test_timesteps_are_uniform_and_noise_is_standard_normal():
    timesteps = torch.cat([Draw(0, [(epoch, 0)], CPU).timesteps(1000) for epoch in range(4000)])
    assert timesteps.min() < 5 and timesteps.max() > 994
    assert abs(timesteps.float().mean() - 499.5) < 15 and abs(timesteps.float().std() - 288.7) < 8
    assert abs(noise().mean()) < 0.05 and abs(noise().std() - 1) < 0.05


def test_captions_are_dropped_as_often_as_asked():
    dropped = [Draw(0, [(epoch, 1)], CPU).drops_caption(0.1)[0] for epoch in range(5000)]
    assert 0.08 < sum(dropped) / len(dropped) < 0.12
    assert not any(Draw(0, [(epoch, 1)], CPU).drops_caption(0)[0] for epoch in range(100))


def test_every_epoch_has_every_example_once_in_another_order():
    order = sample_order(0, 7, 0, 21)
    epochs = [[index for epoch, index in order if epoch == e] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sample_order(0, 7, 5, 6) == order[5:11], "it can be entered anywhere"
    assert sample_order(1, 7, 0, 7) != order[:7]
