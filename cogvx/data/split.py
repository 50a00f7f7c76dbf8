"""Which clips are trained on, and which are held out to judge the model.

A hash of a clip's file decides, so clips that come or go move no other. Clips of the same file, and
clips that look alike, stay together in a group: all are trained on, or none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.data.cache import Cache
from cogvx.data.looks import pairs_alike
from cogvx.data.sources import Data
from cogvx.errors import UserError
from cogvx.files import read_json, shown, write_json
from cogvx.progress import counted

if TYPE_CHECKING:
    from cogvx.data.encode import EncodedClip

USED = TRAINED_ON, HELD_OUT = "train", "held out"
LEFT_FROM_TRAINING = "left out: data.max_train_clips"
LEFT_FROM_JUDGING = "left out: data.max_validation_clips"
SPLIT = "split.json"
# Digits of a file's SHA-256 that tell it from others.
SHORT_DIGEST = 16


@dataclass(frozen=True)
class Earlier:
    """What earlier runs did with clips: the first SHORT_DIGEST of the SHA-256 of their files."""

    trained_on: frozenset[str] = frozenset()
    held_out: frozenset[str] = frozenset()
    folders: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Split:
    """For each example, in order."""

    digests: list[str]
    uses: list[str]  # TRAINED_ON, HELD_OUT, LEFT_FROM_TRAINING or LEFT_FROM_JUDGING
    first_alike: list[int | None]  # the first example that looks like it; None: itself
    said: list[str]  # lines that a user should see
    earlier: Earlier

    def places(self, use: str) -> list[int]:
        return [place for place, its in enumerate(self.uses) if its == use]

    def write(self, folder: Path) -> None:
        """For later runs: what this one, and those before it, were trained on."""
        trained_on, held_out = ({self.digests[place] for place in self.places(u)} for u in USED)
        known = {"trained_on": sorted(trained_on | self.earlier.trained_on)}
        write_json(folder / SPLIT, known | {"held_out": sorted(held_out)})


def split_clips(
    digests: list[str],
    data: Data,
    *,
    alike: Iterable[tuple[int, int]] = (),
    earlier: Earlier | None = None,
    sources: Sequence[str] = (),
) -> Split:
    """digests: of the examples' files. alike: places of examples that look alike. sources: of
    data=mix; each holds out a clip at least, if it has two.

    data.validation_fraction says how many are held out, at least one and never all. At most
    data.max_validation_clips are: those with the lowest hash, and as long as a group fits. What an
    earlier run was trained on is never held out. UserError if there are too few.
    """
    earlier = earlier or Earlier()
    digests = [digest[:SHORT_DIGEST] for digest in digests]
    same = first_by_digest(digests)
    like, said = grouped(len(digests), [*same, *alike]), []
    groups = like if data.near_duplicates_together else grouped(len(digests), same)
    if len(groups) == 1 < len(set(digests)):
        groups = grouped(len(digests), same)
        said.append(
            "warning all clips look alike, so near-duplicates of clips that are trained on are "
            "held out: the held-out loss says little about other clips"
        )
    aside = held_out_groups(groups, digests, data, earlier)
    if aside:
        aside = [*of_other_sources(aside, groups, digests, data, earlier, sources), *aside]
    uses = [TRAINED_ON] * len(digests)
    for number, place in enumerate(place for group in aside for place in group):
        uses[place] = HELD_OUT if number < data.max_validation_clips else LEFT_FROM_JUDGING
    leave_out_of_training(uses, digests, data)
    said += said_of_earlier(uses, digests, data, earlier)
    first_alike = [None] * len(digests)
    for first, *others in like:
        for place in others:
            first_alike[place] = first
    return Split(digests, uses, first_alike, said, earlier)


def split_of(
    clips: Sequence[EncodedClip], data: Data, cache: Cache, earlier: Earlier | None = None
) -> Split:
    """What each clip is used for."""
    digests = [cache.fingerprint(clip.example.video) for clip in clips]
    alike = pairs_alike([clip.look() for clip in clips])
    if data.shard is not None:
        # max_train_clips counts the clips of all parts.
        data = replace(data, max_train_clips=None)
    sources = [clip.example.source for clip in clips]
    return split_clips(digests, data, alike=alike, earlier=earlier, sources=sources)


def held_out_groups(
    groups: list[list[int]], digests: list[str], data: Data, earlier: Earlier
) -> list[list[int]]:
    if data.validation_fraction == 0 or len(groups) == 1:
        return []

    def rank(group: list[int]) -> tuple[bool, float]:
        before = not earlier.held_out.isdisjoint(digests[place] for place in group)
        return not before, draw_of(group, digests, data)

    free = [
        group
        for group in groups
        if earlier.trained_on.isdisjoint(digests[place] for place in group)
    ]
    free.sort(key=rank)
    drawn = [group for group in free if draw_of(group, digests, data) < data.validation_fraction]
    chosen, count = [], 0
    for group in drawn or free[:1]:
        if count + len(group) <= data.max_validation_clips:
            chosen.append(group)
            count += len(group)
    # A single group may be larger than all that may be judged.
    chosen = chosen or (drawn or free)[:1]
    return chosen[:-1] if len(chosen) == len(groups) else chosen


def of_other_sources(
    aside: list[list[int]],
    groups: list[list[int]],
    digests: list[str],
    data: Data,
    earlier: Earlier,
    sources: Sequence[str],
) -> list[list[int]]:
    """Of each source that holds out no clip: what it would hold out if it were alone."""
    found = []
    for source in dict.fromkeys(sources):
        own = [group for group in groups if {sources[place] for place in group} == {source}]
        if not any(group in aside for group in own):
            found += held_out_groups(own, digests, data, earlier)[:1] if own else []
    return found


def draw_of(group: list[int], digests: list[str], data: Data) -> float:
    """From 0 to 1, by the lowest digest: the other clips of a group do not change its chance."""
    return uniform("held out", min(digests[place] for place in group), data.validation_seed)


def leave_out_of_training(uses: list[str], digests: list[str], data: Data) -> None:
    """A larger data.max_train_clips keeps the clips of a smaller one."""
    left = [place for place, use in enumerate(uses) if use == TRAINED_ON]
    wanted = data.max_train_clips
    if wanted is None:
        return
    if wanted > len(left):
        raise UserError(
            f"data.max_train_clips={wanted}, but only {counted(len(left), 'clip')} can be "
            f"trained on, the others are held out: give {len(left)} or fewer"
        )
    seen, order = {}, {}
    for place in left:
        # The examples of one file do not follow each other.
        number = seen[digests[place]] = seen.get(digests[place], -1) + 1
        order[place] = uniform("train", digests[place], number, data.validation_seed)
    for place in sorted(left, key=order.get)[wanted:]:
        uses[place] = LEFT_FROM_TRAINING


def uniform(*parts: object) -> float:
    """A number from 0 to 1, below 1. It depends on the parts alone."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def first_by_digest(digests: list[str]) -> list[tuple[int, int]]:
    first = {}
    return [(first.setdefault(digest, place), place) for place, digest in enumerate(digests)]


