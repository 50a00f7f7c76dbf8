"""battery.md and battery.json: what was measured, what was expected, and what to mend.

[no torch]
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

BAD = ("failed", "off")
SIGNS = {"ok": "ok", "off": "**OFF**", "failed": "**FAILED**", "skipped": "skipped", "info": ""}


@dataclass
class Row:
    """A line of the table. It is judged by what it was expected to be, if it has no status."""

    entry: str
    what: str
    value: object = None
    unit: str = ""
    # [name, field, ...]: where in this plan's plan.json the planned value stands.
    plan: list[str] | None = None
    bound: float | None = None  # how far the value may be from the planned one, as a share
    most: float | None = None  # the value may not be above this
    status: str | None = None  # ok, off, failed, skipped, info; time: how long an entry took
    note: str = ""


def planned(row: Row, plans: dict[str, dict]) -> float | None:
    if row.plan is None:
        return None
    value = plans
    for key in row.plan:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def verdict(row: Row, plans: dict[str, dict]) -> str:
    if row.status is not None:
        return row.status
    expected = planned(row, plans)
    if row.most is not None and row.value > row.most:
        return "off"
    if expected and row.bound is not None:
        return "off" if abs(row.value / expected - 1) > row.bound else "ok"
    return "ok" if row.most is not None else "info"


def is_bad(row: Row, plans: dict[str, dict]) -> bool:
    return verdict(row, plans) in BAD


def number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int) or value == 0:
        return str(value)
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}"


def expectation(row: Row, plans: dict[str, dict]) -> tuple[str, str]:
    """What was expected, and how far the value is from the plan."""
    expected = planned(row, plans)
    texts = [] if expected is None else [number(expected)]
    texts += [] if row.most is None else [f"at most {number(row.most)}"]
    error = "" if not expected or row.value is None else f"{row.value / expected - 1:+.1%}"
    if row.plan is not None and expected is None:
        texts.insert(0, "no plan")
    return "; ".join(texts), error


def spoken(row: Row, plans: dict[str, dict]) -> str:
    sign = verdict(row, plans)
    expected, error = expectation(row, plans)
    texts = [f"{row.entry}: {row.what}", f"{number(row.value)} {row.unit}".strip()]
    texts += [f"expected {expected} {error}".strip()] if expected else []
    return "  ".join([*filter(None, texts), *([] if sign == "info" else [sign]), row.note])


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def line(row: Row, plans: dict[str, dict]) -> str:
    expected, error = expectation(row, plans)
    measured = f"{number(row.value)} {row.unit}".strip()
    cells = [row.what, measured, expected, error, SIGNS[verdict(row, plans)], row.note]
    return f"| {' | '.join(map(cell, cells))} |"


def seconds_of(entry: str, rows: list[Row]) -> str:
    taken = [row.value for row in rows if row.entry == entry and row.status == "time"]
    return f", {taken[0]} s" if taken else ""


def to_mend(entries: list, rows: list[Row], plans: dict[str, dict]) -> list[str]:
    places, found = {entry.name: entry.mend for entry in entries}, []
    for row in rows:
        if is_bad(row, plans):
            where = places.get(row.entry, "cogvx/plan/")
            found.append(f"- `{row.entry}`: {spoken(row, plans)}. Look at {where}")
    return found


def counts(entries: list, states: dict[str, str], rows: list[Row], plans: dict) -> str:
    bad = {row.entry for row in rows if is_bad(row, plans)}
    # An entry that skips some of its lines is not skipped.
    skipped = {row.entry for row in rows if row.what == row.status == "skipped"}
    done = [entry.name for entry in entries if states[entry.name] == "done"]
    good = [name for name in done if name not in bad | skipped]
    missed = [entry.name for entry in entries if states[entry.name] == "not reached"]
    return (
        f"{len(entries)} entries: {len(good)} as expected, {len(bad)} with something to mend, "
        f"{len(skipped - bad)} skipped, {len(missed)} not reached."
    )


def page(entries: list, states: dict, rows: list[Row], plans: dict, about: dict) -> str:
    machine = [
        f"{row.what} {row.value}"
        for row in rows
        if row.entry == "machine" and row.what in ("card", "python", "torch", "diffusers", "RAM")
    ]
    parts = ["# GPU battery", "", "; ".join(machine) or "The machine is not known yet.", ""]
    parts += [
        f"{about['seconds']:.0f} s of {about['budget']:.0f}; device {about['device']}, "
        f"{about['sizes']} sizes. {counts(entries, states, rows, plans)}",
        "",
    ]
    mend = to_mend(entries, rows, plans)
    parts += ["## To mend", "", *(mend or ["Nothing that was reached."]), "", *modes(rows, plans)]
    parts += [
        "One entry again: `python tests/gpu/battery.py --only NAME`. Output: battery.log.",
        "",
    ]
    for entry in entries:
        parts += section(entry, states[entry.name], rows, plans)
    return "\n".join(parts) + "\n"


def modes(rows: list[Row], plans: dict[str, dict]) -> list[str]:
    """A line for each model and memory mode: its highest memory, and its seconds per step."""
    lines = []
    for name in dict.fromkeys(row.plan[0] for row in rows if row.plan is not None):
        own = [row for row in rows if row.plan and row.plan[0] == name and "mode" in row.entry]
        memory = [row for row in own if row.plan[1] == "phases"]
        if not memory:
            continue
        highest = max(memory, key=lambda row: row.value)
        cells = [f"{name} ({highest.what.split(':')[0]})", *compared(highest, plans)]
        seconds = [row for row in own if row.plan[1] == "seconds_per_step"]
        cells += compared(seconds[0], plans) if seconds else ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    head = "| (phase of the peak) | GiB reserved | planned | | seconds per step | planned | |"
    return ["## Memory modes", "", head, "|---" * 7 + "|", *lines, ""]


def compared(row: Row, plans: dict[str, dict]) -> list[str]:
    expected, error = planned(row, plans), expectation(row, plans)[1]
    return [number(row.value), "no plan" if expected is None else number(expected), error]


def section(entry, state: str, rows: list[Row], plans: dict) -> list[str]:
    own = [row for row in rows if row.entry == entry.name and row.status != "time"]
    head = f"## {entry.name}: {entry.about}"
    if not own:
        return [head, "", f"*{state}*", ""]
    shown = "" if state == "done" else f" *{state}*"
    lines = [line(row, plans) for row in own]
    return [
        head,
        "",
        f"{len(own)} lines{seconds_of(entry.name, rows)}.{shown}",
        "",
        "| | measured | planned, or limit | measured - planned | | |",
        "|---|---|---|---|---|---|",
        *lines,
        "",
    ]


def write(
    out: Path, entries: list, states: dict, rows: list[Row], plans: dict, about: dict
) -> None:
    result = {
        **about,
        "states": states,
        "rows": [dataclasses.asdict(row) | judged(row, plans) for row in rows],
        "plans": plans,
    }
    replace(out / "battery.json", json.dumps(result, indent=1))
    replace(out / "battery.md", page(entries, states, rows, plans, about))


def judged(row: Row, plans: dict[str, dict]) -> dict:
    return {"planned": planned(row, plans), "verdict": verdict(row, plans)}


def replace(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
