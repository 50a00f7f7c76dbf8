"""One page about several runs, a sweep's or any, that opens in any browser, offline: which is best, how they got there, what they show.
[no torch]"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from html import escape
from pathlib import Path

from cogvx.files import read_json, shown, write_text
from cogvx.records import leaderboard, record, report, usage
from cogvx.records.leaderboard import SHOWN, as_text, varied
from cogvx.records.report import MOST_EMBEDDED, PAGE, STYLE, encoded, pyplot, section, svg, table
from cogvx.records.sweep import LEADERBOARD, Progress, State, Sweep, progress_of

MOST_NAMED = 8  # curves with a colour and a name of their own
MOST_CELLS = 12  # values of a setting that a heat map has room for; more are a scatter plot
MOST_VIDEOS = 24  # runs in the grid


def conclude(sweep: Sweep) -> None:
    """Writes the leaderboard and the page of a sweep, prints the one and says where the other is. A job that was killed when all but
    its own page was written gets that now."""
    if not sweep.jobs():
        return
    rows = sweep.write_leaderboard()
    for job in [
        sweep.folder / str(row["folder"]) for row in rows if row["state"] == State.done.value
    ]:
        if not (job / PAGE).is_file():
            report.write(job)
    leaderboard.show(rows)
    print(f"table   {shown(sweep.folder / LEADERBOARD)}")
    if rows[0]["objective"] is not None:
        best = sweep.folder / str(rows[0]["folder"])
        print(
            f"best    {shown(best)}: held-out loss {rows[0]['objective']:.4f}{leaderboard.close(rows)}"
        )
        print(f"again   python launch.py --config-dir {shown(best)} --config-name config")
    title = f"{sweep.folder.name}: {', '.join(sweep.swept)}"
    page = write(sweep.folder / PAGE, title, sweep.runs(), rows, sweep.command())
    print(f"report  {shown(page)}")


def write(
    page: Path,
    title: str,
    runs: dict[str, Path],
    rows: list[dict],
    command: list[str] | None = None,
) -> Path:
    """`rows` as from sweep.rows_of(), the best first; `runs`: their folders by the rows' "folder"."""
    progress = {name: progress_of(folder) for name, folder in runs.items()}
    keys = varied(rows)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(counted(rows))}</p>",
        ""
        if command is None
        else f"<pre>python {escape(shlex.join(['launch.py', *command[1:]]))}</pre>",
        section("Which is best", board(rows, keys, runs, page.parent)),
        section("Take it", winner(rows, runs)),
        section("Held-out loss", curves(rows, keys, progress)),
        section("By setting", "".join(by_setting(rows, keys))),
        section("Videos: same prompt, same seed", videos(rows, keys, runs, page.parent)),
        section("Not the same in all runs, besides settings", different_surroundings(rows, runs)),
    ]
    text = f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}{MORE_STYLE}</style>{''.join(parts)}{SCRIPT}\n"
    write_text(page, text)
    return page


MORE_STYLE = """
body { max-width: 80rem } div.board { max-height: 34rem; overflow: auto } table.board td, table.board th { padding: .15rem .8rem .15rem 0; text-align: left; white-space: nowrap }
table.board td:first-child { color: inherit } table.board td.reason { white-space: normal; color: #a33; font-size: .85em }
th { color: #666; font-weight: normal; border-bottom: 1px solid #ccc } tr.best { font-weight: 600 } tr.tie td { background: #fbf6df }
.grid { display: flex; flex-wrap: wrap; gap: .8rem } figure { margin: 0; width: 12rem; font-size: .85em } figure video { width: 100%; height: auto }
figcaption { overflow-wrap: anywhere } .plots { display: flex; flex-wrap: wrap } .plots svg { flex: 0 1 auto }
"""
SCRIPT = """<script>
for (const grid of document.querySelectorAll('.grid')) {
  const videos = [...grid.querySelectorAll('video')], first = videos[0];
  const bar = grid.previousElementSibling, button = bar.querySelector('button'), slider = bar.querySelector('input');
  let playing = true;
  button.onclick = () => { playing = !playing; button.textContent = playing ? 'pause' : 'play'; videos.forEach(v => playing ? v.play() : v.pause()); };
  slider.oninput = () => { if (playing) button.onclick(); videos.forEach(v => v.currentTime = slider.value / 1000 * v.duration); };
  const follow = () => {
    if (playing && first.duration) {
      slider.value = 1000 * first.currentTime / first.duration;
      for (const v of videos) if (Math.abs(v.currentTime - first.currentTime) > 0.08 && first.currentTime < v.duration) v.currentTime = first.currentTime;
    }
    requestAnimationFrame(follow);
  };
  follow();
}
</script>"""


