"""The order of samples is a function of the seed and the place, and of nothing else."""

from collections import Counter

import numpy
import pytest
import torch

from cogvx.training.order import SampleOrder, sample_order
from cogvx.training.step import ORDER

# 40 clips of one size, 7 of another and a single one; a third of them are of another source.
BUCKETS = ["wide"] * 40 + ["tall"] * 7 + ["long"]
SOURCES = ["cats" if clip % 3 else "others" for clip in range(48)]
SHARES = {"cats": 0.7, "others": 0.3}


def order(seed=0, buckets=BUCKETS, sources=None, shares=None, per_step=4) -> SampleOrder:
    sources = [""] * len(buckets) if sources is None else sources
    return sample_order(seed, buckets, sources, shares or {"": 1.0}, per_step)


MIXED = order(sources=SOURCES, shares=SHARES)


@pytest.mark.parametrize("seed", [0, 42, 2**40])
def test_without_buckets_and_sources_it_is_the_order_that_runs_always_had(seed):
    found = order(seed, buckets=[None] * 7, per_step=3).samples(5, 30)
    expected = []
    for place in range(5, 35):
        epoch, position = divmod(place, 7)
        permutation = numpy.random.default_rng((ORDER, seed, epoch)).permutation(7)
        expected.append((epoch, int(permutation[position]), place))
    assert found == expected


def test_seed_0_begins_as_it_did_when_runs_were_first_recorded():
    found = [sample.index for sample in order(0, [None] * 7).samples(0, 14)]
    assert found == [5, 0, 1, 4, 2, 6, 3, 2, 5, 4, 6, 0, 1, 3]


@pytest.mark.parametrize("whole", [order(), MIXED])
def test_all_clips_of_a_step_come_from_one_bucket(whole):
    for step in range(500):
        samples = whole.samples(step * 4, 4)
        assert len({BUCKETS[sample.index] for sample in samples}) == 1


@pytest.mark.parametrize("whole", [order(), MIXED])
def test_it_can_be_entered_anywhere(whole):
    everything = whole.samples(0, 400)
    for start in (1, 4, 111, 399):
        assert whole.samples(start, 400 - start) == everything[start:]
    assert order(1).samples(0, 40) != order().samples(0, 40)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_shares_the_same_steps(processes):
    """As Batches.draw() asks: micro-batches of the processes lie beside each other."""
    per_step, size = 8, 1
    whole = order(sources=SOURCES, shares=SHARES, per_step=per_step)
    micro_steps = per_step // (processes * size)
    for step in range(50):
        parts = [
            whole.samples(((step * micro_steps + micro) * processes + process) * size, size)
            for micro in range(micro_steps)
            for process in range(processes)
        ]
        assert [s for part in parts for s in part] == whole.samples(step * per_step, per_step)


def test_every_group_has_every_clip_once_in_an_epoch_in_another_order():
    samples = MIXED.samples(0, 48 * 40)
    for group in [group for groups in MIXED.buckets for group in groups]:
        uses = [sample for sample in samples if sample.index in group.clips]
        count = len(group.clips)
        epochs = [[s.index for s in uses[e * count : (e + 1) * count]] for e in range(3)]
        assert all(sorted(epoch) == list(group.clips) for epoch in epochs if len(epoch) == count)
        assert count < 4 or epochs[0] != epochs[1]
        assert [s.epoch for s in uses] == [turn // count for turn in range(len(uses))]


def test_every_use_of_a_clip_has_an_epoch_of_its_own():
    """The random numbers of a sample follow its epoch and its clip."""
    keys = [(sample.epoch, sample.index) for sample in MIXED.samples(0, 4000)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_clips_are_used_equally_often_in_the_long_run(seed):
    """48 clips in steps of 4: the single clip of a bucket is used 4 times, every 48 steps."""
    counts = Counter(sample.index for sample in order(seed).samples(0, 48 * 100))
    assert min(counts.values()) >= 96 and max(counts.values()) <= 104


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shares_of_sources_and_buckets_are_exact_at_every_place(seed):
    whole = order(seed, sources=SOURCES, shares=SHARES)
    counts, steps = Counter(), Counter()
    tall = sum(float(group.share) for group in whole.buckets[1])
    for step in range(3000):
        samples = whole.samples(4 * step, 4)
        counts.update(SOURCES[sample.index] for sample in samples)
        steps.update({BUCKETS[samples[0].index]})
        # Four samples more or less, for each of the three buckets.
        assert abs(counts["cats"] - 0.7 * 4 * (step + 1)) <= 12
        assert abs(steps["tall"] - tall * (step + 1)) < 2
    assert whole.turns_of_buckets.counts(3000) == [steps[b] for b in ("wide", "tall", "long")]


def test_shares_need_not_add_up_and_a_source_without_clips_has_none():
    given = {"cats": 7, "others": 3, "all of them damaged": 90}
    assert order(sources=SOURCES, shares=given).samples(0, 300) == MIXED.samples(0, 300)


def test_without_shares_all_clips_of_all_sources_are_used_equally_often():
    whole = sample_order(0, [None] * 48, SOURCES, {}, 4)
    counts = Counter(sample.index for sample in whole.samples(0, 48 * 100))
    assert min(counts.values()) >= 99 and max(counts.values()) <= 101


def test_places_of_a_source_are_spread_evenly():
    one = order(buckets=[None] * 48, sources=SOURCES, shares=SHARES)
    cats = [SOURCES[sample.index] == "cats" for sample in one.samples(0, 2000)]
    tens = [sum(cats[start : start + 10]) for start in range(0, 1990)]
    assert set(tens) == {7}


def test_stratified_timesteps_do_not_follow_the_source():
    from cogvx.training.step import GOLDEN

    one = order(buckets=[None] * 48, sources=SOURCES, shares=SHARES)
    positions = torch.tensor(
        [s.place * GOLDEN % 1 for s in one.samples(0, 3000) if SOURCES[s.index] == "cats"]
    )
    assert abs(positions.mean() - 0.5) < 0.02 and abs(positions.std() - 0.2887) < 0.02
