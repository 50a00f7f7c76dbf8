"""The page of a set of clips: RUN/dataset.html.   [no torch]

Its clips play as the model sees them. It is made from dataset.json and dataset/, which
data/inspect.py writes.
"""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath

from cogvx.progress import counted
from cogvx.records import pages

DATASET_PAGE = "dataset.html"
# The last characters of a file's path that stand under its clip.
SHOWN_OF_PATH = 60


def write_dataset_page(folder: Path) -> Path:
    """Returns the page's path."""
    found = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    return pages.render(
        folder / DATASET_PAGE,
        "dataset.html",
        title=f"The clips of {folder.name}",
        about=about_clips(found),
        notes=notes(found),
        counts=found["counts"],
        most_tokens=found["most_tokens"],
        clips=[shown_row(row) for row in found["rows"]],
    )


def about_clips(found: dict) -> str:
    """`32 clips: 28 train, 4 held out`."""
    uses = ", ".join(f"{count} {use}" for use, count in found["uses"].items())
    return f"{counted(found['all'], 'clip')}: {uses}"


def notes(found: dict) -> list[str]:
    rows, said = found["rows"], []
    playing = sum(row["clip"] is not None for row in rows)
    usable = sum("frames" in row for row in rows)
    if found["captions"] == 1 < found["all"]:
        said.append("All clips have the same caption.")
    if len(rows) < found["all"]:
        said.append(
            f"{len(rows)} of {found['all']} clips are on this page, those with flags first. "
            f"dataset_report.csv has all."
        )
    if playing < usable:
        said.append(f"{playing} of these {usable} clips play here: the others are left out.")
    if found["unmeasured"]:
        said.append(
            f"{counted(found['unmeasured'], 'clip was', 'clips were')} encoded by an earlier "
            f"version: motion, cuts and bars are not known of them."
        )
    if found["estimated"]:
        said.append(
            "Numbers of tokens are estimates: the model's tokenizer is not on this machine yet."
        )
    return said


def shown_row(row: dict) -> dict:
    """What the page shows of a clip."""
    caption, unseen = row["prompt"], row.get("cut_off", "")
    if unseen and caption.endswith(unseen):
        caption = caption[: -len(unseen)]
    path = row["video"]
    return {
        "number": row["number"],
        "name": PureWindowsPath(path).name,
        "path": path if len(path) <= SHOWN_OF_PATH else f"...{path[-SHOWN_OF_PATH:]}",
        "origin": row["origin"] if row["origin"] != PureWindowsPath(path).name else "",
        "use": row["use"].partition(":")[0],
        "clip": row["clip"],
        "facts": facts_of_row(row),
        "caption": caption,
        "unseen": unseen,
        "flags": row["flags"],
        "kinds": " ".join(sorted({flag["kind"].replace(" ", "_") for flag in row["flags"]})),
        "frames": row.get("frames", 0),
        "cropped": row.get("cropped", 0),
        "moving": row.get("moving", ""),
        "tokens": row.get("tokens", 0),
    }


def facts_of_row(row: dict) -> str:
    if "frames" not in row:
        return ""
    parts = [
        f"{row['frames']} of {counted(row['file_frames'], 'frame')}",
        f"{row['file_width']}x{row['file_height']} at {row['file_fps']:g} fps",
    ]
    if row.get("cropped"):
        parts.append(f"{row['cropped']:.0%} cropped")
    if row.get("moving") is not None and "moving" in row:
        parts.append(f"{row['moving']:.0%} of it moves")
    if row.get("treatment"):
        parts.append(row["treatment"])
    parts.append(counted(row["tokens"], "token"))
    return ", ".join(parts)
