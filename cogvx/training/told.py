"""What a run tells of its data before the first step: in the terminal and in its folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cogvx.config import Config
from cogvx.data.encode import EncodedClip
from cogvx.data.inspect import (
    Inspected,
    write_contact_sheet,
    write_held_out,
    write_report,
)
from cogvx.data.sources import Data
from cogvx.data.split import Split
from cogvx.errors import UserError
from cogvx.files import shown
from cogvx.model.pretrained import PretrainedModel
from cogvx.options.train import Train
from cogvx.progress import counted
from cogvx.records.dataset import write_dataset_page
from cogvx.training import bucket_table
from cogvx.training.ranks import Ranks


def report(folder: Path, found: Inspected, split: Split) -> None:
    write_report(folder, found)
    write_contact_sheet(folder, found.clips, split.uses)
    write_held_out(folder, found.clips, split.uses)


def described_sources(
    train: list[EncodedClip], held_out: list[EncodedClip], data: Data
) -> Iterator[str]:
    """Of data=mix: how many clips each source has, and its share of the samples."""
    aside, shares = Counter(clip.example.source for clip in held_out), data.shares()
    for source, clips in Counter(clip.example.source for clip in train).items():
        if source:
            share = shares[source] / sum(shares.values()) if shares else clips / len(train)
            yield (
                f"source  {source}: {counted(clips, 'clip')} to train on, {share:.0%} of the "
                f"samples; {aside[source]} held out"
            )


def describe(
    folder: Path, train: list[EncodedClip], held_out: list[EncodedClip], data: Data, ranks: Ranks
) -> None:
    clips = [*train, *held_out]
    frames = sorted({clip.about["frames"] for clip in clips})
    lengths = f"{frames[0]}" if len(frames) == 1 else f"{frames[0]} to {frames[-1]}"
    shapes = {(clip.size.width, clip.size.height) for clip in clips}
    width, height = min(shapes)
    size = f"{width}x{height}" if len(shapes) == 1 else f"{len(shapes)} shapes"
    ranks.say(
        f"data    {counted(len(train), 'clip')} to train on, {len(held_out)} held out; "
        f"{lengths} frames of {size} at {data.fps or 'their own'} fps"
    )
    for line in described_sources(train, held_out, data):
        ranks.say(line)
    slow = [clip for clip in clips if clip.about["repeated"]]
    if slow:
        lowest = math.floor(min(clip.about["file_fps"] for clip in slow))
        ranks.say(
            f"warning {counted(len(slow), 'clip has', 'clips have')} a lower frame rate than "
            f"data.fps={data.fps}, so some frames are used twice (dataset_report.csv, column "
            f"repeated); data.fps={lowest} avoids this"
        )
    if not held_out and data.shard is None:
        ranks.say(
            "warning no clip is held out, so there is no held-out loss: "
            "add clips, or set data.validation_fraction"
        )
    sheet = shown(folder / "contact_sheet.png")
    ranks.say(f"clips   see {sheet} (pictures) and dataset_report.csv (table)")


def say_flags(folder: Path, found: Inspected, ranks: Ranks) -> None:
    page = write_dataset_page(folder)
    flagged = sum(bool(row["flags"]) for row in found.rows)
    those = ", ".join(f"{count} {kind}" for kind, count in found.counts().items())
    ranks.say(f"clips   {flagged} of {len(found.rows)} are flagged{': ' * bool(those)}{those}")
    ranks.say(f"        see {shown(page)}: they play there as the model sees them")


def require_equal_lengths(clips: list[EncodedClip], train: Train) -> None:
    """UserError if the clips of a batch cannot be stacked."""
    frames = sorted({clip.about["frames"] for clip in clips})
    size = train.train_batch_size
    if size == 1 or len(frames) == 1:
        return
    lengths = [
        f"{counted(sum(clip.about['frames'] == n for clip in clips), 'clip')} of {n} frames"
        for n in frames
    ]
    raise UserError(
        f"train.train_batch_size={size} needs clips of one length, "
        f"and there are {', '.join(lengths)}. "
        f"Either data.buckets=auto, or train.train_batch_size=1 "
        f"train.gradient_accumulation_steps={size}, or data.max_num_frames={frames[0]}, "
        f"or data.min_num_frames={frames[-1]} to leave the shorter ones out"
    )


def describe_buckets(
    config: Config,
    train: list[EncodedClip],
    held_out: list[EncodedClip],
    pretrained: PretrainedModel,
    ranks: Ranks,
) -> None:
    for line in bucket_table.lines_about_buckets(config, train, held_out, ranks.count):
        ranks.say(line)
    sizes = [clip.size for clip in (*train, *held_out)]
    caution = pretrained.geometry().caution_of_buckets(sizes)
    if caution is not None:
        ranks.say(f"warning {caution}")


def warn_of_lengths(clips: list[EncodedClip], pretrained: PretrainedModel, ranks: Ranks) -> None:
    for frames in sorted({clip.about["frames"] for clip in clips}):
        for caution in pretrained.geometry().cautions(frames):
            ranks.say(f"warning {caution}")
