"""The drawings of the pages, as SVG in the page's colours, light and dark.   [no torch]"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from functools import wraps

from markupsafe import Markup

from cogvx.records.pages import setting_text

# Matplotlib writes these two colours; the page puts its own in their place.
INK, MUTED = "#010203", "#040506"
BASE_COLOUR, TUNED_COLOUR = "#8590a2", "#d9662b"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "svg.fonttype": "none",
    # The same drawing has the same ids, and so the same text.
    "svg.hashsalt": "cogvx",
}
MOST_NAMED = 8  # runs with a colour and a name of their own
MOST_CELLS = 12  # values of a setting that a heat map has room for; more are a scatter plot
SMALL = (5.1, 2.8)  # inches of a drawing that shares a line with another


def styled(draw: Callable[..., Markup]) -> Callable[..., Markup]:
    """Draws in the page's style. Matplotlib is imported when something is drawn."""

    @wraps(draw)
    def drawn(*given: object) -> Markup:
        try:
            import matplotlib
        except ImportError:
            return Markup("<p>To see this drawing: pip install matplotlib</p>")

        matplotlib.use("Agg")  # needs no display
        with matplotlib.rc_context(STYLE):
            return draw(*given)

    return drawn


def drawing(size: tuple[float, float]):
    """A figure and its axes."""
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")


def steps_below(axes, label: str = "step") -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(label)


def colours(name: str):
    from matplotlib import colormaps

    return colormaps[name]


def svg(figure, says: str) -> Markup:
    """The drawing as part of a page; `says`: what a reader who cannot see it is told."""
    from matplotlib import pyplot

    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    # Without the heads of XML and DOCTYPE, and without the metadata.
    text = written.getvalue().partition("<svg")[2]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace(MUTED, "var(--muted)")
    return Markup("<svg role='img' aria-label='{}'").format(says) + Markup(text)


def fit(axes, values: list[float]) -> None:
    """The axis fitted to the values, not to zero; what is not finite is left out."""
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        low, high = min(finite), max(finite)
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)


# -- one run -------------------------------------------------------------------------------------


@styled
def heldout_curve(steps: list[int], losses: list[float], bands: list[tuple | None]) -> Markup:
    """`bands`: for each point the 95 % interval of its change from the base model, or None."""
    figure, axes = drawing(SMALL)
    axes.axhline(losses[0], color=BASE_COLOUR, linewidth=1, linestyle=(0, (4, 3)))
    inside = [(s, *band) for s, band in zip(steps, bands, strict=True) if band is not None]
    if inside:
        at, low, high = zip(*inside, strict=True)
        axes.fill_between(at, low, high, color=TUNED_COLOUR, alpha=0.18, linewidth=0)
    axes.plot(steps, losses, color=TUNED_COLOUR, marker="o", markersize=4)
    fit(axes, [*losses, *(value for _, *band in inside for value in band)])
    steps_below(axes)
    axes.set_title("held-out loss (dashed: base model)", fontsize=10.5, loc="left")
    return svg(figure, f"Held-out loss from {losses[0]:.4f} to {losses[-1]:.4f}")


@styled
def training_curve(steps: list[int], losses: list[float]) -> Markup:
    figure, axes = drawing(SMALL)
    axes.plot(steps, losses, color=BASE_COLOUR, linewidth=1, alpha=0.8)
    smooth = smoothed(losses)
    if len(losses) >= 10:
        axes.plot(steps, smooth, color=TUNED_COLOUR, linewidth=1.8)
    fit(axes, losses)
    steps_below(axes)
    axes.set_title("training loss", fontsize=10.5, loc="left")
    return svg(figure, f"Training loss, {losses[-1]:.4f} at the end")


def smoothed(values: list[float]) -> list[float]:
    """A running mean over a tenth of the points."""
    reach = max(1, len(values) // 20)
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]


# -- several runs --------------------------------------------------------------------------------


@styled
def curves_of_runs(runs: list[tuple[str, list[dict]]]) -> Markup:
    """Held-out loss by step, the best run first. `runs`: each run's name and judged lines."""
    figure, axes = drawing((7.4, 3.6))
    palette = colours("tab10").colors
    for number, (name, lines) in reversed(list(enumerate(runs))):
        steps = [line["step"] for line in lines]
        losses = [line["heldout_loss"] for line in lines]
        named = {"color": palette[number % 10], "linewidth": 1.5, "marker": ".", "label": name}
        others = {"color": BASE_COLOUR, "linewidth": 0.7, "alpha": 0.5}
        axes.plot(steps, losses, **(named if number < MOST_NAMED else others), zorder=-number)
    banded = shade_noise(axes, runs[0][1], palette[0])
    values = [line["heldout_loss"] for _, lines in runs for line in lines]
    fit(axes, without_explosions(values, [lines[0]["heldout_loss"] for _, lines in runs]))
    steps_below(axes, "step" + (" (band: noise of the best run's measurement)" if banded else ""))
    axes.set_ylabel("held-out loss")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        fontsize=9,
        loc="upper left",
        bbox_to_anchor=(0, -0.2),
        ncols=2 if max(map(len, labels)) < 42 else 1,
    )
    return svg(figure, "Held-out loss of every run by step")


