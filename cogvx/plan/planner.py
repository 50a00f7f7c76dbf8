"""task=plan: does it fit, and how long will it take? Without weights, without a GPU.

Every figure comes from running the run's own code on tensors without contents (plan/phases.py); see README for how near it comes.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvx.compose import compose_config
from cogvx.config import Config
from cogvx.errors import UserError
from cogvx.files import shown
from cogvx.model.trained_weights import weights_of
from cogvx.options.cards import CARDS, Card
from cogvx.plan.allocator import GIB, Peak, replay
from cogvx.plan.phases import PHASES, PlannedModel, configs_of, run_phases
from cogvx.plan.trace import Recorder, Work

MEMORY_PARTS = ["weights", "gradients", "optimizer", "activations", "workspace"]
UNCERTAIN = 0.35  # of the step's time
IN_TWO_PROCESSES = [["encode clips", "encode prompts", "video"], ["load", "held-out loss", "train"]]
KERNEL_SECONDS = 4e-6  # to start one


@dataclass(frozen=True)
class Phase:
    name: str
    peak: Peak  # bytes
    parts: dict[str, int]  # of MEMORY_PARTS, bytes, at the allocated peak
    flops: int
    seconds: float | None  # on the card asked for


@dataclass(frozen=True)
class Outcome:
    """What tracing some phases found."""

    phases: list[Phase]
    host: int  # bytes on the CPU's side
    optimizer: int  # bytes of the optimizer's states
    trained: int  # bytes of the trained weights

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def outcome_of(recorder: Recorder, card: Card | None) -> Outcome:
    peaks = replay(recorder.events)
    found = []
    for name in PHASES:
        if name in peaks:
            work = {
                (op, dtype): w for (phase, op, dtype), w in recorder.work.items() if phase == name
            }
            flops = sum(w.flops for w in work.values())
            seconds = None if card is None else seconds_on(card, work)
            found.append(
                Phase(name, peaks[name], parts_of(recorder.at_peak.get(name, [])), flops, seconds)
            )
    sizes = Counter()
    for storage in recorder.storages.values():
        sizes[storage.what] += storage.size
    return Outcome(found, recorder.most[True], sizes["optimizer states"], sizes["trained weights"])


def parts_of(storages: list) -> dict[str, int]:
    """Bytes by what they are for."""
    sizes = dict.fromkeys(MEMORY_PARTS, 0)
    for storage in storages:
        sizes[part_of(storage.what)] += storage.size
    return sizes


def part_of(what: str) -> str:
    if what.endswith("weights") or what.startswith(
        "load:"
    ):  # loading leaves the frozen weights in a smaller form
        return "weights"
    return {"optimizer states": "optimizer", "gradients": "gradients"}.get(
        what, "workspace" if "workspace" in what else "activations"
    )


def kind_of(op: str) -> str:
    """Of Card.shares."""
    if "attention" in op:
        return "attention backward" if "backward" in op else "attention"
    return "convolution" if "conv" in op else "matrix"


def seconds_on(card: Card, work: dict[tuple[str, torch.dtype | None], Work]) -> float:
    """Each operation takes as long as its arithmetic or its memory traffic, whichever is more, at the card's shares."""
    total = 0.0
    for (op, dtype), w in work.items():
        rate = card.tflops * 1e12 * (1 if dtype in (torch.bfloat16, torch.float16) else 0.5)
        arithmetic = w.flops / (rate * card.shares[kind_of(op)])
        traffic = w.bytes / (card.gb_per_second * 1e9 * card.shares["memory"])
        total += max(arithmetic, traffic) + w.count * KERNEL_SECONDS
    return total


def trace(arguments: tuple[Config, list[str], int | None, Card | None]) -> Outcome:
    config, phases, layers, card = arguments
    torch.set_num_threads(1)
    return outcome_of(run_phases(config, phases, layers=layers), card)


