"""Where task=caption writes: a file beside each clip, or a column of a table."""

from __future__ import annotations

import codecs
import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cogvx.data.folder import Folder
from cogvx.data.listed import ListedClip, located, require_columns, text_of
from cogvx.data.sources import Data
from cogvx.data.tables import READERS, USUAL_CAPTIONS, USUAL_VIDEOS, Row, TableOfClips, usual
from cogvx.data.written import WrittenCaptions
from cogvx.errors import UserError
from cogvx.files import replacing, shown, write_bytes, write_text

NEW_COLUMN = "caption"
KEPT = ".before_captions"  # the ending of a table as it was


@dataclass(frozen=True)
class ClipToCaption:
    name: str  # in the record
    video: Path
    caption: str  # that it has now; "" for none
    row: int = 0  # of a table, in the order of its reader


class CaptionPlace(Protocol):
    record: WrittenCaptions

    def clips(self) -> list[ClipToCaption]:
        """Every clip, with the caption that it has. UserError if there is none."""

    def write(self, clip: ClipToCaption, caption: str) -> None:
        """One line of text."""

    def finish(self) -> str:
        """Called once, also after an error; returns where the captions are."""


def caption_place(data: Data) -> CaptionPlace:
    return InTable(data) if isinstance(data, TableOfClips) else BesideClips(data)


class BesideClips:
    """A text file beside each clip: data=folder."""

    def __init__(self, data: Folder):
        self.data, self.root = data, data.root()
        self.record = WrittenCaptions(self.root)

    def clips(self) -> list[ClipToCaption]:
        found = []
        for clip in self.data.clips(self.data.files()):
            file = self.data.caption_file(clip)
            text = text_of(file).strip() if file.is_file() else ""
            found.append(ClipToCaption(clip.relative_to(self.root).as_posix(), clip, text))
        return found

    def write(self, clip: ClipToCaption, caption: str) -> None:
        write_text(self.data.caption_file(clip.video), f"{caption}\n")

    def finish(self) -> str:
        return shown(self.root)


class InTable:
    """A column of a table: data=table or data=csv.

    The captions are in the record at once, and in the table at the end. A killed task leaves the
    table as it was, and the next one writes them. The table as it was is kept beside it.
    """

    def __init__(self, data: TableOfClips):
        self.data, self.root, self.table = data, data.root(), data.table()
        self.rows = READERS[self.table.suffix.lower()](self.table)
        self.record = WrittenCaptions(self.root)
        self.column, self.captions = self.caption_column(), {}

    def caption_column(self) -> str:
        """The column of captions; a new one, if the table has none."""
        if self.data.caption_column is not None:
            return self.data.caption_column
        return next((name for name in USUAL_CAPTIONS if name in self.columns()), NEW_COLUMN)

    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for _, cells in self.rows for name in cells))

    def clips(self) -> list[ClipToCaption]:
        """With the captions of an earlier task that did not get to write the table."""
        names, given = self.columns(), self.data.video_column
        video = given or usual(names, USUAL_VIDEOS, self.table, "data.video_column")
        require_columns(self.table.name, names, [video])
        self.require_texts()
        pending, found = self.record.not_in_the_table(), []
        used = [n for n, (_, cells) in enumerate(self.rows) if any(v for v in cells.values())]
        for row, path in zip(used, self.paths(used, video), strict=True):
            cells = self.rows[row][1]
            caption, name = cells.get(self.column) or "", f"{self.table.name}: {cells[video]}"
            if not caption.strip() and name in pending:
                caption = self.captions[row] = pending[name]
            found.append(ClipToCaption(name, path, caption.strip(), row))
        return found

    def require_texts(self) -> None:
        """UserError if the column holds lists or numbers, where a text has no place."""
        for number, cells in self.rows:
            if not isinstance(cells.get(self.column) or "", str):
                raise UserError(
                    f"{self.table.name}:{number} has a {self.column} that is not text, and "
                    f"task=caption writes texts: choose another column, data.caption_column=NAME"
                )

    def paths(self, used: list[int], video: str) -> list[Path]:
        """UserError names every row whose clip is not there."""
        listed = [
            # Captions are what is missing here.
            ListedClip("a caption", cells.get(video), None, f"{self.table.name}:{number}")
            for number, cells in (self.rows[row] for row in used)
        ]
        anywhere = self.data.allow_outside_root
        return [row.video for row in located(listed, self.root, anywhere=anywhere)]

    def write(self, clip: ClipToCaption, caption: str) -> None:
        self.captions[clip.row] = caption

    def finish(self) -> str:
        if self.captions:
            keep_beside(self.table)
            write = WRITERS[self.table.suffix.lower()]
            write(self.table, self.rows, self.column, self.captions)
            self.record.add(table_written=self.table.name)
        return f"{shown(self.table)}, column {self.column}"


