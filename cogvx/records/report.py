"""The page of one run: RUN/report.html.   [no torch]

The videos come first, then the verdict in a sentence, then how to use the result, then the numbers.
"""

from __future__ import annotations

import csv
import math
import shlex
import statistics
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml
from markupsafe import Markup

from cogvx import compose as composing
from cogvx import config as configuration
from cogvx.files import read_json, read_json_lines, shown
from cogvx.progress import counted
from cogvx.records import figures, pages, record, usage
from cogvx.records.pages import (
    PAGE,
    Interval,
    PageState,
    VideoGroup,
    duration,
    joined,
    setting_text,
    signed,
    size_text,
)
from cogvx.records.present import Doing
from cogvx.records.sweep import State, is_locked, state_after

KIND_NAMES = {"taught": "What it was taught", "other": "The rest of its world"}
MEASURE_NAMES = {
    "all": "all four right",
    "shape": "right shape",
    "colour": "right colour",
    "direction": "right direction",
    "background": "right background",
    "motion": "motion",
    "saturation": "saturation",
    "nearest_clip": "distance to the nearest training clip",
    "text_and_frames": "agreement of text and frames (CLIP)",
}
NOT_SETTINGS = ("output_dir", "data.cache_dir", "model.path")  # places on this machine
MOST_STRIPS = 8  # previews whose frames are shown, evenly spread over the run
SHARES = ("all", "shape", "colour", "direction", "background")


@dataclass(frozen=True)
class Run:
    """What a run has left in its folder so far. What it has not made is empty."""

    folder: Path
    summary: dict
    facts: dict
    metrics: list[dict]
    settings: dict  # the whole config.yaml
    evaluation: dict
    listed: list[dict[str, str]]  # the rows of dataset_report.csv
    planned: dict  # plan.json
    doing: Doing | None  # None: it does not go on

    @classmethod
    def read(cls, folder: Path, *, over: bool = False) -> Run:
        metrics = read_json_lines(folder / "metrics.jsonl")
        logged = max((line["step"] for line in metrics), default=0)
        return cls(
            folder,
            read_json(folder / record.SUMMARY),
            read_json(folder / record.ENVIRONMENT),
            metrics,
            yaml.safe_load((folder / record.CONFIG).read_text(encoding="utf-8")),
            read_json(folder / "evaluation.json"),
            rows_of_report(folder / "dataset_report.csv"),
            read_json(folder / "plan.json"),
            Doing.read(folder, logged) if not over and goes_on(folder) else None,
        )

    @property
    def clips(self) -> dict[str, int]:
        """How many clips, by their use."""
        uses = [row["use"] for row in self.listed]
        return {use: uses.count(use) for use in dict.fromkeys(uses)}

    @property
    def judged(self) -> list[dict]:
        return [line for line in self.metrics if line.get("heldout_loss") is not None]

    @property
    def trained(self) -> list[dict]:
        return [line for line in self.metrics if "loss" in line]

    @property
    def choices(self) -> dict[str, str]:
        return configuration.choices_of(self.settings)


def goes_on(folder: Path) -> bool:
    """A run that is done still holds its lock while it writes its page."""
    return is_locked(folder) and record.finished(folder) is None


def write_page(folder: Path, *, over: bool = False) -> Path:
    """Writes the page from what the run has left in its folder so far; returns its path.

    over: the run has ended, and its folder may still be locked.
    """
    run = Run.read(folder, over=over)
    values, live = values_of_page(run), run.doing is not None
    # It may have ended, and written its last page, in the meantime.
    if live and not goes_on(folder):
        return write_page(folder)
    return pages.render(folder / PAGE, "run.html", live=live, **values)


def values_of_page(run: Run) -> dict[str, object]:
    folder, live = run.folder, run.doing is not None
    recorded = (folder / record.CONFIG).read_text(encoding="utf-8")
    pictures = ("plan", "evaluation", "contact_sheet")
    return {
        "title": folder.name,
        "about": about(run),
        "state": state_in_words(run),
        "now": groups_of_now(run) if live else [],
        "previews": previews(run),
        "videos": videos(run),
        "verdict": verdict(run),
        "curves": curves(run),
        "held_out": held_out(run),
        "usage": usage_of(folder),
        "repeat": command_of_import(run) or command_again(folder),
        "numbers": [group for group in numbers(run) if group[1]],
        "change": heldout_change(run),
        "scores": scores(run),
        **{name: pages.picture_url(folder / f"{name}.png", folder, live=live) for name in pictures},
        "changed": changed_settings(recorded),
        "config": recorded,
    }