def traces(jobs: list[tuple]) -> list[Outcome]:
    """Side by side on two cores, in processes that start with everything imported."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(trace, jobs, chunksize=1)


def plan(config: Config, folder: Path) -> dict:
    """Prints the plan and writes plan.json and plan.png into the run's folder; returns the run's summary."""
    require_known(config)
    if config.parallel.num_processes > 1:
        print(
            "warning planned is one of the processes; each has the same peak, and ddp one more copy of the gradients"
        )
    card = CARDS[config.task.card]
    jobs = [(config, phases, None, card) for phases in IN_TWO_PROCESSES]
    plain = plainly(config)
    few = [(changed, ["train"], layers, card) for changed in (config, plain) for layers in (2, 3)]
    *outcomes, two, three, plain_two, plain_three = traces([*jobs, *few])
    found = Outcome(
        sorted(
            (phase for outcome in outcomes for phase in outcome.phases if outcome is outcomes[1] or phase.name != "load"),
            key=lambda phase: PHASES.index(phase.name),
        ),
        max(outcome.host for outcome in outcomes), outcomes[1].optimizer, outcomes[1].trained,
    )  # fmt: skip
    layers = configs_of(config)["transformer"]["num_layers"]
    necessary = at_layers(layers, plain_two.phase("train").flops, plain_three.phase("train").flops)
    peak = max(found.phases, key=lambda phase: phase.peak.reserved)
    fits = peak.peak.reserved <= card.usable
    executed = found.phase("train").flops
    result = {
        "status": "done",
        "model": config.model.path,
        "card": config.task.card,
        "fits": fits,
        "peak_reserved_gib": gib(peak.peak.reserved),
        "peak_phase": peak.name,
        "phases": {p.name: phase_facts(p) for p in found.phases},
        "tflop_per_step": executed / 1e12,
        "necessary_tflop_per_step": necessary / 1e12,
        "seconds_per_step": round(found.phase("train").seconds, 2),
        "host_gib": gib(found.host),
        "cache_mib_per_clip": round(cache_bytes(config) / 2**20, 2),
        "checkpoint_gib": gib(found.trained + found.optimizer),
    }
    say(config, card, found, result)
    if not fits:
        result["suggestions"] = suggest(config, card, found, (two, three))
    if config.task.measure:
        result["measured"] = measure_phases(config, found)
    (folder / "plan.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw_plan(folder / "plan.png", config, card, found)
    print(f"picture {shown(folder / 'plan.png')}")
    return result


def measure_phases(config: Config, found: Outcome) -> dict:
    """The phases for real, two steps of training: on a GPU what CUDA's allocator and the clock say, beside the plan; on a CPU what
    was really allocated, beside a plan for the CPU, which has neither CUDA's kernels nor its allocator."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        meter = run_phases(config, PHASES, steps=2, device=device)
        planned = {phase.name: phase.peak for phase in found.phases}
        real, seconds = meter.peaks, meter.laps[-1]
    else:
        planned, real = (
            replay(run_phases(config, PHASES, as_cuda=False, fake=fake).events)
            for fake in (True, False)
        )
        seconds = None
    rows = {
        name: {
            "planned_gib": gib(planned[name].allocated), "measured_gib": gib(real[name].allocated),
            "planned_reserved_gib": gib(planned[name].reserved), "measured_reserved_gib": gib(real[name].reserved),
        }
        for name in PHASES
    }  # fmt: skip
    where = torch.cuda.get_device_name() if seconds is not None else "this CPU, planned for it"
    print(
        f"\n{'measured on ' + where:44}{'planned':>10}{'measured':>10}{'error':>9}   GiB allocated"
    )
    for name, row in rows.items():
        error = row["measured_gib"] and row["planned_gib"] / row["measured_gib"] - 1
        print(f"{name:44}{row['planned_gib']:10.3f}{row['measured_gib']:10.3f}{error:+9.1%}")
    if seconds is not None:
        planned_seconds = found.phase("train").seconds
        print(
            f"{'a step, in seconds':44}{planned_seconds:10.2f}{seconds:10.2f}{planned_seconds / seconds - 1:+9.1%}"
        )
    return {"where": where, "seconds_per_step": seconds, "phases": rows}


def step_seconds(config: Config, card: Card) -> float:
    """Of an optimizer step, from two and three layers: they are all alike."""
    layers = configs_of(config)["transformer"]["num_layers"]
    two, three = (trace((config, ["train"], n, card)).phase("train").seconds for n in (2, 3))
    return at_layers(layers, two, three)


