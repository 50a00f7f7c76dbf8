"""The page of several runs, of a sweep or any others.   [no torch]

It says which run is best, shows their videos in step, then the leaderboard and the curves.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from cogvx.files import read_json, shown
from cogvx.progress import counted
from cogvx.records import figures, leaderboard, pages, present, record, report
from cogvx.records.pages import PAGE, PageState, VideoGroup, column, duration, setting_text
from cogvx.records.sweep import (
    LEADERBOARD,
    Progress,
    State,
    Sweep,
    groups_of,
    is_locked,
    progress_of,
    seconds_left,
)

MOST_VIDEOS = 24  # runs whose videos are shown
LONGEST_PAGE_NAME = 80  # characters of what a page of named runs is called
MEASURED = {
    "objective": ("held-out loss", 4),
    "heldout_loss_before": ("base model", 4),
    "score_taught": ("taught, share", 2),
    "score_other": ("rest, share", 2),
    "seconds": ("seconds", 0),
    "peak_memory_gib": ("peak GiB", 2),
}


@dataclass(frozen=True)
class Compared:
    """Several runs, the best first, and the settings in which they differ."""

    rows: list[dict]  # as from sweep.rows_of()
    runs: dict[str, Path]  # their folders by the rows' "folder"
    progress: dict[str, Progress]
    keys: list[str]
    unlike: str | None  # why not all of them can be compared, if so
    is_sweep: bool
    goes_on: bool = False

    @classmethod
    def read(
        cls, rows: list[dict], runs: dict[str, Path], *, is_sweep: bool, goes_on: bool = False
    ) -> Compared:
        progress = {name: progress_of(folder) for name, folder in runs.items()}
        keys, unlike = leaderboard.settings_in(rows), groups_of(runs).in_words
        return cls(rows, runs, progress, keys, unlike, is_sweep, goes_on)

    @property
    def labels(self) -> dict[str, str]:
        """Each setting's last part, or its full name where two would be alike."""
        last = [key.rpartition(".")[2] for key in self.keys]
        return {
            key: name if last.count(name) == 1 else key
            for key, name in zip(self.keys, last, strict=True)
        }

    def name(self, row: dict) -> str:
        """A job of a sweep by its own values: `rank 16, learning_rate 0.001`."""
        if not self.is_sweep:
            return str(row["folder"])
        said = [
            f"{label} {setting_text(row[key])}"
            for key, label in self.labels.items()
            if key in self.free_keys
        ]
        return ", ".join(said) or str(row["folder"])

    @property
    def free_keys(self) -> list[str]:
        """The settings that do not follow from an earlier one, as lora_alpha from rank."""
        return [key for key in self.keys if not follows(key, self.keys, self.rows)]

    @property
    def bests(self) -> list[dict]:
        """The best of each group of runs that can be compared."""
        return leaderboard.best_of_groups(self.rows)

    @property
    def best(self) -> dict | None:
        """None also if not all runs can be compared."""
        return self.bests[0] if self.bests and not self.unlike else None


def conclude(sweep: Sweep) -> None:
    """Writes a sweep's leaderboard and page, and prints the one and where the other is.

    A job that was killed after its last step but before its own page gets the page now.
    """
    if not sweep.jobs():
        return
    rows = sweep.write_leaderboard()
    for row in rows:
        job = sweep.folder / str(row["folder"])
        if row["state"] == State.done.value and not (job / PAGE).is_file():
            report.write_page(job)
    leaderboard.show(rows, sweep.runs())
    print(f"table   {shown(sweep.folder / LEADERBOARD)}")
    several = len({row["group"] for row in rows}) > 1
    for best in leaderboard.best_of_groups(rows):
        folder, group = sweep.folder / str(best["folder"]), best["group"]
        ties = leaderboard.ties_in_words([row for row in rows if row["group"] == group])
        said = f"group {group}, " if several else ""
        print(f"best    {said}{shown(folder)}: held-out loss {best['objective']:.4f}{ties}")
        print(f"repeat the best:  {report.command_again(folder)}")
    print(f"report  {shown(write_sweep(sweep, over=True))}")


def write_sweep(sweep: Sweep, *, over: bool = False) -> Path:
    """Writes a sweep's page; returns its path. over: the sweep's process is at its end."""
    live = not over and is_locked(sweep.folder)
    title = f"{sweep.folder.name}: {', '.join(sweep.swept)}"
    given = (title, sweep.runs(), sweep.leaderboard(), sweep.command())
    return write_comparison(sweep.folder / PAGE, *given, live=live)