def command_of_import(run: Run) -> str | None:
    """An import is repeated by its own command. Its record alone would start a training."""
    if "imported_form" not in run.summary:
        return None
    return shlex.join(["python", "launch.py", *run.facts.get("command", [])[1:]])


def command_again(folder: Path) -> str:
    return f"python launch.py --config-dir {shlex.quote(shown(folder))} --config-name config"


def rows_of_report(report: Path) -> list[dict[str, str]]:
    if not report.is_file():
        return []
    with report.open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


# -- the head ------------------------------------------------------------------------------------


def about(run: Run) -> str:
    """`LoRA of rank 64 on nano; 27 clips, 960 steps in 3 min 10 s`."""
    choices, lora = run.choices, run.settings.get("lora")
    if choices.get("task") != "train":
        return f"task={choices.get('task')}, model {choices.get('model')}"
    what = "Every weight" if lora is None else f"LoRA of rank {lora['rank']}"
    parts = [f"{what} on {choices['model']}"]
    if "train" in run.clips:
        parts.append(counted(run.clips["train"], "clip"))
    if "imported_form" in run.summary:
        return f"{parts[0]}, imported: {run.summary['imported_form']}"
    step = run.summary.get("step") or (run.trained[-1]["step"] if run.trained else 0)
    parts.append(counted(step, "step"))
    if "seconds" in run.summary:
        parts.append(duration(run.summary["seconds"]))
    return ", ".join(parts)


def state_in_words(run: Run) -> PageState | None:
    """None for a run that is done: then the page speaks for itself."""
    if run.summary.get("status") == State.done.name:
        return None
    if run.doing is not None:
        doing = run.doing
        share = doing.step / doing.steps if doing.steps else None
        words = (
            f"This run is still running. {doing.words}."
            if doing.words
            else "This run is still running."
        )
        return PageState("run", words, doing.seconds_left, share)
    state = state_after(run.summary, started=bool(run.facts))
    reason = run.summary.get("reason")
    if state is State.pending:
        return PageState("run", "This run has not been started.")
    why = f": {reason}" if reason else "."
    return PageState("run", f"This run ended early ({state.value}){why}")


