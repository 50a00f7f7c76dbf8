"""task=plan: does it fit, and how long will it take? It needs no weights and no GPU.

Every figure comes from running the run's own code on tensors without contents (plan/phases.py).
The README says how close the figures come to measured ones.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cogvx.compose import compose_config
from cogvx.config import Config
from cogvx.errors import UserError, lacking
from cogvx.files import replacing, shown, write_json
from cogvx.libraries import load_libraries
from cogvx.model.trained_weights import weights_of
from cogvx.options.cards import CARDS, Card
from cogvx.options.train import Attention, Precision
from cogvx.plan.allocator import GIB, gib, replay
from cogvx.plan.configs import (
    at_given_size,
    at_largest_bucket,
    configs_of,
    geometry_of,
    layers_of,
)
from cogvx.plan.found import MEMORY_PARTS, PHASES, Outcome, Phase, at_layers
from cogvx.plan.making import TRACED, video_facts, video_lines
from cogvx.plan.smaller import suggest
from cogvx.plan.times import UNCERTAIN, Times, times_on
from cogvx.plan.traces import Asked, traces
from cogvx.progress import heartbeat

PART_COLOURS = ["#4c72b0", "#c44e52", "#8172b3", "#55a868", "#ccb974"]

IN_TWO_PROCESSES = [["load", "held-out loss", "train"], ["encode clips", "encode prompts", "video"]]


def plan(config: Config, folder: Path) -> dict:
    """Prints the plan, writes plan.json and plan.png, and returns the run's summary."""
    require_known(config)
    card, of_training = CARDS[config.task.card], config.task.trains
    print_headline(config)
    found, facts = plan_step(config, card) if of_training else plan_video(config, card)
    result = memory_facts(config, card, found) | facts
    print_memory(config, card, found, result)
    print(step_lines(config, result) if of_training else video_lines(config, result))
    if config.train.mixed_precision is Precision.bf16 and not card.generation.bf16:
        print(f"warning {config.task.card} has no bf16: 2B works in fp16, 5B needs another card")
    if not result["fits"]:
        result["suggestions"] = suggest(config, card, found)
    # The plan is safe before anything really runs, which may run out of memory.
    write_json(folder / "plan.json", result)
    if missing := lacking("matplotlib", "plan.png"):
        print(f"picture {missing[0]}")
    else:
        draw_plan(folder / "plan.png", config, card, found)
        print(f"picture {shown(folder / 'plan.png')}")
    if config.task.measure:
        result["measured"] = measure_phases(config, found)
        write_json(folder / "plan.json", result)
    return result


def plan_step(config: Config, card: Card) -> tuple[Outcome, dict]:
    found, necessary = trace_run(config)
    return found, step_facts(config, card, found, necessary)


def plan_video(config: Config, card: Card) -> tuple[Outcome, dict]:
    found = trace_video(config)
    return found, video_facts(config, card, found)


def trace_video(config: Config) -> Outcome:
    """Encoding the prompts, and the phases of a video."""
    with heartbeat("plan    still running the phases"):
        prompts, video = traces([(config, phases, None) for phases in TRACED], say_planned)
    print()
    host = max(prompts.host, video.host)
    return dataclasses.replace(video, phases=prompts.phases + video.phases, host=host)


def trace_run(config: Config) -> tuple[Outcome, float]:
    """All phases, and the FLOPs that a step needs at least."""
    largest = at_largest_bucket(config)
    plain = plainly(largest)
    jobs = [*jobs_of_phases(config, largest)]
    jobs += [(plain, ["train"], layers) for layers in (2, 3)]
    with heartbeat("plan    still running the phases"):
        first, *others, plain_two, plain_three = traces(jobs, say_planned)
    print()
    # Making videos loads the model too: "load" comes twice.
    later = [phase for each in others for phase in each.phases if phase.name != "load"]
    phases = sorted(first.phases + later, key=lambda phase: PHASES.index(phase.name))
    host = max(each.host for each in (first, *others))
    layers = layers_of(config)
    necessary = at_layers(layers, plain_two.phase("train").flops, plain_three.phase("train").flops)
    return Outcome(phases, host, first.optimizer, first.trained), necessary


def jobs_of_phases(config: Config, largest: Config) -> list[Asked]:
    """Clips are encoded and trained at the largest bucket. Videos have the given size."""
    given = at_given_size(config)
    if given == largest:
        return [(largest, phases, None) for phases in IN_TWO_PROCESSES]
    training, (*encoding, video) = IN_TWO_PROCESSES
    return [(largest, training, None), (largest, encoding, None), (given, [video], None)]


def say_planned(job: Asked, left: int) -> None:
    _, phases, layers = job
    what = ", ".join(phases) if layers is None else f"{phases[0]} with {layers} layers"
    rest = "nothing is left" if left == 0 else f"{left} more to go"
    print(f"        planned {what}; {rest}", flush=True)