def plainly(config: Config) -> Config:
    """The same step with nothing computed twice: what is necessary."""
    return dataclasses.replace(config, memory=compose_config(["memory=fast"]).memory)


def at_layers(layers: int, two: float, three: float) -> float:
    """Of a quantity that grows by the same with every layer, from its values at two and at three."""
    return two + (layers - 2) * (three - two)


def phase_facts(phase: Phase) -> dict:
    return {
        "allocated_gib": gib(phase.peak.allocated),
        "reserved_gib": gib(phase.peak.reserved),
        **{f"{name}_gib": gib(size) for name, size in phase.parts.items()},
        "tflop": round(phase.flops / 1e12, 2),
    }


def gib(size: float) -> float:
    return round(size / GIB, 3)


def cache_bytes(config: Config) -> int:
    """Of a clip's latents, its image's encodings and its prompt."""
    pretrained = PlannedModel(Path(), torch.device("cpu"), torch.float32, configs_of(config))
    geometry, data = pretrained.geometry(), config.data
    size = getattr(torch, config.train.mixed_precision.value).itemsize
    pixels = data.height // geometry.spatial_stride * (data.width // geometry.spatial_stride)
    frames = (data.max_num_frames - 1) // geometry.temporal_stride + 1
    frames += (1 + data.image_noise_variants) if geometry.image_to_video else 0
    prompt = geometry.text_tokens * pretrained.configs["transformer"]["text_embed_dim"]
    return size * (2 * geometry.latent_channels * frames * pixels + prompt)


def say(config: Config, card: Card, found: Outcome, result: dict) -> None:
    data, kind = config.data, weights_of(config.lora)
    print(
        f"plan    {config.model.path}, {kind}, {data.max_num_frames} frames of {data.width}x{data.height}, "
        f"batch {config.train.train_batch_size}, {config.train.mixed_precision.name}, memory={config.choices['memory']}\n\n"
        f"{'GiB':16}{'allocated':>10}{'reserved':>10}{'':3}"
        + "".join(f"{part:>12}" for part in MEMORY_PARTS)
    )
    for phase in found.phases:
        sizes = "".join(f"{phase.parts[part] / GIB:12.2f}" for part in MEMORY_PARTS)
        print(
            f"{phase.name:16}{phase.peak.allocated / GIB:10.2f}{phase.peak.reserved / GIB:10.2f}{'':3}{sizes}"
        )
    executed, necessary = result["tflop_per_step"], result["necessary_tflop_per_step"]
    seconds = result["seconds_per_step"]
    verdict = "fits" if result["fits"] else "does NOT fit"
    steps = config.train.max_train_steps
    whole = "" if steps is None else f"; {steps} steps about {steps * seconds / 3600:.1f} h"
    print(
        f"\nmemory  {result['peak_reserved_gib']:.2f} GiB at most, in '{result['peak_phase']}'; {config.task.card} has "
        f"{card.usable / GIB:.1f} free: {verdict}\n"
        f"compute {executed:.0f} TFLOP a step, of which {necessary:.0f} are necessary ({executed / necessary:.2f})\n"
        f"time    about {seconds:.1f} s a step on {config.task.card}, +-{UNCERTAIN:.0%}{whole}\n"
        f"RAM     {result['host_gib']:.1f} GiB of weights and activations at most, besides Python's 2\n"
        f"disk    {result['cache_mib_per_clip']:.1f} MiB of cache a clip; {result['checkpoint_gib']:.2f} GiB a checkpoint"
    )