def write_comparison(
    page: Path,
    title: str,
    runs: dict[str, Path],
    rows: list[dict],
    command: list[str] | None = None,
    *,
    live: bool = False,
) -> Path:
    """`rows` as from sweep.rows_of(), the best first; `command`: the sweep's, to go on with.

    live: the sweep goes on.
    """
    found = Compared.read(rows, runs, is_sweep=command is not None, goes_on=live)
    return pages.render(
        page,
        "runs.html",
        live=live,
        title=title,
        about=about_runs(found),
        state=state_of_sweep(found, page.parent) if live else None,
        verdict=best_in_words(found),
        unlike=found.unlike is not None,
        videos=videos_of_all(found, page.parent),
        board=board(found, page.parent),
        curves=curves_of_all(found),
        # A plot would compare what cannot be compared.
        plots=plots_by_setting(found) if found.is_sweep and found.unlike is None else [],
        best=None if found.best is None else found.name(found.best),
        usage=usage_of_best(found),
        repeat=repeat_of_best(found),
        command=None if command is None else shlex.join(["python", "launch.py", *command[1:]]),
        surroundings=different_surroundings(found),
    )


def page_name(names: list[str]) -> str:
    """compare_A_B.html, named after what it compares."""
    said = "_".join(name.replace("/", "-") for name in names)
    if len(said) > LONGEST_PAGE_NAME:
        said = f"{said[:LONGEST_PAGE_NAME]}_{len(names)}_runs"
    return f"compare_{said}.html"


# -- words ---------------------------------------------------------------------------------------


def about_runs(found: Compared) -> str:
    states = [row["state"] for row in found.rows]
    told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    told = "all done" if {*states} == {State.done.value} else told
    return f"{counted(len(states), 'run')}: {told}."


def state_of_sweep(found: Compared, folder: Path) -> PageState:
    jobs = list(found.progress.values())
    over = sum(job.state.is_over() for job in jobs)
    to_come = read_json(folder / present.PROGRESS).get("to_come", 0)
    more = f", and {to_come} more to come" if to_come else ""
    words = f"The sweep still runs. {over} of {counted(len(jobs), 'job')} are over{more}."
    total = len(jobs) + to_come
    return PageState("sweep", words, seconds_left(jobs, to_come), over / total if total else None)


def best_in_words(found: Compared) -> str:
    if found.unlike is not None:
        return " ".join([f"{found.unlike}.", *(best_of_group(found, row) for row in found.bests)])
    best = found.best
    if best is None and all(row["state"] == State.done.value for row in found.rows):
        return "These runs have no held-out loss, so none is called the best."
    if best is None:
        return "No run has a result yet."
    said = f"Best is {found.name(best)}: held-out loss {best['objective']:.4f}"
    before = best["heldout_loss_before"]
    said += f" (base model: {before:.4f})." if before is not None else "."
    if best["heldout_noise_floor"] is None:
        unknown = (
            "The noise of the measurement is not known: validation.heldout_draws=2 measures it."
        )
        return f"{said} {unknown}"
    ties = [found.name(row) for row in found.rows if row["tie"]]
    if not ties:
        return f"{said} No other run is within the noise of the measurement."
    if len(ties) > 3:
        return f"{said} {len(ties)} other runs are as good within the noise of the measurement."
    is_or_are = "is" if len(ties) == 1 else "are"
    return f"{said} Within the noise of the measurement, as good {is_or_are}: {'; '.join(ties)}."


def best_of_group(found: Compared, best: dict) -> str:
    loss = f"held-out loss {best['objective']:.4f}"
    return f"Best of group {best['group']} is {found.name(best)}: {loss}."


def repeat_of_best(found: Compared) -> str | None:
    """A command for each group of runs that can be compared."""
    return "\n".join(report.command_again(found.runs[row["folder"]]) for row in found.bests) or None


def usage_of_best(found: Compared) -> str | None:
    return None if found.best is None else report.usage_of(found.runs[found.best["folder"]])


def different_surroundings(found: Compared) -> list[tuple[str, str]]:
    """Code, packages, devices and data of each run that are not the best run's."""
    best = read_json(found.runs[found.rows[0]["folder"]] / record.ENVIRONMENT)
    told = []
    for row in found.rows[1:]:
        own = read_json(found.runs[row["folder"]] / record.ENVIRONMENT)
        told.append((found.name(row), "; ".join(record.changes(best, own))))
    return [(name, changes) for name, changes in told if changes]


# -- the leaderboard -----------------------------------------------------------------------------


def board(found: Compared, here: Path) -> dict:
    """Columns of settings and of measures; each has the digits that tell the runs apart."""
    measured = [m for m in MEASURED if any(row.get(m) is not None for row in found.rows)]
    settings = {key: [setting_text(row[key]) for row in found.rows] for key in found.keys}
    if not found.is_sweep:
        settings = {"run": [found.name(row) for row in found.rows]} | settings
    if found.unlike is not None:
        settings = {"group": [str(row["group"]) for row in found.rows]} | settings
    values = {m: column([row.get(m) for row in found.rows], MEASURED[m][1]) for m in measured}
    lines = []
    for number, row in enumerate(found.rows):
        own = found.runs[row["folder"]] / PAGE
        lines.append(
            {
                "kind": "best" if row["place"] == 1 else "tie" if row["tie"] else "",
                "place": "" if row["place"] is None else row["place"],
                "settings": [texts[number] for texts in settings.values()],
                "state": state_of_job(row, found.runs[row["folder"]]),
                "measured": [texts[number] for texts in values.values()],
                "link": pages.address(own, here) if own.is_file() else None,
                "reason": row["reason"],
            }
        )
    return {
        "settings": [found.labels.get(key, key) for key in settings],
        "measured": [MEASURED[m][0] for m in measured],
        "lines": lines,
        "ties": any(row["tie"] for row in found.rows),
        "reasons": any(row["reason"] for row in found.rows),
    }