def memory_facts(config: Config, card: Card, found: Outcome) -> dict:
    """What plan.json holds of every plan."""
    highest = max(found.phases, key=lambda phase: phase.peak.reserved)
    return {
        "status": "done",
        "of": config.task.of.value,
        "model": config.model.path,
        "card": config.task.card,
        "fits": highest.peak.reserved <= card.usable,
        "peak_reserved_gib": gib(highest.peak.reserved),
        "peak_phase": highest.name,
        "phases": {phase.name: phase_facts(phase) for phase in found.phases},
        "attention": planned_kernel(config, card).name,
        "host_gib": gib(found.host),
    }


def step_facts(config: Config, card: Card, found: Outcome, necessary: float) -> dict:
    """What plan.json holds of training, beside the memory."""
    train = found.phase("train")
    times = times_on(card, train, config.train.attention)
    return {
        "tflop_per_step": train.flops / 1e12,
        "necessary_tflop_per_step": necessary / 1e12,
        "seconds_per_step": round(times.total, 2),
        "seconds_by_kind": dataclasses.asdict(times),
        "cache_mib_per_clip": round(cache_bytes(at_largest_bucket(config)) / 2**20, 2),
        "checkpoint_gib": gib(found.trained + found.optimizer),
    }


def planned_kernel(config: Config, card: Card) -> Attention:
    wanted = config.train.attention
    return wanted if wanted is Attention.math else card.generation.kernel(wanted)


def measure_phases(config: Config, found: Outcome) -> dict:
    """Really runs the phases, with two training steps, and compares them with the plan.

    On a GPU: what CUDA's allocator and the clock say. On a CPU: what was really allocated,
    compared with a plan for the CPU, which has neither CUDA's kernels nor its allocator.
    """
    load_libraries()
    import torch

    from cogvx.plan.phases import run_phases

    print("\nmeasure runs every phase for real, with weights that mean nothing ...", flush=True)
    names, largest = [phase.name for phase in found.phases], at_largest_bucket(config)
    if largest != at_given_size(config):
        # It is planned at another size than the others.
        names.remove("video")
    config = largest
    if torch.cuda.is_available():
        meter = run_phases(config, names, steps=2, device=torch.device("cuda"))
        planned = {phase.name: phase.peak for phase in found.phases}
        # Nothing is timed while a video is made.
        seconds = meter.laps[-1] if meter.laps else None
        real, where = meter.peaks, torch.cuda.get_device_name()
    else:
        planned, real = (
            replay(run_phases(config, names, as_cuda=False, fake=fake).events)
            for fake in (True, False)
        )
        seconds, where = None, "this CPU (and planned for it)"
    rows = {
        name: {
            "planned_gib": gib(planned[name].allocated),
            "measured_gib": gib(real[name].allocated),
            "planned_reserved_gib": gib(planned[name].reserved),
            "measured_reserved_gib": gib(real[name].reserved),
        }
        for name in names
    }
    print_measured(where, rows)
    if seconds is not None:
        times = times_on(CARDS[config.task.card], found.phase("train"), config.train.attention)
        error = times.total / seconds - 1
        print(f"{'seconds per step':52}{times.total:10.2f}{seconds:10.2f}{error:+9.1%}")
    return {"where": where, "seconds_per_step": seconds, "phases": rows}


def print_measured(where: str, rows: dict[str, dict]) -> None:
    print(f"\n{'GiB allocated, on ' + where:52}{'planned':>10}{'measured':>10}{'error':>9}")
    for name, row in rows.items():
        planned, measured = row["planned_gib"], row["measured_gib"]
        error = measured and planned / measured - 1
        print(f"{name:52}{planned:10.3f}{measured:10.3f}{error:+9.1%}")


def plainly(config: Config) -> Config:
    """The same step, but nothing is computed twice: it takes the fewest FLOPs."""
    return dataclasses.replace(config, memory=compose_config(["memory=fast"]).memory)


def phase_facts(phase: Phase) -> dict:
    return {
        "allocated_gib": gib(phase.peak.allocated),
        "reserved_gib": gib(phase.peak.reserved),
        **{f"{name}_gib": gib(size) for name, size in phase.parts.items()},
        "tflop": round(phase.flops / 1e12, 2),
    }


def cache_bytes(config: Config) -> int:
    """The cache's size for one clip: its latents, its encoded images and its prompt."""
    configs, data, geometry = configs_of(config), config.data, geometry_of(config)
    size = 4 if config.train.mixed_precision is Precision.no else 2  # bytes of a number
    pixels = data.height // geometry.spatial_stride * (data.width // geometry.spatial_stride)
    frames = (data.max_num_frames - 1) // geometry.temporal_stride + 1
    frames += (1 + data.image_noise_variants) if geometry.image_to_video else 0
    prompt = geometry.text_tokens * configs["transformer"]["text_embed_dim"]
    return size * (2 * geometry.latent_channels * frames * pixels + prompt)


