"""Changes to a configuration that need less memory, with what they need."""

from __future__ import annotations

import dataclasses

from cogvx.compose import compose_config
from cogvx.config import Config
from cogvx.model.trained_weights import weights_of
from cogvx.options.cards import Card
from cogvx.plan.allocator import gib
from cogvx.plan.configs import layers_of
from cogvx.plan.found import Outcome, at_layers
from cogvx.plan.times import times_on
from cogvx.plan.traces import traces
from cogvx.progress import bar, counted, heartbeat

ENCODE = ["encode clips", "encode prompts"]


def suggest(config: Config, card: Card, found: Outcome) -> list[dict]:
    """Memory modes and shorter clips, with their peaks and whether they fit. Prints those that do.

    A peak is computed from two and three layers, with this configuration's ratio of reserved to
    allocated memory: near, but not exact.
    """
    changes = [change for change in changes_of(config) if with_changes(config, change) != config]
    print(f"\ntrying  {counted(len(changes), 'change')} that need less memory ...", flush=True)
    jobs = [
        (with_changes(config, change), phases, layers)
        for change in changes
        for phases, layers in ((["train"], 2), (["train"], 3), (ENCODE, 1))
    ]
    with heartbeat("trying  still at work on them"), bar(total=len(jobs), leave=False) as tried:
        outcomes = traces(jobs, lambda job, left: tried.update())

    reserved_ratio = found.phase("train").peak.reserved / found.phase("train").peak.allocated
    suggestions = []
    for number, change in enumerate(changes):
        two, three, encoders = outcomes[3 * number : 3 * number + 3]
        two, three = two.phase("train"), three.phase("train")
        two_times, three_times = (
            times_on(card, few, config.train.attention) for few in (two, three)
        )
        layers = layers_of(config)
        allocated = at_layers(layers, two.peak.allocated, three.peak.allocated)
        encode_peaks = [phase.peak.reserved for phase in encoders.phases]
        peak = max(allocated * reserved_ratio, *encode_peaks)
        suggestions.append(
            {
                "change": " ".join(change),
                "peak_gib": gib(peak),
                "seconds": round(two_times.at_layers(layers, three_times).total, 1),
                "fits": peak <= card.usable,
            }
        )
    seconds = times_on(card, found.phase("train"), config.train.attention).total
    print_suggestions(suggestions, seconds)
    return suggestions


def print_suggestions(suggestions: list[dict], seconds: float) -> None:
    fitting = sorted((s for s in suggestions if s["fits"]), key=lambda s: s["seconds"])
    if not fitting:
        print(
            "try     none of them fits this card. Use a smaller model (model=2b), smaller "
            "data.height and data.width,\n        or a larger card (task.card=...)"
        )
        return
    print("try     add one of these to the command, the fastest first:")
    for suggestion in fitting[:3]:
        slower = suggestion["seconds"] / seconds
        print(
            f"        {suggestion['change']:40} about {suggestion['peak_gib']:.1f} GiB, "
            f"{slower:.2f} times as long a step"
        )
    print("        These figures are estimates. Repeat task=plan with the change to be sure.")


def changes_of(config: Config) -> list[list[str]]:
    """Overrides that may need less memory."""
    if not weights_of(config.lora).freezes_base:
        return [
            ["memory=balanced"],
            ["memory=balanced", "optimizer=adamw8bit"],
            ["memory=low_full"],
        ]
    # Half as long, 4k + 1 frames.
    shorter = 1 + (config.data.max_num_frames - 1) // 8 * 4
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
    frozen = weights_of(config.lora).freezes_base
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