def state_of_job(row: dict, folder: Path) -> str:
    """With its step and the time left, if it runs."""
    if row["state"] != State.running.value:
        return row["state"]
    doing = present.Doing.read(folder)
    if not doing.words:
        return row["state"]
    left = "" if doing.seconds_left is None else f", {duration(doing.seconds_left)} left"
    return f"{row['state']}: {doing.words[:1].lower()}{doing.words[1:]}{left}"


# -- drawings ------------------------------------------------------------------------------------


def curves_of_all(found: Compared) -> list[Markup]:
    """A drawing for each group of runs that can be compared."""
    drawn = []
    for group in dict.fromkeys(row["group"] for row in found.rows):
        rows = [row for row in found.rows if row["group"] == group]
        judged = [(found.name(row), found.progress[row["folder"]].judged) for row in rows]
        judged = [(name, lines) for name, lines in judged if lines]
        drawn += [figures.curves_of_runs(judged)] if judged else []
    return drawn


def plots_by_setting(found: Compared) -> list[Markup]:
    """A heat map for two settings of few values, a scatter plot for a setting of many values,
    and parallel coordinates for three settings or more."""
    labels = found.labels
    done = [
        {labels.get(key, key): value for key, value in row.items()}
        for row in found.rows
        if row["objective"] is not None and math.isfinite(row["objective"])
    ]
    own = [labels[key] for key in found.free_keys]
    values = {key: in_order({figures.plotted(row[key]) for row in done}) for key in own}
    own = [key for key in own if len(values[key]) > 1]
    if len(done) < 2 or not own:
        return []
    few = [key for key in own if len(values[key]) <= figures.MOST_CELLS]
    pairs = [(a, b) for i, a in enumerate(few) for b in few[i + 1 :]][:3]
    drawn = [figures.heat_map(done, across, down, values) for across, down in pairs]
    drawn += [figures.scatter(done, key) for key in own if key not in few or len(own) == 1]
    return [*drawn, figures.parallel_coordinates(done, own, values)] if len(own) >= 3 else drawn


def follows(key: str, keys: list[str], rows: list[dict]) -> bool:
    """Whether an earlier setting already tells the same: lora_alpha tied to rank."""
    for earlier in keys[: keys.index(key)]:
        pairs = {(str(row[earlier]), str(row[key])) for row in rows}
        if len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}):
            return True
    return False


def in_order(values: set) -> list:
    return sorted(values, key=lambda value: (isinstance(value, str), value))


# -- videos --------------------------------------------------------------------------------------


def videos_of_all(found: Compared, here: Path) -> list[VideoGroup]:
    """For each prompt and seed, the base model's video and the runs', the best first."""
    having = [
        (row, tuned)
        for row in found.rows
        if (tuned := pages.newest_videos(found.runs[row["folder"]]))
    ][:MOST_VIDEOS]
    embed = not found.goes_on and pages.can_embed(
        [path for _, tuned in having for path in tuned.values()]
    )
    groups, best = [], found.best
    for name in dict.fromkeys(name for _, tuned in having for name in tuned):
        own = [(row, tuned[name]) for row, tuned in having if name in tuned]
        first = found.runs[own[0][0]["folder"]]
        base, clip = pages.base_video(first, name), pages.clip_beside(first, name)
        shown_here = [("base model", base)] if base.is_file() else []
        shown_here += [
            (f"best: {found.name(row)}" if row is best else found.name(row), path)
            for row, path in own
        ]
        shown_here += [] if clip is None else [clip]
        prompt = pages.prompt_of_video(first, name)
        groups.append(VideoGroup(prompt, pages.panels(shown_here, here, embed=embed)))
    return [*groups, *generated_of_all(found, here)]


def generated_of_all(found: Compared, here: Path) -> list[VideoGroup]:
    """Of task=generate: for each prompt and seed the videos of all runs, a row for each run."""
    groups: dict[str, list[tuple[str, Path]]] = {}
    starts = set()
    for row in found.rows[:MOST_VIDEOS]:
        for title, those in pages.generated_videos(found.runs[row["folder"]]).items():
            named = [(f"{found.name(row)}: {label}", path) for label, path in those]
            groups.setdefault(title, []).extend(named)
            starts |= {label for label, _ in named[:1] if len(named) > 1}
    embed = not found.goes_on and pages.can_embed(
        [path for those in groups.values() for _, path in those]
    )
    return [
        VideoGroup(title, pages.panels(those, here, embed=embed, starts=starts))
        for title, those in groups.items()
    ]