def counted(rows: list[dict]) -> str:
    states = [row["state"] for row in rows]
    found = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(rows)} runs: {found}" + (
        ". Some still run: this page is of now." if "running" in states else ""
    )


def board(rows: list[dict], keys: list[str], runs: dict[str, Path], here: Path) -> str:
    """The leaderboard; rows that could as well be the best are marked."""
    measured = [name for name in SHOWN if any(row[name] is not None for row in rows)]
    head = "".join(
        f"<th>{escape(name)}" for name in ("", *keys, *(SHOWN[name] for name in measured), "")
    )
    body = ""
    for row in rows:
        place = "" if row["place"] is None else f"{row['place']}{' tie' if row['tie'] else ''}"
        own = runs[row["folder"]] / PAGE
        link = f"<a href='{escape(relative(own, here))}'>run</a>" if own.is_file() else ""
        cells = "".join(f"<td>{escape(as_text(row[name]))}" for name in (*keys, *measured))
        kind = "best" if row["place"] == 1 else "tie" if row["tie"] else ""
        reason = f"<td class=reason>{escape(str(row['reason']))}" if row["reason"] else ""
        body += f"<tr class='{kind}'><td>{place}{cells}<td>{link}{reason}"
    return f"<div class=board><table class=board><tr>{head}{body}</table></div>"


def winner(rows: list[dict], runs: dict[str, Path]) -> str:
    """The best run's command, and the lines that load its result."""
    if rows[0]["objective"] is None:
        return ""
    folder = runs[rows[0]["folder"]]
    again = f"python launch.py --config-dir {shlex.quote(shown(folder))} --config-name config"
    settings = read_json(folder / usage.SETTINGS)
    lines = usage.snippet(folder, settings) if settings else ""
    return f"<p>The best run again, exactly:<pre>{escape(again)}</pre>" + (
        f"<p>Its result in plain diffusers:<pre>{escape(lines)}</pre>" if lines else ""
    )


# -- pictures ----------------------------------------------------------------------------------------------------------


def named(row: dict, keys: list[str]) -> str:
    return ", ".join(f"{key} {as_text(row[key])}" for key in keys) or str(row["folder"])


