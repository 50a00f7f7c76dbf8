"""What a run with data.buckets says at its start: the clips of each bucket, and their uses."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from cogvx.config import Config
from cogvx.data.buckets import Size
from cogvx.data.encode import EncodedClip
from cogvx.progress import counted
from cogvx.training.order import SampleOrder, number_of_steps, order_of, samples_per_step


@dataclass(frozen=True)
class BucketRow:
    """A bucket. Its steps and uses are those of the whole run."""

    size: Size
    clips: int  # to train on
    held_out: int
    cropped: float | None  # the mean share of the picture; None: the cache does not say
    steps: int
    uses: tuple[int, int]  # of a clip: at least and at most


def lines_about_buckets(
    config: Config, train: list[EncodedClip], held_out: list[EncodedClip], processes: int
) -> list[str]:
    """The lines that a run says."""
    rows = table_of(config, train, held_out, processes)
    return lines_of(rows, samples_per_step(config.train, processes))


def table_of(
    config: Config, train: list[EncodedClip], held_out: list[EncodedClip], processes: int
) -> list[BucketRow]:
    """The buckets, those with the most clips first."""
    steps = number_of_steps(config, len(train), processes)
    uses = uses_of_clips(order_of(config, train, processes), steps)
    numbers, members = defaultdict(list), defaultdict(list)
    for number, clip in enumerate([*train, *held_out]):
        numbers[clip.size].append(number)
        members[clip.size].append(clip)
    rows = []
    for size, clips in members.items():
        found = [uses[number] for number in numbers[size] if number < len(train)]
        crops = [share for c in clips if (share := c.about.get("cropped")) is not None]
        rows.append(
            BucketRow(
                size,
                clips=len(found),
                held_out=len(clips) - len(found),
                cropped=sum(crops) / len(crops) if crops else None,
                steps=found[0][0] if found else 0,
                uses=(
                    min((low for _, low, _ in found), default=0),
                    max((high for *_, high in found), default=0),
                ),
            )
        )
    return sorted(rows, key=lambda row: -row.clips)


def uses_of_clips(order: SampleOrder, steps: int) -> dict[int, tuple[int, int, int]]:
    """For each clip: the steps of its bucket, and how often it is used, at least and at most."""
    found = {}
    counts = order.turns_of_buckets.counts(steps)
    for groups, turns, count in zip(order.buckets, order.turns_of_groups, counts, strict=True):
        for group, samples in zip(groups, turns.counts(count * order.per_step), strict=True):
            least, more = divmod(samples, len(group.clips))
            found |= dict.fromkeys(group.clips, (count, least, least + (more > 0)))
    return found


def lines_of(rows: list[BucketRow], per_step: int) -> list[str]:
    """The table, and warnings. per_step: clips that an optimizer step takes."""
    heads = f"{'clips':>7}{'held out':>10}{'cropped':>9}{'steps':>8}   uses of a clip"
    lines = [f"{'buckets bucket':24}{heads}"]
    for row in rows:
        crop = "?" if row.cropped is None else f"{row.cropped:.0%}"
        low, high = row.uses
        uses = f"{low}" if low == high else f"{low} to {high}"
        lines.append(
            f"{'':8}{row.size!s:16}{row.clips:7}{row.held_out:10}{crop:>9}{row.steps:8}   {uses}"
        )
    lines.append(
        f"        a step takes {counted(per_step, 'clip')} of one bucket; where its permutation "
        f"ends, it goes on with the next one"
    )
    return [*lines, *(f"warning {warning}" for warning in warnings_of(rows, per_step))]


def warnings_of(rows: list[BucketRow], per_step: int) -> list[str]:
    found = []
    small = [row for row in rows if 0 < row.clips < per_step and row.steps]
    if small:
        found.append(
            f"{counted(len(small), 'bucket has', 'buckets have')} fewer clips than the {per_step} "
            f"of a step, which then has a clip more than once: {names_of_buckets(small)}"
        )
    unused = [row for row in rows if row.clips and not row.steps]
    if unused:
        clips = sum(row.clips for row in unused)
        found.append(
            f"{counted(len(unused), 'bucket gets', 'buckets get')} no step in this run, so "
            f"{counted(clips, 'clip is', 'clips are')} not trained on: "
            f"{names_of_buckets(unused)}. Train for more steps, or give fewer buckets"
        )
    return found


def names_of_buckets(rows: list[BucketRow]) -> str:
    return ", ".join(str(row.size) for row in rows)
