"""What a tuned model does of what it was taught, and what it still does of the rest, beside the base model on the same prompts and seeds.

F frames, H height, W width.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from cogvx.data import demo, world
from cogvx.inference import pixels

if TYPE_CHECKING:
    from cogvx.config import Config

RESAMPLES = 4000  # of the bootstrap
NEW_MEASURE = "colour"  # the measure of what the demo teaches


@dataclass(frozen=True)
class VideoRequest:
    kind: str  # "taught": what the clips show; "other": what the base model knew before
    prompt: str
    seed: int


@dataclass(frozen=True)
class VideoScores:
    """A video's measures, each 0 to 1: shape, colour, direction, background (1: as the prompt says), all four, motion, saturation, and
    what was added."""

    asked: VideoRequest
    values: dict[str, float]


def video_requests(prompts: dict[str, list[str]], seed: int) -> list[VideoRequest]:
    """Each prompt once, each with a seed of its own."""
    pairs = [(kind, prompt) for kind, those in prompts.items() for prompt in those]
    return [
        VideoRequest(kind, prompt, seed + number) for number, (kind, prompt) in enumerate(pairs)
    ]


def scored_prompts_of(config: Config, count: int) -> dict[str, list[str]]:
    """The prompts whose videos can be judged on their pixels: nano's, taught the demo's colour. Image-to-video is shown what to make."""
    judged = config.model.is_built_in and not config.model.image_to_video and config.data.is_demo()
    return demo.scored_prompts(count) if count and judged else {}


def measure_video(frames: numpy.ndarray, prompt: str) -> dict[str, float]:
    """Of frames [F, H, W, 3] uint8; what the prompt asks for is judged where it has the form of the world's captions."""
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
    """Mean change of a pixel from frame to frame, as a share of its range."""
    return float(numpy.abs(numpy.diff(frames.astype(numpy.float32), axis=0)).mean() / 255)


def score_videos(
    make: Callable[[VideoRequest], numpy.ndarray], asked: list[VideoRequest]
) -> list[VideoScores]:
    return [VideoScores(each, measure_video(make(each), each.prompt)) for each in asked]


# -- base beside tuned -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A measure's mean over the videos of a kind, base and tuned, and the mean of the paired differences with the interval that
    holds it with 95 % (bootstrap over videos)."""

    kind: str
    measure: str
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    videos: int


def comparisons(base: list[VideoScores], tuned: list[VideoScores]) -> list[Comparison]:
    """Of every kind and measure; the two lists are of the same prompts and seeds."""
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


def score_line(found: list[Comparison]) -> str:
    """The two that matter, in a line; empty where nothing could be judged."""
    taught, other = (
        find_comparison(found, "taught", NEW_MEASURE),
        find_comparison(found, "other", "all"),
    )
    if taught is None or other is None:
        return ""
    return (
        f"what it was taught: {taught.tuned:.0%} of {taught.videos} videos show it (base model {taught.base:.0%}); the rest of its world: "
        f"{other.tuned:.0%} as the prompt says (base model {other.base:.0%})"
    )


def summary_scores(found: list[Comparison]) -> dict[str, float]:
    taught, other = (
        find_comparison(found, "taught", NEW_MEASURE),
        find_comparison(found, "other", "all"),
    )
    if taught is None or other is None:
        return {}
    return {
        "score_taught": taught.tuned, "score_taught_base": taught.base, "score_other": other.tuned, "score_other_base": other.base,
    }  # fmt: skip


def comparison_table(found: list[Comparison]) -> str:
    lines = [f"{'':24}{'base':>8}{'tuned':>8}   difference, with 95 % between"]
    for c in found:
        lines.append(
            f"{c.kind:8}{c.measure:16}{c.base:8.3f}{c.tuned:8.3f}   {c.difference:+.3f}   {c.low:+.3f} and {c.high:+.3f}"
        )
    return "\n".join(lines)


def write_evaluation(
    folder: Path, rows: dict[str, list[VideoScores]], found: dict[str, list[Comparison]], more: dict
) -> None:
    """evaluation.csv, a row for each video, and evaluation.json."""
    measures = list(
        dict.fromkeys(name for scored in rows.values() for each in scored for name in each.values)
    )
    with (folder / "evaluation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "kind", "seed", "prompt", *measures])
        for variant, scored in rows.items():
            for s in scored:
                values = [s.values.get(name, "") for name in measures]
                writer.writerow([variant, s.asked.kind, s.asked.seed, s.asked.prompt, *values])
    compared = {variant: [dataclasses.asdict(c) for c in those] for variant, those in found.items()}
    text = json.dumps({**more, "comparisons": compared}, indent=2, ensure_ascii=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