def curves(rows: list[dict], keys: list[str], progress: dict[str, Progress]) -> str:
    """By step; the best with their names, all others grey. The band is what noise alone can do to a value."""
    drawn = [
        (row, progress[row["folder"]].judged) for row in rows if progress[row["folder"]].judged
    ]
    if not drawn:
        return ""
    figure, axes = pyplot().subplots(figsize=(10, 4.2), layout="constrained")
    colours, values, banded = pyplot().get_cmap("tab10").colors, [], False
    for number, (row, lines) in reversed(list(enumerate(drawn))):
        best = number < MOST_NAMED
        steps, losses = [line["step"] for line in lines], [line["heldout_loss"] for line in lines]
        floors = [line.get("heldout_noise_floor") or 0.0 for line in lines]
        look = (
            {"color": colours[number], "zorder": 3, "label": named(row, keys)}
            if best
            else {"color": "#ccc", "zorder": 1}
        )
        axes.plot(
            steps, losses, marker="." if best else None, linewidth=1.4 if best else 0.8, **look
        )
        if best and any(floors):
            banded = True
            low, high = zip(
                *((loss - f, loss + f) for loss, f in zip(losses, floors, strict=True)), strict=True
            )
            axes.fill_between(steps, low, high, color=colours[number], alpha=0.15, linewidth=0)
        values += losses
    start = [lines[0]["heldout_loss"] for _, lines in drawn]
    values = sorted(v for v in values if math.isfinite(v))
    axes.set_ylim(bottom=None, top=max(1.1 * max(start), values[len(values) // 2]))
    axes.set_xlabel("optimizer step" + (" (band: noise floor)" if banded else ""))
    axes.set_ylabel("held-out loss")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        frameon=False,
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    return svg(figure)


def by_setting(rows: list[dict], keys: list[str]) -> Iterator[str]:
    """A heat map for each two settings of few values, a scatter plot for a setting of many, parallel coordinates for three and more."""
    done = [row for row in rows if row["objective"] is not None and math.isfinite(row["objective"])]
    own = [key for key in keys if not follows(key, keys, done)]
    values = {key: in_order({plain(row[key]) for row in done}) for key in own}
    own = [key for key in own if len(values[key]) > 1]
    if len(done) < 2 or not own:
        return
    few = [key for key in own if len(values[key]) <= MOST_CELLS]
    yield "<div class=plots>"
    if len(few) == 1 and len(own) == 1:
        yield scatter(done, own[0])
    for first, second in [(a, b) for i, a in enumerate(few) for b in few[i + 1 :]][:3]:
        yield heat_map(done, first, second, values)
    for key in own:
        if key not in few:
            yield scatter(done, key)
    if len(own) >= 3:
        yield parallel_coordinates(done, own, values)
    yield "</div>"


def follows(key: str, keys: list[str], rows: list[dict]) -> bool:
    """Whether a setting says nothing that one before it does not: lora_alpha tied to rank."""
    for earlier in keys[: keys.index(key)]:
        pairs = {(str(row[earlier]), str(row[key])) for row in rows}
        if len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}):
            return True
    return False


def plain(value: object) -> object:
    return (
        value if isinstance(value, int | float) and not isinstance(value, bool) else as_text(value)
    )


def in_order(values: set) -> list:
    return sorted(values, key=lambda value: (isinstance(value, str), value))


def heat_map(rows: list[dict], across: str, down: str, values: dict[str, list]) -> str:
    """The lowest loss of each pair of values, whatever the other settings are."""
    cells = [[math.nan] * len(values[across]) for _ in values[down]]
    for row in reversed(rows):  # the lowest comes last
        cells[values[down].index(plain(row[down]))][values[across].index(plain(row[across]))] = row[
            "objective"
        ]
    size = (1.6 + 0.95 * len(values[across]), 1.3 + 0.5 * len(values[down]))
    figure, axes = pyplot().subplots(figsize=size, layout="constrained")
    ranks = sorted({v for line in cells for v in line if not math.isnan(v)})
    shades = [[math.nan if math.isnan(v) else ranks.index(v) for v in line] for line in cells]
    axes.imshow(shades, cmap="YlGnBu_r", aspect="auto", vmin=-0.4 * len(ranks), vmax=len(ranks))
    for y, line in enumerate(cells):
        for x, loss in enumerate(line):
            weight = "bold" if loss == ranks[0] else "normal"
            axes.text(
                x,
                y,
                "" if math.isnan(loss) else f"{loss:.4f}",
                ha="center",
                va="center",
                fontsize=9,
                weight=weight,
            )
    axes.set_xticks(range(len(values[across])), [as_text(v) for v in values[across]])
    axes.set_yticks(range(len(values[down])), [as_text(v) for v in values[down]])
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    axes.set_title("lowest held-out loss", fontsize=9)
    return svg(figure)


def scatter(rows: list[dict], key: str) -> str:
    figure, axes = pyplot().subplots(figsize=(4.5, 3.2), layout="constrained")
    found = [plain(row[key]) for row in rows]
    axes.scatter(found, [row["objective"] for row in rows], s=18, color="#27c")
    axes.scatter(found[:1], [rows[0]["objective"]], s=60, facecolors="none", edgecolors="#c40")
    if is_wide(found):
        axes.set_xscale("log")
    axes.set_xlabel(key)
    axes.set_ylabel("held-out loss")
    return svg(figure)


def parallel_coordinates(rows: list[dict], keys: list[str], values: dict[str, list]) -> str:
    """A line for each run through its values; the better, the darker."""
    axes_of = [*keys, "held-out loss"]
    losses = [row["objective"] for row in rows]
    heights = {key: placed(values[key]) for key in keys}
    at_loss = placed(in_order(set(losses)))
    figure, axes = pyplot().subplots(figsize=(1.9 * len(axes_of) + 1, 3.8), layout="constrained")
    colours = pyplot().get_cmap("viridis")
    for number, row in reversed(list(enumerate(rows))):
        line = [*(heights[key][plain(row[key])] for key in keys), at_loss[row["objective"]]]
        axes.plot(
            range(len(axes_of)),
            line,
            color=colours(number / len(rows)),
            linewidth=2.5 if number == 0 else 1.1,
        )
    for x, key in enumerate(axes_of):
        axes.axvline(x, color="#999", linewidth=0.8)
        marks = (
            heights[key].items()
            if key in heights and len(heights[key]) <= MOST_CELLS
            else ends(at_loss if x == len(keys) else heights[key])
        )
        for value, y in marks:
            axes.annotate(
                as_text(value), (x, y), xytext=(4, 2), textcoords="offset points", fontsize=8
            )
    axes.set_xticks(range(len(axes_of)), axes_of)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(axes_of) - 0.6)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    return svg(figure)


