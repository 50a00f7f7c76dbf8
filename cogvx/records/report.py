"""The page of one run: RUN/report.html.   [no torch]

The videos come first, then the verdict in a sentence, then how to use the result, then the numbers.
"""

from __future__ import annotations

import math
import shlex
import statistics
from functools import lru_cache
from pathlib import Path

import yaml
from markupsafe import Markup

from cogvx import compose as composing
from cogvx import config as configuration
from cogvx.errors import UserError
from cogvx.files import read_json, shown
from cogvx.progress import counted
from cogvx.records import figures, pages, record, usage
from cogvx.records.dataset import DATASET_PAGE
from cogvx.records.left import Run, goes_on
from cogvx.records.numbers import numbers, said_of_phases, seconds_and_plan
from cogvx.records.pages import (
    PAGE,
    Interval,
    PageState,
    VideoGroup,
    duration,
    setting_text,
    signed,
)
from cogvx.records.sweep import State, state_after

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
        "dataset": DATASET_PAGE if (folder / DATASET_PAGE).is_file() else None,
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
    losses = (judge_verdict(run), loss_verdict(run), source_verdict(run))
    found = (plan_verdict(run.summary), *losses, score_verdict(run))
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


def judge_verdict(run: Run) -> str:
    if not run.lost_its_judge:
        return ""
    return (
        f"Memory ended while the held-out loss of the result was computed: it is not known. The "
        f"last one is that after step {run.judged[-1]['step']}."
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


def source_verdict(run: Run) -> str:
    """Of data=mix: the held-out loss of each source."""
    if len(run.judged) < 2 or "heldout_by_source" not in run.judged[-1]:
        return ""
    first, last = (line["heldout_by_source"] for line in (run.judged[0], run.judged[-1]))
    losses = [f"{source} from {first[source]:.4f} to {last[source]:.4f}" for source in last]
    return f"By source: {', '.join(losses)}."


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


# -- the scores ----------------------------------------------------------------------------------


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
    try:
        configuration.require_plain_values(Path("config.yaml"), settings)
    except UserError:  # somebody else's
        return []
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
