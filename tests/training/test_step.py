"""Draws are functions of (seed, epoch, sample), and of nothing else."""

import torch

from cogvx.options.train import Timesteps, TimestepSampling
from cogvx.training.step import CAPTION_CHOICE, IMAGE_NOISE, Draw, Sample

CPU = torch.device("cpu")
SHAPE = torch.Size((1, 3, 16, 8, 8))


def noise(seed=0, sample=(0, 0)):
    return Draw(seed, [Sample(*sample, 0)], CPU).noise(torch.empty(SHAPE))


def test_the_same_key_draws_the_same_and_another_draws_other_noise():
    assert torch.equal(noise(), noise())
    for other in (noise(seed=1), noise(sample=(1, 0)), noise(sample=(0, 1))):
        assert torch.corrcoef(torch.stack([noise().flatten(), other.flatten()]))[0, 1].abs() < 0.1


def test_a_sample_draws_the_same_in_any_batch():
    settings = {"device": CPU, "caption_dropout": 0.5, "image_dropout": 0.5}
    one, other = Sample(0, 3, 0), Sample(2, 5, 1)
    together = Draw(0, [one, other], **settings)
    apart = [Draw(0, [one], **settings), Draw(0, [other], **settings)]
    latents = torch.empty(2, *SHAPE[1:])
    assert torch.equal(
        together.noise(latents), torch.cat([draw.noise(latents[:1]) for draw in apart])
    )
    assert torch.equal(
        together.timesteps(1000), torch.cat([draw.timesteps(1000) for draw in apart])
    )
    assert together.drops_caption() == [draw.drops_caption()[0] for draw in apart]


def test_kinds_of_draws_do_not_repeat_each_other():
    draw = Draw(0, [Sample(0, 0, 0)], CPU)
    posterior = draw.posterior(torch.zeros(1, 32, 3, 8, 8)).permute(0, 2, 1, 3, 4)
    assert torch.corrcoef(torch.stack([posterior.flatten(), noise().flatten()]))[0, 1].abs() < 0.1


def test_no_global_generator_is_read_or_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = noise()
    torch.manual_seed(7)
    assert torch.equal(first, noise())
    torch.manual_seed(0)
    noise()
    assert torch.equal(before, torch.get_rng_state())


def test_timesteps_are_uniform_and_noise_is_standard_normal():
    timesteps = torch.cat(
        [Draw(0, [Sample(epoch, 0, epoch)], CPU).timesteps(1000) for epoch in range(4000)]
    )
    assert timesteps.min() < 5 and timesteps.max() > 994
    assert abs(timesteps.float().mean() - 499.5) < 15 and abs(timesteps.float().std() - 288.7) < 8
    assert abs(noise().mean()) < 0.05 and abs(noise().std() - 1) < 0.05


def test_captions_are_dropped_as_often_as_asked():
    dropped = [
        Draw(0, [Sample(epoch, 1, epoch)], CPU, caption_dropout=0.1).drops_caption()[0]
        for epoch in range(5000)
    ]
    assert 0.08 < sum(dropped) / len(dropped) < 0.12
    assert not any(
        Draw(0, [Sample(epoch, 1, epoch)], CPU).drops_caption()[0] for epoch in range(100)
    )


def timesteps(sampling, count=4000, mean=0.0, std=1.0, start=0):
    settings = TimestepSampling(sampling, mean, std)
    draws = (
        Draw(0, [Sample(n // 10, n % 10, n)], CPU, settings) for n in range(start, start + count)
    )
    return torch.cat([draw.timesteps(1000) for draw in draws])


def test_stratified_timesteps_are_uniform_and_evenly_spread_over_any_batch():
    found = timesteps(Timesteps.stratified)
    assert abs(found.float().mean() - 499.5) < 3 and abs(found.float().std() - 288.7) < 3
    for start in (0, 17, 1234):
        batch = timesteps(Timesteps.stratified, count=16, start=start).sort().values
        gaps = batch.diff()
        assert gaps.max() < 130 and gaps.min() > 20, (
            "16 independent timesteps leave gaps of 190 on average"
        )


def test_logit_normal_timesteps_have_the_given_middle_and_width():
    found = timesteps(Timesteps.logit_normal, mean=1.0, std=0.5).float() / 1000
    logits = torch.log(found / (1 - found))
    assert abs(logits.median() - 1.0) < 0.05 and abs(logits.std() - 0.5) < 0.05


def test_every_noisy_image_is_used_before_one_comes_again():
    used = [
        Draw(0, [Sample(epoch, 3, 0)], CPU).choose(IMAGE_NOISE, [range(16)])[0]
        for epoch in range(48)
    ]
    rounds = [used[start : start + 16] for start in (0, 16, 32)]
    assert all(sorted(one) == list(range(16)) for one in rounds) and rounds[0] != rounds[1]
    assert used != [
        Draw(0, [Sample(epoch, 4, 0)], CPU).choose(IMAGE_NOISE, [range(16)])[0]
        for epoch in range(48)
    ]


def test_images_are_dropped_whole_and_as_often_as_asked():
    moments = torch.cat([torch.ones(1, 4, 1, 2, 2), torch.full((1, 4, 1, 2, 2), -30)], dim=1)
    means = [
        Draw(0, [Sample(e, 1, e)], CPU, image_dropout=0.05).image(moments).mean().item()
        for e in range(3000)
    ]
    assert {round(mean) for mean in means} == {0, 1}
    assert 0.035 < means.count(0) / len(means) < 0.065
    assert Draw(0, [Sample(0, 0, 0)], CPU).image(None) is None


def test_the_image_is_sampled_anew_at_every_step():
    moments = torch.zeros(1, 8, 1, 4, 4)
    one, other = (Draw(0, [Sample(epoch, 0, epoch)], CPU).image(moments) for epoch in (0, 1))
    assert (one - other).abs().mean() > 0.5


def test_a_clip_uses_all_of_its_captions_before_one_comes_again():
    draws = [Draw(0, [Sample(epoch, 3, 0)], CPU) for epoch in range(9)]
    used = [draw.choose(CAPTION_CHOICE, [("a", "b", "c")])[0] for draw in draws]
    assert [sorted(used[start : start + 3]) for start in (0, 3, 6)] == [["a", "b", "c"]] * 3
    assert [draw.choose(CAPTION_CHOICE, [("a",)]) for draw in draws] == [["a"]] * 9


def test_the_id_token_is_left_out_in_its_share_of_epochs():
    draws = [Draw(0, [Sample(epoch, 3, 0)] * 2, CPU) for epoch in range(400)]
    left_out = [draw.leaves_out_id_token([0.25, 0.0]) for draw in draws]
    assert 80 < sum(first for first, _ in left_out) < 120
    assert not any(second for _, second in left_out)