def print_headline(config: Config) -> None:
    trains, sampling = config.task.trains, config.validation
    data = at_largest_bucket(config).data if trains else config.data
    kind = weights_of(config.lora)
    if trains:
        what = f"{kind}, batch {config.train.train_batch_size}"
    else:
        with_lora = f"with a {kind}" if kind.has_strength else "without a LoRA"
        what = (
            f"a video {with_lora}, {sampling.num_inference_steps} steps, "
            f"guidance {sampling.guidance_scale:g}"
        )
    clips = f"{data.max_num_frames} frames of {data.width}x{data.height}"
    if trains and config.data.buckets is not None:
        clips = f"its largest bucket, {clips}"
    print(
        f"plan    {config.model.path}, {what}, "
        f"{clips}, "
        f"{config.train.mixed_precision.name}, memory={config.choices['memory']}"
    )
    if config.parallel.num_processes > 1:
        print(
            f"        for each of {config.parallel.num_processes} processes, "
            f"with the copy of the gradients that ddp makes"
        )
    print(
        "        runs the code of every phase without weights: about half a minute, once ...",
        flush=True,
    )


def print_memory(config: Config, card: Card, found: Outcome, result: dict) -> None:
    parts = "".join(f"{part:>12}" for part in MEMORY_PARTS)
    print(f"{'GiB':16}{'allocated':>10}{'reserved':>10}{'':3}{parts}")
    for phase in found.phases:
        peaks = f"{phase.peak.allocated / GIB:10.2f}{phase.peak.reserved / GIB:10.2f}"
        sizes = "".join(f"{phase.parts[part] / GIB:12.2f}" for part in MEMORY_PARTS)
        print(f"{phase.name:16}{peaks}{'':3}{sizes}")
    verdict = "it fits" if result["fits"] else "it does NOT fit"
    print(
        f"\nmemory  at most {result['peak_reserved_gib']:.2f} GiB, in '{result['peak_phase']}'. "
        f"{config.task.card} has {card.usable / GIB:.1f} GiB free: {verdict}\n"
        f"{ram_line(config, result)}"
    )


def step_lines(config: Config, result: dict) -> str:
    executed, necessary = result["tflop_per_step"], result["necessary_tflop_per_step"]
    seconds, steps = result["seconds_per_step"], config.train.max_train_steps
    whole = "" if steps is None else f"; {steps} steps: about {steps * seconds / 3600:.1f} h"
    return (
        f"compute {executed:.0f} TFLOP a step; {necessary:.0f} if nothing is computed twice "
        f"({executed / necessary:.2f} times)\n"
        f"time    about {seconds:.1f} s a step on {config.task.card}, +-{UNCERTAIN:.0%}{whole}; "
        f"attention by {result['attention']}\n"
        f"        {Times(**result['seconds_by_kind']).in_words()}\n"
        f"disk    {result['cache_mib_per_clip']:.1f} MiB of cache for each clip; "
        f"{result['checkpoint_gib']:.2f} GiB for each checkpoint"
    )


def ram_line(config: Config, result: dict) -> str:
    """Every process has its own copy of what waits in RAM."""
    processes, gib_each = config.parallel.num_processes, result["host_gib"]
    what = f"{gib_each:.1f} GiB of weights and activations, plus about 2 GiB for Python"
    if processes == 1:
        return f"RAM     at most {what}"
    together = processes * (gib_each + 2)
    return f"RAM     by process at most {what}; {processes} processes: {together:.0f} GiB"


def draw_plan(path: Path, config: Config, card: Card, found: Outcome) -> None:
    """A bar for each phase, by what the memory is for, and a line at the card's memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.55 * len(found.phases) + 1.6), layout="constrained")
    axes = figure.subplots()
    names = [phase.name for phase in found.phases]
    left = [0.0] * len(names)
    for part, colour in zip(MEMORY_PARTS, PART_COLOURS, strict=True):
        widths = [phase.parts[part] / GIB for phase in found.phases]
        axes.barh(names, widths, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    unused = [
        max(0.0, phase.peak.reserved / GIB - used)
        for phase, used in zip(found.phases, left, strict=True)
    ]
    axes.barh(names, unused, left=left, color="#dddddd", label="reserved, unused")
    axes.axvline(card.usable / GIB, color="black", linestyle="--", label=config.task.card)
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.spines[["top", "right"]].set_visible(False)
    title = f"{config.model.path}, memory={config.choices['memory']}: the peak of each phase"
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def require_known(config: Config) -> None:
    """UserError if the model's configuration is not known without downloading it."""
    # A built-in model may not be written to disk yet.
    if config.model.is_built_in:
        config.model.local_folder()
    try:
        configs_of(config)
    except KeyError as error:
        raise UserError(
            f"model.path={config.model.path} is neither a folder here nor one of the released "
            f"checkpoints, so its size is not known. Give a local folder in the diffusers "
            f"layout: its config.json files are enough"
        ) from error
