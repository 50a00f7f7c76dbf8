"""Which clip is used at each place of a run: the order of samples.

It is a function of the seed and the place. So a resumed run goes on exactly, and it does not
matter how many processes share a step.

The clips of an optimizer step come from one bucket, so that they can be stacked. Each bucket gets
steps in proportion to its clips, as in NovelAI's aspect ratio bucketing
(github.com/NovelAI/novelai-aspect-ratio-bucketing), but evenly spread instead of drawn. Within a
bucket each source gets places in proportion to its share, evenly spread too. The clips of one
source in one bucket are a group. It goes through permutations of its clips without an end: where a
step needs more clips than a permutation has left, it goes on with the next one. So no clip is left
out, and in the long run all clips of a source are used equally often.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy

from cogvx.config import Config
from cogvx.data.encode import EncodedClip
from cogvx.options.train import Train
from cogvx.training.step import ORDER, TURNS, Sample

# Shares are fractions of integers, so that counts of places are exact.
LARGEST_DENOMINATOR = 10**6


@dataclass(frozen=True)
class Turns:
    """An endless sequence of places that several share, as evenly as can be.

    Among two, the first has floor(n * share + start) of the first n places (a mechanical word;
    Lothaire 2002, Algebraic Combinatorics on Words, chapter 2). Among more, the others share the
    places that the first leaves, in the same way. Multiples of the golden ratio would not do: with
    timestep_sampling=stratified these are the timesteps, and each source would see its own.
    """

    # Of all but the last: numerator and denominator of the share of what is left, and the start.
    splits: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, shares: Sequence[Fraction], seed: int) -> Turns:
        """shares: above 0. Another seed begins elsewhere."""
        generator, splits, rest = numpy.random.default_rng((TURNS, seed)), [], sum(shares)
        for share in shares[:-1]:
            part = share / rest
            start = int(generator.random() * part.denominator)
            splits.append((part.numerator, part.denominator, start))
            rest -= share
        return cls(tuple(splits))

    def at(self, place: int) -> tuple[int, int]:
        """Whose place it is, and how many places that one had before."""
        for which, (part, whole, start) in enumerate(self.splits):
            before, after = ((n * part + start) // whole for n in (place, place + 1))
            if after > before:
                return which, before
            place -= before
        return len(self.splits), place

    def counts(self, places: int) -> list[int]:
        """How many of the first `places` places each has."""
        found = []
        for part, whole, start in self.splits:
            found.append((places * part + start) // whole)
            places -= found[-1]
        return [*found, places]


@dataclass(frozen=True)
class Group:
    """The clips of one source in one bucket."""

    number: int
    clips: tuple[int, ...]
    share: Fraction  # of all samples

    def sample(self, seed: int, turn: int, place: int) -> Sample:
        """The one that comes after `turn` others of this group."""
        epoch, position = divmod(turn, len(self.clips))
        chosen = permutation(seed, epoch, self.number, len(self.clips))[position]
        return Sample(epoch, self.clips[chosen], place)


@functools.lru_cache(maxsize=64)
def permutation(seed: int, epoch: int, group: int, count: int) -> numpy.ndarray:
    # Group 0 is the only one without buckets and mixtures, whose order must stay what it was.
    seeds = (ORDER, seed, epoch, *([group] if group else []))
    return numpy.random.default_rng(seeds).permutation(count)


@dataclass(frozen=True)
class SampleOrder:
    """Optimizer step k has the places from k * per_step on."""

    seed: int
    buckets: tuple[tuple[Group, ...], ...]
    per_step: int  # samples of an optimizer step, of all processes together

    def samples(self, start: int, count: int) -> list[Sample]:
        """`count` samples from place `start`."""
        return [self.at(place) for place in range(start, start + count)]

    def at(self, place: int) -> Sample:
        step, position = divmod(place, self.per_step)
        bucket, before = self.turns_of_buckets.at(step)
        which, turn = self.turns_of_groups[bucket].at(before * self.per_step + position)
        return self.buckets[bucket][which].sample(self.seed, turn, place)

    @functools.cached_property
    def turns_of_buckets(self) -> Turns:
        shares = [sum(group.share for group in groups) for groups in self.buckets]
        return Turns.of(shares, self.seed)

    @functools.cached_property
    def turns_of_groups(self) -> list[Turns]:
        """Of each bucket."""
        return [Turns.of([g.share for g in groups], self.seed) for groups in self.buckets]


def sample_order(
    seed: int,
    buckets: Sequence[Hashable],
    sources: Sequence[str],
    shares: dict[str, float],
    per_step: int,
) -> SampleOrder:
    """The order of clips, of which `buckets` and `sources` say to what each belongs.

    shares: of the samples, by source, above 0; they need not add up to 1. Empty: all clips are used
    equally often.
    """
    present = Counter(sources)
    each = {
        source: Fraction((shares or present)[source]).limit_denominator(LARGEST_DENOMINATOR) / clips
        for source, clips in present.items()
    }
    members = defaultdict(lambda: defaultdict(list))
    for clip, (bucket, source) in enumerate(zip(buckets, sources, strict=True)):
        members[bucket][source].append(clip)
    numbers, found = iter(range(len(buckets))), []
    for by_source in members.values():
        groups = (
            Group(next(numbers), tuple(clips), len(clips) * each[source])
            for source, clips in by_source.items()
        )
        found.append(tuple(groups))
    return SampleOrder(seed, tuple(found), per_step)


def order_of(config: Config, clips: list[EncodedClip], processes: int) -> SampleOrder:
    """The order of the clips to train on. Without data.buckets sizes are not told apart."""
    train, mixed = config.train, config.data.buckets is not None
    return sample_order(
        config.seed,
        [clip.size if mixed else None for clip in clips],
        [clip.example.source for clip in clips],
        config.data.shares(),
        samples_per_step(train, processes),
    )


def samples_per_step(train: Train, processes: int) -> int:
    """Of an optimizer step, of all processes together."""
    return train.train_batch_size * train.gradient_accumulation_steps * processes


def number_of_steps(config: Config, clips: int, processes: int) -> int:
    train = config.train
    if train.max_train_steps is not None:
        return train.max_train_steps
    return math.ceil(train.num_train_epochs * clips / samples_per_step(train, processes))
