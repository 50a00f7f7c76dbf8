"""What a sweep found, for the terminal.   [no torch]"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cogvx.errors import first_line
from cogvx.files import read_json
from cogvx.records import record
from cogvx.records.pages import column, setting_text
from cogvx.records.sweep import groups_of

MOST_ROWS = 30
WIDE = 160  # characters, where the output is no terminal
WIDEST_VALUE = 24  # characters of a setting that stay on one line
# A row's measure -> its heading and the fewest decimals of its column.
MEASURES = {
    "state": ("state", 0),
    "objective": ("held-out", 4),
    "score_taught": ("taught", 2),
    "score_other": ("others", 2),
    "seconds": ("seconds", 0),
    "peak_memory_gib": ("GiB", 2),
}


def show(rows: list[dict], runs: dict[str, Path]) -> None:
    """The leaderboard, and why runs have no place on it."""
    settings, unlike = settings_in(rows), groups_of(runs).in_words
    if unlike is not None:
        print(f"warning {unlike}")
        settings = ["group", *settings]
    measured = [name for name in MEASURES if any(row[name] is not None for row in rows)]
    shown = rows[:MOST_ROWS]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    texts_of = {key: [setting_text(row[key]) for row in shown] for key in settings}
    for key, texts in texts_of.items():
        # A long value breaks into lines, but no digit of it is cut off.
        least = min(WIDEST_VALUE, max(map(len, texts)))
        heading = key.rpartition(".")[2]
        table.add_column(heading, justify="right", overflow="fold", min_width=least)
    for name in measured:
        justify = "left" if name == "state" else "right"
        table.add_column(MEASURES[name][0], justify=justify, overflow="fold")
    columns = [[place_text(row) for row in shown]]
    columns += texts_of.values()
    columns += [column([row[name] for row in shown], MEASURES[name][1]) for name in measured]
    for texts in zip(*columns, strict=True):
        table.add_row(*map(Text, texts))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    if len(rows) > MOST_ROWS:
        print(f"... and {len(rows) - MOST_ROWS} more")
    for row in rows:
        if row["reason"]:
            print(f"{row['state']:7s} {row['folder']}: {first_line(row['reason'])}")


def show_surroundings(rows: list[dict], runs: dict[str, Path]) -> None:
    """Where the code, packages, devices or data of a run are not the best run's."""
    best = read_json(runs[rows[0]["folder"]] / record.ENVIRONMENT)
    for row in rows[1:]:
        found = record.changes(best, read_json(runs[row["folder"]] / record.ENVIRONMENT))
        if found:
            print(f"besides settings, {rows[0]['folder']} -> {row['folder']}: {'; '.join(found)}")


def place_text(row: dict) -> str:
    return "" if row["place"] is None else f"{row['place']}{' tie' if row['tie'] else ''}"


def settings_in(rows: list[dict]) -> list[str]:
    """The settings in a row: the columns between its tie and its state."""
    names = list(rows[0])
    return names[names.index("tie") + 1 : names.index("state")]


def best_of_groups(rows: list[dict]) -> list[dict]:
    """Of each group of runs that can be compared, the best one that has a held-out loss."""
    return [row for row in rows if row["place"] == 1]


def ties_in_words(rows: list[dict]) -> str:
    """How many runs of a group are as good as the best; rows[0] has a held-out loss."""
    if rows[0]["heldout_noise_floor"] is None:
        return ". The noise of the measurement is not known: validation.heldout_draws=2 measures it"
    tied = sum(bool(row["tie"]) for row in rows)
    return f"; {tied} more within the noise of the measurement" if tied else ""