def shade_noise(axes, lines: list[dict], colour: object) -> bool:
    """The noise of a run's measurement as a band; False if it is not known."""
    floors = [line.get("heldout_noise_floor") or 0 for line in lines]
    if not any(floors):
        return False
    losses = [line["heldout_loss"] for line in lines]
    low = [loss - floor for loss, floor in zip(losses, floors, strict=True)]
    high = [loss + floor for loss, floor in zip(losses, floors, strict=True)]
    steps = [line["step"] for line in lines]
    axes.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0, zorder=-99)
    return True


def without_explosions(values: list[float], starts: list[float]) -> list[float]:
    """Without the losses of runs that diverged: they would press all others into one line."""
    finite = [value for value in starts if math.isfinite(value)]
    most = 1.5 * max(finite) if finite else math.inf
    return [value for value in values if value <= most]


@styled
def heat_map(rows: list[dict], across: str, down: str, values: dict[str, list]) -> Markup:
    """The lowest loss of each pair of values, whatever the other settings are."""
    cells = [[math.nan] * len(values[across]) for _ in values[down]]
    for row in reversed(rows):  # the best row comes last and stays
        y, x = values[down].index(plotted(row[down])), values[across].index(plotted(row[across]))
        cells[y][x] = row["objective"]
    size = (1.6 + 0.95 * len(values[across]), 1.3 + 0.5 * len(values[down]))
    figure, axes = drawing(size)
    ranks = sorted({v for line in cells for v in line if not math.isnan(v)})
    shades = [[math.nan if math.isnan(v) else ranks.index(v) for v in line] for line in cells]
    axes.imshow(shades, cmap="YlGnBu_r", aspect="auto", vmin=-0.4 * len(ranks), vmax=len(ranks))
    for y, line in enumerate(cells):
        for x, loss in enumerate(line):
            if not math.isnan(loss):
                weight = "bold" if loss == ranks[0] else "normal"
                colour = "#fff" if ranks.index(loss) < 0.3 * len(ranks) else "#111"
                text = {"ha": "center", "va": "center", "color": colour, "weight": weight}
                axes.text(x, y, f"{loss:.4f}", fontsize=9.5, **text)
    axes.set_xticks(range(len(values[across])), [setting_text(v) for v in values[across]])
    axes.set_yticks(range(len(values[down])), [setting_text(v) for v in values[down]])
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    axes.set_title("lowest held-out loss", fontsize=10, loc="left")
    return svg(figure, f"Lowest held-out loss by {across} and {down}")


@styled
def scatter(rows: list[dict], key: str) -> Markup:
    figure, axes = drawing((4.5, 3.1))
    found, losses = [plotted(row[key]) for row in rows], [row["objective"] for row in rows]
    axes.scatter(found, losses, s=20, color=BASE_COLOUR)
    axes.scatter(found[:1], losses[:1], s=36, color=TUNED_COLOUR)
    if spans_much(found):
        axes.set_xscale("log")
    fit(axes, losses)
    axes.set_xlabel(key)
    axes.set_ylabel("held-out loss")
    return svg(figure, f"Held-out loss by {key}")


@styled
def parallel_coordinates(rows: list[dict], keys: list[str], values: dict[str, list]) -> Markup:
    """A line for each run through its values, the best one thick."""
    axes_of = [*keys, "held-out loss"]
    heights = {key: heights_of(values[key]) for key in keys}
    heights["held-out loss"] = heights_of(sorted({row["objective"] for row in rows}))
    figure, axes = drawing((1.7 * len(axes_of) + 1, 3.6))
    for number, row in reversed(list(enumerate(rows))):
        line = [heights[key][plotted(row[key])] for key in keys]
        line.append(heights["held-out loss"][row["objective"]])
        best = {"color": TUNED_COLOUR, "linewidth": 2.6, "zorder": 3}
        shade = colours("viridis")(0.15 + 0.75 * number / len(rows))
        look = best if number == 0 else {"color": shade, "linewidth": 1}
        axes.plot(range(len(axes_of)), line, **look)
    for x, key in enumerate(axes_of):
        axes.axvline(x, color=MUTED, linewidth=0.8)
        for value, y in marks_on(heights[key]):
            text = f"{value:.4f}" if key == "held-out loss" else setting_text(value)
            place = {"xytext": (4, 2), "textcoords": "offset points"}
            axes.annotate(text, (x, y), fontsize=9, **place)
    axes.set_xticks(range(len(axes_of)), axes_of)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(axes_of) - 0.5)
    axes.spines[:].set_visible(False)
    return svg(figure, f"Every run's {', '.join(axes_of)}")


def marks_on(heights: dict[object, float]) -> list[tuple[object, float]]:
    """The values written on an axis: all of a few, else the two ends."""
    found = sorted(heights.items(), key=lambda item: item[1])
    few = len(found) <= MOST_CELLS and not all(isinstance(value, float) for value in heights)
    return found if few or len(found) <= 5 else [found[0], found[-1]]


def heights_of(values: list) -> dict[object, float]:
    """Each value's height on its axis, 0 to 1: by its size, or its logarithm if they span much."""
    if len(values) < 2 or any(isinstance(value, str) for value in values):
        return {value: number / max(1, len(values) - 1) for number, value in enumerate(values)}
    scale = math.log if spans_much(values) else float
    low, high = scale(values[0]), scale(values[-1])
    return {value: (scale(value) - low) / (high - low) for value in values}


def spans_much(values: list) -> bool:
    numbers = all(not isinstance(v, str) and v > 0 for v in values)
    return numbers and max(values) >= 8 * min(values)


def plotted(value: object) -> object:
    """A setting as a place on an axis: numbers stay numbers, all else is text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else setting_text(value)
