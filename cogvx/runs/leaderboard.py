"""What a sweep found, for the terminal.   [no torch]"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cogvx.runs import record
from cogvx.runs.sweep import LEADERBOARD, LOG, Sweep

MOST_ROWS = 30
SHOWN = {
    "state": "state", "objective": "held-out", "score_taught": "taught", "score_other": "others", "seconds": "seconds",
    "peak_memory_gib": "GiB",
}  # fmt: skip


def conclude(sweep: Sweep) -> None:
    """Writes the leaderboard and prints it, with the best job's command."""
    rows = sweep.write_leaderboard()
    columns = [key for key in rows[0] if key in varied(rows)]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in (
        "",
        *(key.rpartition(".")[2] for key in columns),
        *(SHOWN[name] for name in SHOWN if any(row[name] is not None for row in rows)),
    ):
        table.add_column(name)
    for row in rows[:MOST_ROWS]:
        place = "" if row["place"] is None else f"{row['place']}{' tie' if row['tie'] else ''}"
        cells = [row[name] for name in SHOWN if any(each[name] is not None for each in rows)]
        table.add_row(place, *(Text(shown(value)) for value in [*(row[key] for key in columns), *cells]))
    Console().print(table)
    if len(rows) > MOST_ROWS:
        print(f"... and {len(rows) - MOST_ROWS} more")
    for row in rows:
        if row["reason"]:
            print(f"{row['state']:7s} {row['folder']}: {str(row['reason']).splitlines()[0]} ({LOG} in its folder)")
    print(f"table   {record.shown(sweep.folder / LEADERBOARD)}")
    if rows[0]["objective"] is not None:
        best = sweep.folder / str(rows[0]["folder"])
        print(f"best    {record.shown(best)}: held-out loss {rows[0]['objective']:.4f}{close(rows)}")
        print(f"again   python launch.py --config-dir {record.shown(best)} --config-name config")


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


def shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
