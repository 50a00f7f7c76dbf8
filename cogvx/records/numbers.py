"""The numbers on the page of a run: lines of a name and a value with its unit.   [no torch]"""

from __future__ import annotations

import shlex
import statistics

from cogvx.records.left import Run
from cogvx.records.pages import duration, joined, size_text


def numbers(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of lines: what was measured, and its value with its unit."""
    return [
        ("The plan", [*said_of_plan(run.summary)]),
        ("Training", [*said_of_training(run)]),
        ("Held-out loss", [*said_of_heldout(run)]),
        ("Speed and memory", [*said_of_speed(run)]),
        ("Peak memory by phase", [*said_of_phases(run)] if run.doing is None else []),
        ("Where it ran", [*said_of_place(run)]),
    ]


def said_of_plan(summary: dict):
    if "fits" not in summary:
        return
    yield "Card", summary["card"]
    yield (
        "Peak memory",
        f"{summary['peak_reserved_gib']:.2f} GiB in the phase {summary['peak_phase']}",
    )
    yield "Memory of the machine", size_text(summary["host_gib"] * 2**30)
    if "seconds_per_video" in summary:
        yield "Time of a video", f"{summary['seconds_per_video']:.3g} s"
        return
    yield "Time of a step", f"{summary['seconds_per_step']:.3g} s"
    yield "Compute of a step", f"{summary['tflop_per_step']:.3g} TFLOP"
    yield "Size of a checkpoint", size_text(summary["checkpoint_gib"] * 2**30)
    yield "Cache for each clip", size_text(summary["cache_mib_per_clip"] * 2**20)


def said_of_training(run: Run):
    summary, trained, planned = run.summary, run.trained, run.facts.get("steps")
    if run.clips:
        uses = {"train": "trained on", "held out": "held out"}
        yield "Clips", ", ".join(f"{n} {uses.get(use, use)}" for use, n in run.clips.items())
    if planned:
        done = summary.get("step") or (trained[-1]["step"] if trained else 0)
        yield "Optimizer steps", f"{done} of {planned}" if done != planned else f"{done}"
    if trained:
        when = "at the end" if run.doing is None else "now"
        yield f"Training loss {when}", f"{trained[-1]['loss']:.4f}"
        if trained[-1].get("grad_norm") is not None:
            yield f"Gradient norm {when}", f"{trained[-1]['grad_norm']:.3g}"
        if trained[-1].get("lr") is not None:
            yield f"Learning rate {when}", f"{trained[-1]['lr']:.3g}"
    skipped = sum("skipped" in line for line in run.metrics)
    if skipped:
        yield "Steps left out (gradient not finite)", str(skipped)
    for what, steps in run.skipped_validation.items():
        yield f"Memory ended: no {what} after step", ", ".join(map(str, steps))
    weights = run.facts.get("dtypes", {}).get("trained")
    if weights:
        kinds = [f"{number / 1e6:.2f} million in {n}" for n, number in weights.items()]
        yield "Trained weights", joined(kinds)


def said_of_heldout(run: Run):
    summary, judged = run.summary, run.judged
    if not judged:
        if summary.get("objective") is not None:
            yield "Held-out loss", f"{summary['objective']:.4f}"
        return
    yield "Base model", f"{judged[0]['heldout_loss']:.4f}"
    if len(judged) > 1:
        known = run.doing is None and not run.lost_its_judge
        when = "After training" if known else f"After step {judged[-1]['step']}"
        yield when, f"{judged[-1]['heldout_loss']:.4f}"
    if summary.get("best_heldout_loss") is not None:
        best = f"{summary['best_heldout_loss']:.4f} after step {summary['best_step']}"
        yield "Lowest of the kept checkpoints", best
    if judged[-1].get("heldout_loss_trained") is not None:
        yield "Without averaging the weights", f"{judged[-1]['heldout_loss_trained']:.4f}"
    if judged[-1].get("heldout_noise_floor") is not None:
        yield (
            "Noise of the measurement",
            f"\N{PLUS-MINUS SIGN}{judged[-1]['heldout_noise_floor']:.4f}",
        )


def said_of_speed(run: Run):
    summary, facts = run.summary, run.facts
    if summary.get("seconds") is not None:
        yield "Whole run", duration(summary["seconds"])
    timed = [line["seconds"] for line in run.trained if line.get("seconds")]
    if timed:
        middle = statistics.median(timed)
        yield "Time of a step", seconds_and_plan(middle, facts)
        waited = [line["data_seconds"] for line in run.trained if "data_seconds" in line]
        if waited:
            yield "Of that, waiting for data", f"{statistics.median(waited) / middle:.0%}"
    rates = [line["tokens_per_second"] for line in run.trained if "tokens_per_second" in line]
    if rates:
        yield "Tokens a second", f"{statistics.median(rates):,.0f}"
    if summary.get("peak_memory_gib") is not None:
        yield "Peak memory", f"{summary['peak_memory_gib']:.2f} GiB"


def seconds_and_plan(seconds: float, facts: dict) -> str:
    planned = facts.get("planned_seconds_per_step")
    plan = "" if planned is None else f" (planned: {planned:.3g} s)"
    return f"{seconds:.3g} s{plan}"


def said_of_phases(run: Run):
    kinds = {
        "reserved_gib": "reserved",
        "allocated_gib": "allocated",
        "process_gib": "of the process",
    }
    measured = run.summary.get("memory_by_phase", {})
    measured = measured if run.doing is None else run.doing.memory_by_phase
    for phase, peaks in measured.items():
        sizes = [f"{peaks[name]:.2f} GiB {kind}" for name, kind in kinds.items() if name in peaks]
        planned = run.planned.get("phases", {}).get(phase, {}).get("reserved_gib")
        plan = "" if planned is None else f" (planned: {planned:.2f} GiB reserved)"
        yield phase.capitalize(), f"{joined(sizes)}{plan}"


def said_of_place(run: Run):
    facts = run.facts
    if "started" in facts:
        yield "Started", facts["started"].replace("T", " ")
    if "command" in facts:
        yield "Command", shlex.join(["python", *facts["command"]])
    if facts.get("device"):
        processes = facts.get("processes", 1)
        yield "Device", facts["device"] + (f", {processes} processes" if processes > 1 else "")
    packages = facts.get("packages", {})
    versions = [f"{n} {packages[n]}" for n in ("torch", "diffusers", "peft") if n in packages]
    if "python" in facts:
        yield "Software", ", ".join([f"Python {facts['python']}", *versions])
    if facts.get("platform"):
        yield "System", facts["platform"]
    if facts.get("git_commit"):
        changes = " with uncommitted changes (uncommitted.patch)" if facts.get("git_dirty") else ""
        yield "Code", f"commit {facts['git_commit'][:8]}{changes}"
    if facts.get("rerun_of"):
        is_repeated = run.choices.get("task") == "train"
        yield "Repeats" if is_repeated else "Settings from", facts["rerun_of"]