def groups_of_now(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """What one wants to know first of a run that goes on."""
    return [
        ("So far", [*said_of_now(run)]),
        ("Peak memory by phase so far", [*said_of_phases(run)]),
    ]


def said_of_now(run: Run):
    timed = [line["seconds"] for line in run.trained if line.get("seconds")]
    if timed:
        yield "Time of a step", seconds_and_plan(statistics.median(timed), run.facts)
    if run.trained:
        last = run.trained[-1]
        yield "Training loss", f"{last['loss']:.4f} (steps up to {last['step']})"
    if run.judged:
        last, base = run.judged[-1], run.judged[0]
        now = f"{last['heldout_loss']:.4f} after step {last['step']}; " if last != base else ""
        yield "Held-out loss", f"{now}base model {base['heldout_loss']:.4f}"


def previews(run: Run) -> dict | None:
    """The newest preview as a video, and the frames of up to MOST_STRIPS of all of them."""
    steps, live = pages.preview_steps(run.folder), run.doing is not None
    found = [(step, video) for step in steps for video in sorted(step.glob("*.mp4"))]
    if not found:
        return None
    said = read_json(run.folder / "previews" / "about.json")
    label, newest = pages.step_in_words(found[-1][0]), [("preview", found[-1][1])]
    group = pages.panels([(label, newest[0][1])], run.folder, embed=not live)
    every = max(1, -(-len(found) // MOST_STRIPS))
    strips = [
        {
            "label": pages.step_in_words(step),
            "picture": pages.picture_url(video.with_suffix(".png"), run.folder, live=live),
        }
        for step, video in found[::-1][::every][::-1]
    ]
    return {
        "about": said.get("about", ""),
        "newest": VideoGroup(said.get("prompt", ""), group),
        "strips": strips,
    }


def held_out(run: Run) -> dict | None:
    """The held-out clips as the model sees them, with their captions."""
    captions = [row["prompt"] for row in run.listed if row["use"] == "held out"]
    pictures = sorted((run.folder / "held_out").glob("*.png"))
    if not captions or not pictures:
        return None
    live = run.doing is not None
    said = f"{counted(len(captions), 'clip')}, never trained on"
    more = len(captions) - len(pictures)
    clips = [
        {"caption": caption, "picture": pages.picture_url(picture, run.folder, live=live)}
        for caption, picture in zip(captions, pictures, strict=False)
    ]
    return {"about": f"{said}." if more <= 0 else f"{said}; {more} more.", "clips": clips}


def videos(run: Run) -> list[VideoGroup]:
    """For each prompt and seed: base model, tuned model and, if there is one, a real clip.

    For task=generate: every variant.
    """
    tuned = pages.newest_videos(run.folder)
    found = {}
    # While the first steps are trained, there are only the base model's.
    for name in tuned or pages.base_videos(run.folder):
        base, clip = pages.base_video(run.folder, name), pages.clip_beside(run.folder, name)
        found[name] = [("base model", base)] if base.is_file() else []
        found[name] += [(tuned_label(run, tuned[name]), tuned[name])] if name in tuned else []
        found[name] += [] if clip is None else [clip]
    found |= pages.generated_videos(run.folder)
    embed = run.doing is None and pages.can_embed(
        [path for those in found.values() for _, path in those]
    )
    starts = pages.row_starts(run.folder)
    return [
        VideoGroup(
            pages.prompt_of_video(run.folder, name),
            pages.panels(those, run.folder, embed=embed, starts=starts),
        )
        for name, those in found.items()
    ]


def tuned_label(run: Run, video: Path) -> str:
    return "tuned" if run.doing is None else f"tuned, {pages.step_in_words(video.parent)}"


# -- the verdict ---------------------------------------------------------------------------------


def heldout_change(run: Run) -> Interval | None:
    """From the base model to the last evaluation, clip by clip."""
    if len(run.judged) < 2:
        return None
    first, last = (line.get("heldout_by_clip") or [] for line in (run.judged[0], run.judged[-1]))
    return pages.difference_interval(first, last)


def verdict(run: Run) -> list[str]:
    """One or two sentences; empty while there is nothing to judge."""
    found = (plan_verdict(run.summary), loss_verdict(run), score_verdict(run))
    return [sentence for sentence in found if sentence]


def plan_verdict(summary: dict) -> str:
    """Of task=plan."""
    if "fits" not in summary:
        return ""
    fits = "fits" if summary["fits"] else "does not fit"
    return (
        f"This training {fits} on {summary['card']}: its peak is "
        f"{summary['peak_reserved_gib']:.1f} GiB, in the phase {summary['peak_phase']}."
    )


def loss_verdict(run: Run) -> str:
    if len(run.judged) < 2:
        return ""
    before, after = run.judged[0]["heldout_loss"], run.judged[-1]["heldout_loss"]
    if f"{before:.4f}" == f"{after:.4f}":
        return f"The held-out loss did not change: {after:.4f}."
    word = "fell" if after < before else "rose"
    percent = abs(after - before) / before
    said = f"The held-out loss {word} by {percent:.0%}, from {before:.4f} to {after:.4f}"
    change = heldout_change(run)
    if change is None:
        single = run.clips.get("held out") == 1
        return f"{said}" + (". A single held-out clip gives no interval." if single else ".")
    said += f": a change of {change.text}."
    if change.includes_zero:
        clips = len(run.judged[-1]["heldout_by_clip"])
        return f"{said} The interval includes 0: on {clips} held-out clips this may be chance."
    if after < before:
        return f"{said} The interval excludes 0: better, also on clips that it was not trained on."
    return f"{said} The interval excludes 0: the tuned model is worse. Try a lower learning rate."


def score_verdict(run: Run) -> str:
    summary = run.summary
    if summary.get("score_taught") is None:
        return ""
    return (
        f"Of the videos of what it was taught, {summary['score_taught']:.0%} show it (base model: "
        f"{summary['score_taught_base']:.0%}). Of the videos of the rest of its world, "
        f"{summary['score_other']:.0%} are as the prompt says (base model: "
        f"{summary['score_other_base']:.0%})."
    )


def curves(run: Run) -> list[Markup]:
    drawn, judged, trained = [], run.judged, run.trained
    if len(judged) >= 2:
        steps = [line["step"] for line in judged]
        losses = [line["heldout_loss"] for line in judged]
        drawn.append(figures.heldout_curve(steps, losses, bands(judged)))
    finite = [line for line in trained if math.isfinite(line["loss"])]
    if len(finite) >= 2:
        steps, losses = [line["step"] for line in finite], [line["loss"] for line in finite]
        drawn.append(figures.training_curve(steps, losses))
    return drawn


def bands(judged: list[dict]) -> list[tuple[float, float] | None]:
    """For each point: the base model's loss plus the 95 % interval of the change since."""
    base, first = judged[0]["heldout_loss"], judged[0].get("heldout_by_clip") or []
    found = []
    for line in judged:
        change = pages.difference_interval(first, line.get("heldout_by_clip") or [])
        found.append(None if change is None else (base + change.low, base + change.high))
    return found


def usage_of(folder: Path) -> str | None:
    settings = read_json(folder / usage.INFERENCE_SETTINGS)
    return usage.snippet(folder, settings) if settings else None


# -- the numbers ---------------------------------------------------------------------------------


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
        when = "After training" if run.doing is None else f"After step {judged[-1]['step']}"
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


def scores(run: Run) -> list[dict]:
    """For each judged variant, a table of its measures with their intervals."""
    tables = []
    for variant, found in run.evaluation.get("comparisons", {}).items():
        kinds = []
        for kind in dict.fromkeys(each["kind"] for each in found):
            those = [each for each in found if each["kind"] == kind]
            rows = [score_row(each) for each in those]
            reach = max([abs(end) for r in rows for end in (r["interval"].low, r["interval"].high)])
            name = f"{KIND_NAMES.get(kind, kind)}: {counted(those[0]['videos'], 'video')}"
            kinds.append({"name": name, "rows": rows, "reach": reach or 1.0})
        label = "the result" if variant == "result" else variant
        tables.append({"variant": label, "kinds": kinds})
    return tables


def score_row(found: dict) -> dict:
    share = found["measure"] in SHARES
    form = "{:.0%}" if share else "{:.3f}"
    interval = Interval(found["difference"], found["low"], found["high"])
    return {
        "measure": MEASURE_NAMES.get(found["measure"], found["measure"].replace("_", " ")),
        "base": form.format(found["base"]),
        "tuned": form.format(found["tuned"]),
        "change": change_text(interval.mean, share=share),
        "between": " to ".join(change_text(v, share=share) for v in (interval.low, interval.high)),
        "interval": interval,
    }


def change_text(value: float, *, share: bool) -> str:
    """A share changes by percentage points, all else by its own unit."""
    return f"{signed(100 * value, 0)} %" if share else signed(value)


# -- settings ------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def changed_settings(recorded: str) -> list[tuple[str, str, str]]:
    """Each setting that differs from its default: name, value, default.

    recorded: the text of a config.yaml. Composing the defaults takes as long as all the rest of a
    page, and they never change.
    """
    settings = yaml.safe_load(recorded)
    usual = yaml.safe_load((configuration.CONF / "config.yaml").read_text(encoding="utf-8"))
    try:
        mine, usual_choices = flat_settings(settings), configuration.choices_of(usual)
        theirs = usual_choices | composing.defaults_for(settings)
    except (*configuration.HYDRAS, KeyError):  # a record of another version
        return []
    return [
        (key, setting_text(value), setting_text(theirs[key]))
        for key, value in mine.items()
        if key in theirs
        and key not in NOT_SETTINGS
        and setting_text(value) != setting_text(theirs[key])
    ]


def flat_settings(settings: dict) -> dict[str, object]:
    """Every value of a record by its full name, the options chosen first."""
    values = {key: value for key, value in settings.items() if key != "defaults"}
    return configuration.choices_of(settings) | configuration.flat(values)
