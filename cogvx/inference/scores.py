"""Scores videos, and compares the tuned model with the base model on the same prompts and seeds.

There are two kinds of prompts. "taught": the new concept, that the clips show. "other": what the
base model knew before.   F frames, H height, W width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from cogvx.data import demo, world
from cogvx.files import write_csv, write_json
from cogvx.inference import pixels

if TYPE_CHECKING:
    from cogvx.config import Config

RESAMPLES = 4000  # of the bootstrap
# The measure that shows whether the demo's new concept was learned.
NEW_MEASURE = "colour"
KIND_IN_WORDS = {"taught": "new concept", "other": "known before"}


@dataclass(frozen=True)
class VideoRequest:
    kind: str  # of KIND_IN_WORDS
    prompt: str
    seed: int


@dataclass(frozen=True)
class VideoScores:
    """The measures of one video.

    shape, colour, direction, background: 1 if the video shows what the prompt says, else 0; all:
    all four of them. motion, saturation: 0 to 1. task=evaluate adds more.
    """

    asked: VideoRequest
    values: dict[str, float]


def video_requests(prompts: dict[str, list[str]], seed: int) -> list[VideoRequest]:
    """One video for each prompt, each with its own seed."""
    pairs = [(kind, prompt) for kind, those in prompts.items() for prompt in those]
    return [
        VideoRequest(kind, prompt, seed + number) for number, (kind, prompt) in enumerate(pairs)
    ]


def scored_prompts_of(config: Config, count: int) -> dict[str, list[str]]:
    """The prompts whose videos can be judged by their pixels: the demo's, with model=nano.

    {} for all other runs. For image-to-video too: the image already shows what to make.
    """
    judged = config.model.is_built_in and not config.model.image_to_video and config.data.is_demo()
    return demo.scored_prompts(count) if count and judged else {}


def measure_video(frames: numpy.ndarray, prompt: str) -> dict[str, float]:
    """The values of VideoScores. frames: [F, H, W, 3] uint8.

    Only motion and saturation if the prompt does not have the form of the little world's captions.
    """
    found = pixels.look_at(frames)
    values = {"motion": motion_of(frames), "saturation": found.saturation}
    expected = world.parse_caption(prompt)
    if not expected:
        return values
    if expected["colour"] == demo.TOKEN:
        expected["colour"] = demo.MEANS
    values |= {name: float(getattr(found, name) == value) for name, value in expected.items()}
    return values | {"all": float(found.agrees(**expected))}


def motion_of(frames: numpy.ndarray) -> float:
    """The mean change of a pixel from one frame to the next, as a share of its range."""
    return float(numpy.abs(numpy.diff(frames.astype(numpy.float32), axis=0)).mean() / 255)


def score_videos(
    make: Callable[[VideoRequest], numpy.ndarray], asked: list[VideoRequest]
) -> list[VideoScores]:
    return [VideoScores(each, measure_video(make(each), each.prompt)) for each in asked]


# -- the base model and the tuned model --------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The means of one measure over the videos of one kind.

    difference: the mean of tuned minus base, over pairs of the same prompt and seed. low, high:
    its 95 % interval (bootstrap over the pairs).
    """

    kind: str
    measure: str
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    videos: int


def comparisons(base: list[VideoScores], tuned: list[VideoScores]) -> list[Comparison]:
    """One for each kind and measure. Both lists have the same prompts and seeds, in one order."""
    found = []
    for kind in dict.fromkeys(scored.asked.kind for scored in base):
        pairs = [(b, t) for b, t in zip(base, tuned, strict=True) if b.asked.kind == kind]
        for measure in dict.fromkeys(name for b, _ in pairs for name in b.values):
            both = [(b.values[measure], t.values[measure]) for b, t in pairs if measure in b.values]
            found.append(comparison(kind, measure, numpy.array(both)))
    return found


def comparison(kind: str, measure: str, pairs: numpy.ndarray) -> Comparison:
    """pairs: [videos, 2], base and tuned."""
    differences = pairs[:, 1] - pairs[:, 0]
    chosen = numpy.random.default_rng(0).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    low, high = numpy.percentile(differences[chosen].mean(axis=1), [2.5, 97.5])
    means = pairs.mean(axis=0)
    return Comparison(
        kind, measure, *map(float, (*means, differences.mean(), low, high)), len(pairs)
    )


def find_comparison(found: list[Comparison], kind: str, measure: str) -> Comparison | None:
    return next((c for c in found if (c.kind, c.measure) == (kind, measure)), None)


def headline_comparisons(found: list[Comparison]) -> tuple[Comparison, Comparison] | None:
    """What was learned, and what is still known. None if one of the two was not judged."""
    taught = find_comparison(found, "taught", NEW_MEASURE)
    other = find_comparison(found, "other", "all")
    return None if taught is None or other is None else (taught, other)


def score_line(found: list[Comparison]) -> str:
    """Both headline comparisons in one line; "" if there are none."""
    both = headline_comparisons(found)
    if both is None:
        return ""
    taught, other = both
    return (
        f"new concept: {taught.tuned:.0%} of {taught.videos} videos show it "
        f"(base model {taught.base:.0%}); known before: {other.tuned:.0%} of {other.videos} "
        f"videos are as the prompt says (base model {other.base:.0%})"
    )


def summary_scores(found: list[Comparison]) -> dict[str, float]:
    """The headline comparisons for summary.json; {} if there are none."""
    both = headline_comparisons(found)
    if both is None:
        return {}
    taught, other = both
    return {
        "score_taught": taught.tuned,
        "score_taught_base": taught.base,
        "score_other": other.tuned,
        "score_other_base": other.base,
    }


def comparison_table(found: list[Comparison]) -> str:
    lines = [
        f"{'prompts':14}{'measure':16}{'base':>8}{'tuned':>8}{'difference':>13}   95 % interval"
    ]
    for c in found:
        kind = KIND_IN_WORDS.get(c.kind, c.kind)
        means = f"{c.base:8.3f}{c.tuned:8.3f}{c.difference:+13.3f}"
        lines.append(f"{kind:14}{c.measure:16}{means}   {c.low:+.3f} to {c.high:+.3f}")
    return "\n".join(lines)


def write_evaluation(
    folder: Path, rows: dict[str, list[VideoScores]], found: dict[str, list[Comparison]], more: dict
) -> None:
    """evaluation.csv with a row for each video, and evaluation.json with the comparisons.

    rows, found: by the variant's name. more: further values for evaluation.json.
    """
    videos = [
        {"variant": variant, **dataclasses.asdict(each.asked), **each.values}
        for variant, scored in rows.items()
        for each in scored
    ]
    measures = dict.fromkeys(
        name for scored in rows.values() for each in scored for name in each.values
    )
    write_csv(folder / "evaluation.csv", videos, ["variant", "kind", "seed", "prompt", *measures])
    compared = {variant: [dataclasses.asdict(c) for c in those] for variant, those in found.items()}
    write_json(folder / "evaluation.json", {**more, "comparisons": compared})