def keep_beside(table: Path) -> None:
    """Copies the table to the first name that is free: metadata.csv.before_captions, ..._2."""
    number, path = 1, table.with_name(f"{table.name}{KEPT}")
    while path.exists():
        number += 1
        path = table.with_name(f"{table.name}{KEPT}_{number}")
    shutil.copy2(table, path)


# -- writers: the table with these captions, by the row's place; all else stays -------------------

Captions = dict[int, str]


def write_commas(
    path: Path, rows: list[Row], column: str, captions: Captions, delimiter: str = ","
) -> None:
    text = text_of(path)
    settings = {"skipinitialspace": True, "delimiter": delimiter}
    reader = csv.reader(text.splitlines(keepends=True), **settings)
    numbered = [(reader.line_num, cells) for cells in reader]
    lines, header = dict(numbered), numbered[0][1]
    if column not in header:
        header.append(column)
    place = header.index(column)
    for row, caption in captions.items():
        cells = lines[rows[row][0]]
        cells += [""] * (place + 1 - len(cells))
        cells[place] = caption
    written = io.StringIO(newline="")
    end = "\r\n" if "\r\n" in text else "\n"
    csv.writer(written, delimiter=delimiter, lineterminator=end).writerows(lines.values())
    # Excel reads UTF-8 only with a mark at its start. A table that has it keeps it.
    mark = "utf-8-sig" if path.read_bytes().startswith(codecs.BOM_UTF8) else "utf-8"
    write_bytes(path, written.getvalue().encode(mark))


def write_tabs(path: Path, rows: list[Row], column: str, captions: Captions) -> None:
    write_commas(path, rows, column, captions, delimiter="\t")


def write_json_lines(path: Path, rows: list[Row], column: str, captions: Captions) -> None:
    lines = text_of(path).split("\n")
    for row, caption in captions.items():
        number, cells = rows[row]
        lines[number - 1] = json.dumps({**cells, column: caption}, ensure_ascii=False)
    write_text(path, "\n".join(lines))


def write_json_list(path: Path, rows: list[Row], column: str, captions: Captions) -> None:
    cells = [
        own | ({column: captions[row]} if row in captions else {})
        for row, (_, own) in enumerate(rows)
    ]
    write_text(path, json.dumps(cells, indent=2, ensure_ascii=False) + "\n")


def write_parquet(path: Path, rows: list[Row], column: str, captions: Captions) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    values = [captions.get(row, cells.get(column)) for row, (_, cells) in enumerate(rows)]
    texts = pyarrow.array(values, pyarrow.string())
    place = table.column_names.index(column) if column in table.column_names else None
    table = (
        table.append_column(column, texts)
        if place is None
        else table.set_column(place, column, texts)
    )
    with replacing(path) as partial:
        pyarrow.parquet.write_table(table, partial)


WRITERS: dict[str, Callable[[Path, list[Row], str, Captions], None]] = {
    ".csv": write_commas,
    ".tsv": write_tabs,
    ".jsonl": write_json_lines,
    ".json": write_json_list,
    ".parquet": write_parquet,
}