def suggest(config: Config, card: Card, found: Outcome, few: tuple[Outcome, Outcome]) -> list[dict]:
    """Memory modes and shorter clips that would fit, fastest first. Their peaks are taken from two and three layers, with this
    configuration's share of reserved over allocated: near, not exact; plan one to know."""
    layers = configs_of(config)["transformer"]["num_layers"]
    changes = [change for change in changes_of(config) if with_changes(config, change) != config]
    configs = [with_changes(config, change) for change in changes]
    encode = ["encode clips", "encode prompts"]
    jobs = [
        (changed, wanted, n, card)
        for changed in configs
        for wanted, n in ((["train"], 2), (["train"], 3), (encode, 1))
    ]
    outcomes = traces(jobs)
    now = found.phase("train").peak
    suggestions = []
    for change, two, three, encoders in zip(
        changes, outcomes[::3], outcomes[1::3], outcomes[2::3], strict=True
    ):
        allocated = at_layers(
            layers, two.phase("train").peak.allocated, three.phase("train").peak.allocated
        )
        seconds = at_layers(layers, two.phase("train").seconds, three.phase("train").seconds)
        peak = max(
            allocated * now.reserved / now.allocated,
            *(phase.peak.reserved for phase in encoders.phases),
        )
        suggestions.append(
            {
                "change": " ".join(change),
                "peak_gib": gib(peak),
                "seconds": round(seconds, 1),
                "fits": peak <= card.usable,
            }
        )
    fitting = sorted((s for s in suggestions if s["fits"]), key=lambda s: s["seconds"])
    for suggestion in fitting[:3]:
        slower = suggestion["seconds"] / found.phase("train").seconds
        print(
            f"try     {suggestion['change']}: about {suggestion['peak_gib']:.1f} GiB, {slower:.2f} x the time"
        )
    if fitting:
        print("        (times on the card alone: transfers to and from RAM are not counted)")
    if not fitting:
        print(
            "try     nothing tried here fits this card: a smaller model, a smaller size, or a larger card (task.card=...)"
        )
    return suggestions


def changes_of(config: Config) -> list[list[str]]:
    if not weights_of(config.lora).freezes_base:
        return [
            ["memory=balanced"],
            ["memory=balanced", "optimizer=adamw8bit"],
            ["memory=low_full"],
        ]
    shorter = 1 + (config.data.max_num_frames - 1) // 8 * 4
    modes = [
        ["memory=balanced"],
        ["memory=balanced", "memory.base_storage=int8"],
        ["memory=low"],
        ["memory=minimal"],
    ]
    return [*modes, ["memory=balanced", f"data.max_num_frames={shorter}"]]


def with_changes(config: Config, change: list[str]) -> Config:
    """This configuration with these overrides of memory, optimizer and length."""
    frozen = weights_of(config.lora).freezes_base
    kind = [] if frozen else ["lora=null", "train.mixed_precision=bf16"]
    values = compose_config(
        [*kind, *(override for override in change if not override.startswith("data."))]
    )
    changed = dataclasses.replace(config, memory=values.memory)
    if any(override.startswith("optimizer=") for override in change):
        changed = dataclasses.replace(changed, optimizer=values.optimizer)
    for override in change:
        if override.startswith("data.max_num_frames="):
            frames = int(override.partition("=")[2])
            changed = dataclasses.replace(
                changed, data=dataclasses.replace(config.data, max_num_frames=frames)
            )
    return changed


def draw_plan(path: Path, config: Config, card: Card, found: Outcome) -> None:
    """A bar for each phase, by what it is for, and the card's memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.55 * len(found.phases) + 1.6), layout="constrained")
    axes = figure.subplots()
    names = [phase.name for phase in found.phases]
    left = [0.0] * len(names)
    for part, colour in zip(
        MEMORY_PARTS, ("#4c72b0", "#c44e52", "#8172b3", "#55a868", "#ccb974"), strict=True
    ):
        widths = [phase.parts[part] / GIB for phase in found.phases]
        axes.barh(names, widths, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    reserved = [
        phase.peak.reserved / GIB - start for phase, start in zip(found.phases, left, strict=True)
    ]
    axes.barh(
        names, [max(0.0, r) for r in reserved], left=left, color="#dddddd", label="reserved, unused"
    )
    axes.axvline(card.usable / GIB, color="black", linestyle="--", label=config.task.card)
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{config.model.path}, memory={config.choices['memory']}: at most, by phase",
        fontsize=10,
        loc="left",
    )
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.savefig(path, dpi=110)


def require_known(config: Config) -> None:
    """UserError unless the model's configuration can be known without its weights."""
    # A built-in model may not be written yet.
    if config.model.is_built_in:
        config.model.local_folder()
    try:
        configs_of(config)
    except KeyError as error:
        raise UserError(
            f"model.path={config.model.path} is neither here nor one of the released checkpoints, so its size is not known: "
            f"give a local folder; its config.json files suffice"
        ) from error
