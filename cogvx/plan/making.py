"""What a plan says about making a video, with task.of=generate.   [no torch]"""

from __future__ import annotations

from cogvx.config import Config
from cogvx.options.cards import Card
from cogvx.plan.found import Outcome
from cogvx.plan.times import UNCERTAIN, Times, times_on

# The parts of a video, each with the times that it comes.
VIDEO_PARTS = ("encode image", "denoise", "decode")
# What is traced, in two processes.
TRACED = [["encode prompts"], ["load", *VIDEO_PARTS]]


def seconds_by_part(config: Config, times: dict[str, Times]) -> dict[str, float]:
    """Of one video. times: of each part; of one step for "denoise"."""
    steps = {"denoise": config.validation.num_inference_steps}
    return {part: times[part].total * steps.get(part, 1) for part in VIDEO_PARTS if part in times}


def seconds_of_video(config: Config, times: dict[str, Times]) -> float:
    return sum(seconds_by_part(config, times).values())


def video_facts(config: Config, card: Card, found: Outcome) -> dict:
    """What plan.json holds of a video, beside the memory."""
    times = {
        phase.name: times_on(card, phase, config.train.attention)
        for phase in found.phases
        if phase.name in VIDEO_PARTS
    }
    parts = seconds_by_part(config, times)
    return {
        "seconds_per_video": round(sum(parts.values()), 1),
        "seconds_by_part": {part: round(seconds, 1) for part, seconds in parts.items()},
        "seconds_per_step": round(times["denoise"].total, 2),
        "step": times["denoise"].in_words(),
    }


def video_lines(config: Config, result: dict) -> str:
    steps, step = config.validation.num_inference_steps, result["seconds_per_step"]
    parts = ", ".join(f"{part} {s:.0f} s" for part, s in result["seconds_by_part"].items())
    return (
        f"time    about {result['seconds_per_video']:.0f} s a video on {config.task.card}, "
        f"+-{UNCERTAIN:.0%}; attention by {result['attention']}\n"
        f"        {parts} ({steps} steps of {step:.1f} s)\n"
        f"        a step: {result['step']}"
    )
