"""Changes to a configuration that need less memory, with what they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from cogvx.compose import compose_config
from cogvx.config import Config
from cogvx.model.trained_weights import weights_of
from cogvx.options.cards import Card
from cogvx.plan.allocator import gib
from cogvx.plan.configs import at_largest_bucket, layers_of
from cogvx.plan.found import Outcome, at_layers
from cogvx.plan.making import TRACED, VIDEO_PARTS, seconds_of_video
from cogvx.plan.times import Times, times_on
from cogvx.plan.traces import Asked, traces
from cogvx.progress import bar, counted, heartbeat


@dataclass(frozen=True)
class Estimate:
    """What is traced of a change, and what is computed from it."""

    encoders: list[str]  # phases that the number of layers does not matter for
    phases: list[str]  # phases of which two and three layers are traced
    counted: tuple[str, ...]  # those of them whose peaks count
    seconds: Callable[[Config, dict[str, Times]], float]  # from the times of the counted phases

    def jobs(self, config: Config) -> list[Asked]:
        few = [(self.phases, 2), (self.phases, 3), (self.encoders, 1)]
        return [(config, phases, layers) for phases, layers in few]

    def of(self, config: Config, card: Card, found: Outcome, traced: list[Outcome]) -> dict:
        """The peak and the time with all layers. found: the plan that this is a change to."""
        two, three, encoders = traced
        layers, peaks, times = layers_of(config), [], {}
        for name in self.counted:
            few = [each.maybe(name) for each in (two, three)]
            if None in few:
                continue
            before = found.phase(name).peak
            allocated = at_layers(layers, *(phase.peak.allocated for phase in few))
            peaks.append(allocated * before.reserved / before.allocated)
            few = [times_on(card, phase, config.train.attention) for phase in few]
            times[name] = few[0].at_layers(layers, few[1])
        peak = max(*peaks, *(phase.peak.reserved for phase in encoders.phases))
        seconds = round(self.seconds(config, times), 1)
        return {"peak_gib": gib(peak), "seconds": seconds, "fits": peak <= card.usable}


TRAINING = Estimate(
    ["encode clips", "encode prompts"],
    ["train"],
    ("train",),
    lambda config, times: times["train"].total,
)
MAKING = Estimate(TRACED[0], TRACED[1], VIDEO_PARTS, seconds_of_video)


def suggest(config: Config, card: Card, found: Outcome) -> list[dict]:
    """Memory modes and shorter clips, with their peaks and whether they fit. Prints those that do.

    A peak is computed from two and three layers, with this configuration's ratio of reserved to
    allocated memory: near, but not exact.
    """
    estimate = TRAINING if config.task.trains else MAKING
    changes = [change for change in changes_of(config) if with_changes(config, change) != config]
    print(f"\ntrying  {counted(len(changes), 'change')} that need less memory ...", flush=True)
    changed = [at_largest_bucket(with_changes(config, change)) for change in changes]
    jobs = [job for each in changed for job in estimate.jobs(each)]
    with heartbeat("trying  still at work on them"), bar(total=len(jobs), leave=False) as tried:
        outcomes = traces(jobs, lambda job, left: tried.update())
    suggestions = [
        {
            "change": " ".join(change),
            **estimate.of(each, card, found, outcomes[3 * number : 3 * number + 3]),
        }
        for number, (change, each) in enumerate(zip(changes, changed, strict=True))
    ]
    times = {
        phase.name: times_on(card, phase, config.train.attention)
        for phase in found.phases
        if phase.name in estimate.counted
    }
    print_suggestions(config, suggestions, estimate.seconds(config, times))
    return suggestions


def print_suggestions(config: Config, suggestions: list[dict], seconds: float) -> None:
    fitting = sorted((s for s in suggestions if s["fits"]), key=lambda s: s["seconds"])
    if not fitting:
        print(
            "try     none of them fits this card. Use a smaller model (model=2b), smaller "
            "data.height and data.width,\n        or a larger card (task.card=...)"
        )
        return
    # Fewer frames only if nothing else fits: they are another clip.
    fitting = [s for s in fitting if "data." not in s["change"]] or fitting
    print("try     add one of these to the command, the fastest first:")
    what = "step" if config.task.trains else "video"
    for suggestion in fitting[:3]:
        slower = suggestion["seconds"] / seconds
        print(
            f"        {suggestion['change']:40} about {suggestion['peak_gib']:.1f} GiB, "
            f"{slower:.2f} times as long a {what}"
        )
    print("        These figures are estimates. Repeat task=plan with the change to be sure.")


def changes_of(config: Config) -> list[list[str]]:
    """Overrides that may need less memory. A list of buckets does not follow max_num_frames."""
    listed = isinstance(config.data.buckets, list) and config.task.trains
    return [c for c in all_changes(config) if not (listed and "data." in " ".join(c))]


def all_changes(config: Config) -> list[list[str]]:
    # Half as long, 4k + 1 frames.
    shorter = 1 + (config.data.max_num_frames - 1) // 8 * 4
    if not config.task.trains:
        return [
            ["memory=balanced"],
            ["memory=balanced", "memory.frugal_videos=true"],
            ["memory=low"],
            ["memory=minimal"],
            ["memory=minimal", f"data.max_num_frames={shorter}"],
        ]
    if not weights_of(config.lora).freezes_base:
        return [
            ["memory=balanced"],
            ["memory=balanced", "optimizer=adamw8bit"],
            ["memory=low_full"],
        ]
    balanced = ["memory=balanced"]
    return [
        balanced,
        [*balanced, "memory.base_storage=int8"],
        ["memory=low"],
        ["memory=minimal"],
        [*balanced, f"data.max_num_frames={shorter}"],
    ]


def with_changes(config: Config, change: list[str]) -> Config:
    """This configuration with other overrides of memory, optimizer and data.max_num_frames."""
    frozen = weights_of(config.lora).freezes_base or not config.task.trains
    kind = [] if frozen else ["lora=null", "train.mixed_precision=bf16"]
    values = compose_config([*kind, *(o for o in change if not o.startswith("data."))])
    changed = dataclasses.replace(config, memory=values.memory)
    for override in change:
        name, _, value = override.partition("=")
        if name == "optimizer":
            changed = dataclasses.replace(changed, optimizer=values.optimizer)
        elif name == "data.max_num_frames":
            data = dataclasses.replace(config.data, max_num_frames=int(value))
            changed = dataclasses.replace(changed, data=data)
    return changed