def grouped(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The numbers below `count`, those that the pairs link together in one group."""
    first = list(range(count))

    def root(place: int) -> int:
        while first[place] != place:
            first[place] = first[first[place]]
            place = first[place]
        return place

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        first[high] = low
    groups = {}
    for place in range(count):
        groups.setdefault(root(place), []).append(place)
    return list(groups.values())


# -- earlier runs --------------------------------------------------------------------------------


def earlier_split(folders: Iterable[Path], cache: Cache) -> Earlier:
    """What the runs with these folders did with clips. A folder of no run adds nothing."""
    trained_on, held_out, found = set(), set(), []
    for folder in dict.fromkeys(folders):
        split = read_json(folder / SPLIT) or split_of_report(folder, cache)
        if split:
            trained_on |= {*split["trained_on"]}
            held_out |= {*split["held_out"]}
            found.append(folder)
    return Earlier(frozenset(trained_on), frozenset(held_out - trained_on), tuple(found))


def split_of_report(folder: Path, cache: Cache) -> dict[str, list[str]]:
    """Runs of earlier versions have no SPLIT. Their clips may still be where they were."""
    import csv

    report, found = folder / "dataset_report.csv", {"trained_on": [], "held_out": []}
    if not report.is_file() or not (folder / "metrics.jsonl").is_file():
        return {}
    with report.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            kind = {TRAINED_ON: "trained_on", HELD_OUT: "held_out"}.get(row["use"])
            if kind and Path(row["video"]).is_file():
                found[kind].append(cache.fingerprint(Path(row["video"]))[:SHORT_DIGEST])
    return found


def run_around(place: Path) -> Path | None:
    """The run's folder that holds `place`: its result, a checkpoint, or a file of one."""
    around = [place, *place.parents][:4]
    return next((folder for folder in around if (folder / "config.yaml").is_file()), None)


def said_of_earlier(uses: list[str], digests: list[str], data: Data, earlier: Earlier) -> list[str]:
    """How the split differs from what it would be without the earlier runs."""
    if not earlier.folders or data.validation_fraction == 0:
        return []
    named = " and ".join(shown(folder) for folder in earlier.folders)
    pairs = [*zip(uses, digests, strict=True)]
    kept = {
        digest
        for use, digest in pairs
        if use == TRAINED_ON
        and digest in earlier.trained_on
        and uniform("held out", digest, data.validation_seed) < data.validation_fraction
    }
    moved = {digest for use, digest in pairs if use == TRAINED_ON and digest in earlier.held_out}
    said = []
    if kept:
        said.append(
            f"data    {counted(len(kept), 'clip stays', 'clips stay')} in training instead of "
            f"being held out: {named} was trained on {'it' if len(kept) == 1 else 'them'}"
        )
    if moved:
        said.append(
            f"data    {counted(len(moved), 'clip')} that {named} held out "
            f"{'is' if len(moved) == 1 else 'are'} trained on now"
        )
    return said