def ends(heights: dict) -> list[tuple]:
    found = sorted(heights.items(), key=lambda item: item[1])
    return [found[0], found[-1]]


def placed(values: list) -> dict[object, float]:
    """Each value's height on its axis, 0 to 1: by its size, or its logarithm where they span much, numbers apart from words."""
    if len(values) < 2 or any(isinstance(value, str) for value in values):
        return {value: number / max(1, len(values) - 1) for number, value in enumerate(values)}
    scale = math.log if is_wide(values) else float
    low, high = scale(values[0]), scale(values[-1])
    return {value: (scale(value) - low) / (high - low) for value in values}


def is_wide(values: list) -> bool:
    return all(not isinstance(v, str) and v > 0 for v in values) and max(values) >= 8 * min(values)


# -- videos ------------------------------------------------------------------------------------------------------------


def videos(rows: list[dict], keys: list[str], runs: dict[str, Path], here: Path) -> str:
    """For every prompt and seed the base model's video and those of the runs, the best first, playing in step."""
    having = [(row, found) for row in rows if (found := newest_videos(runs[row["folder"]]))][
        :MOST_VIDEOS
    ]
    names = dict.fromkeys(name for _, found in having for name in found)
    total = sum(path.stat().st_size for _, found in having for path in found.values())
    grids = ""
    for name in names:
        with_it = [
            (named(row, keys), runs[row["folder"]], found[name])
            for row, found in having
            if name in found
        ]
        folder = with_it[0][1]
        base = folder / "validation" / "base" / f"{name}.mp4"
        prompt = read_json(folder / "validation" / "prompts.json").get(name, name)
        panels = [("base model", base)] if base.is_file() else []
        panels += [(title, path) for title, _, path in with_it]
        figures = "".join(
            panel(title, path, here, embed=total <= MOST_EMBEDDED) for title, path in panels
        )
        controls = "<p><button>pause</button> <input type=range max=1000 value=0>"
        grids += f"<p>{escape(prompt)}{controls}<div class=grid>{figures}</div>"
    return grids


def newest_videos(folder: Path) -> dict[str, Path]:
    """The run's own videos of its last validation, by name."""
    steps = sorted((folder / "validation").glob("step_*"))
    found = sorted(steps[-1].glob("*.mp4")) if steps else []
    return {path.stem: path for path in found if not path.stem.endswith("_before_after")}


def panel(title: str, path: Path, here: Path, *, embed: bool) -> str:
    source = f"data:video/mp4;base64,{encoded(path)}" if embed else relative(path, here)
    return f"<figure><video src='{escape(source)}' autoplay loop muted playsinline></video><figcaption>{escape(title)}</figcaption></figure>"


def relative(path: Path, here: Path) -> str:
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.absolute().as_uri()


def different_surroundings(rows: list[dict], runs: dict[str, Path]) -> str:
    """Beside the best run: other code, packages, devices, data."""
    best = read_json(runs[rows[0]["folder"]] / record.ENVIRONMENT)
    found = {
        str(row["folder"]): "; ".join(
            record.changes(best, read_json(runs[row["folder"]] / record.ENVIRONMENT))
        )
        for row in rows[1:]
    }
    return table({name: text for name, text in found.items() if text})
