"""One page about a run that opens in any browser, offline.   [no torch]"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from cogvx.files import read_json, read_json_lines, write_text
from cogvx.records import record

PAGE = "report.html"
MOST_EMBEDDED = 40 * 2**20  # bytes of video in the page; more stay files beside it, and are linked


def write(folder: Path) -> Path:
    """From what the run left in its folder; returns the page. Parts that a run did not make are left out."""
    summary, facts = read_json(folder / record.SUMMARY), read_json(folder / record.ENVIRONMENT)
    metrics = read_json_lines(folder / "metrics.jsonl")
    parts = [
        f"<h1>{escape(folder.name)}</h1>",
        table(
            {name: value for name, value in summary.items() if isinstance(value, str | int | float)}
        ),
        section("Memory by phase", picture(folder / "plan.png")),
        section("Losses", curves(metrics)),
        section("Videos: base model, tuned, a training clip", videos(folder)),
        section("Scores", scores(folder)),
        section(
            "Videos of the base model and of each variant: first, middle and last frame",
            picture(folder / "evaluation.png"),
        ),
        section("What the model saw", picture(folder / "contact_sheet.png")),
        section(
            "Settings", f"<pre>{escape((folder / record.CONFIG).read_text(encoding='utf-8'))}</pre>"
        ),
        section(
            "Where it ran",
            table({name: value for name, value in facts.items() if name != "packages"}),
        ),
    ]
    page = f"<!doctype html><meta charset=utf-8><title>{escape(folder.name)}</title><style>{STYLE}</style>{''.join(parts)}\n"
    write_text(folder / PAGE, page)
    return folder / PAGE


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } table { border-collapse: collapse }
td { padding: .1rem 1rem .1rem 0; vertical-align: top; overflow-wrap: anywhere } td:first-child { color: #666; white-space: nowrap }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto } img, svg { max-width: 100%; height: auto }
video { height: 15rem; image-rendering: pixelated; margin-right: .5rem }
"""


def section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def table(values: dict[str, object]) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(name))}<td>{escape(in_cell(value))}" for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def in_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def curves(metrics: list[dict]) -> str:
    """Training and held-out loss by step, as SVG."""
    train = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    heldout = [
        (line["step"], line["heldout_loss"], line["heldout_standard_error"] or 0)
        for line in metrics
        if "heldout_loss" in line
    ]
    if not train:
        return ""
    figure, axes = pyplot().subplots(figsize=(9, 3.5), layout="constrained")
    axes.plot(
        *zip(*train, strict=True),
        color="#9ab",
        linewidth=1.2,
        label="training loss, mean of the steps since the last point",
    )
    if heldout:
        steps, losses, errors = zip(*heldout, strict=True)
        axes.errorbar(
            steps,
            losses,
            yerr=errors,
            color="#c40",
            marker="o",
            markersize=4,
            capsize=3,
            label="held-out loss, with its standard error",
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean squared error of the velocity")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def pyplot():
    """Imported when something is drawn; needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def svg(figure) -> str:
    """The drawing as a part of a page; it is closed."""
    written = io.StringIO()
    figure.savefig(written, format="svg")
    pyplot().close(figure)
    return (
        written.getvalue().split("?>", 1)[1].split(">", 1)[1]
    )  # without the XML and DOCTYPE heads


def videos(folder: Path) -> str:
    """The newest step's before-and-after videos, playing."""
    found = sorted((folder / "validation").glob("step_*/*_before_after.mp4"))
    newest = [path for path in found if path.parent == found[-1].parent]
    embed = sum(path.stat().st_size for path in newest) <= MOST_EMBEDDED
    sources = [
        f"data:video/mp4;base64,{encoded(path)}" if embed else str(path.relative_to(folder))
        for path in newest
    ]
    return "".join(
        f"<video src='{escape(source)}' autoplay loop muted playsinline controls></video>"
        for source in sources
    )


def scores(folder: Path) -> str:
    """Of every variant that was judged, each measure of base and tuned and their difference with the interval that holds it with 95 %."""
    rows = ""
    for variant, found in read_json(folder / "evaluation.json").get("comparisons", {}).items():
        for c in found:
            values = "".join(f"<td>{c[name]:.3f}" for name in ("base", "tuned"))
            interval = f"{c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})"
            rows += f"<tr><td>{escape(variant)} {escape(c['kind'])}<td>{escape(c['measure'])}{values}<td>{interval}"
    return f"<table><tr><td><td><td>base<td>tuned<td>difference{rows}</table>" if rows else ""


def picture(path: Path) -> str:
    return f"<img src='data:image/png;base64,{encoded(path)}'>" if path.is_file() else ""


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
