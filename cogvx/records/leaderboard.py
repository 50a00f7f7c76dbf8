"""What a sweep found, for the terminal.   [no torch]"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cogvx.files import read_json
from cogvx.records import record

MOST_ROWS = 30
WIDE = 160  # characters, where the output is no terminal
SHOWN = {
    "state": "state", "objective": "held-out", "score_taught": "taught", "score_other": "others", "seconds": "seconds",
    "peak_memory_gib": "GiB",
}  # fmt: skip


def show(rows: list[dict]) -> None:
    """The leaderboard, and why runs have no place on it."""
    columns = varied(rows)
    measured = [name for name in SHOWN if any(row[name] is not None for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in (
        "",
        *(key.rpartition(".")[2] for key in columns),
        *(SHOWN[name] for name in measured),
    ):
        table.add_column(name)
    for row in rows[:MOST_ROWS]:
        place = "" if row["place"] is None else f"{row['place']}{' tie' if row['tie'] else ''}"
        table.add_row(place, *(Text(as_text(row[name])) for name in (*columns, *measured)))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    if len(rows) > MOST_ROWS:
        print(f"... and {len(rows) - MOST_ROWS} more")
    for row in rows:
        if row["reason"]:
            print(f"{row['state']:7s} {row['folder']}: {str(row['reason']).splitlines()[0]}")


def show_surroundings(rows: list[dict], runs: dict[str, Path]) -> None:
    """Code, packages, devices and data of other runs that are not the best one's."""
    best = read_json(runs[rows[0]["folder"]] / record.ENVIRONMENT)
    for row in rows[1:]:
        found = record.changes(best, read_json(runs[row["folder"]] / record.ENVIRONMENT))
        if found:
            print(f"besides settings, {rows[0]['folder']} -> {row['folder']}: {'; '.join(found)}")


def varied(rows: list[dict]) -> list[str]:
    """The settings in a row: what stands before its state and after its place."""
    names = list(rows[0])
    return names[names.index("tie") + 1 : names.index("state")]


def close(rows: list[dict]) -> str:
    """Whether the second best could be as good."""
    tied = [row for row in rows if row["tie"]]
    if rows[0]["heldout_noise_floor"] is None:
        return ". How much of a difference is noise is not known: validation.heldout_draws=2 measures it"
    return f"; {len(tied)} more within the noise of the measurement" if tied else ""


def as_text(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
