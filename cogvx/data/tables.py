"""data=csv and data=table: a file with a row for each clip.

A reader for each ending gives the rows. To add one: a function, and its line in READERS.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cogvx.data.listed import (
    LARGEST_TEXT,
    ListedClip,
    located,
    require_columns,
    require_no_link_out,
    text_of,
)
from cogvx.data.sources import Data
from cogvx.errors import UserError, first_line, lacking, listed

# The names that published data sets give to their columns, the most usual first.
USUAL_CAPTIONS = ("caption", "text", "prompt")
USUAL_VIDEOS = ("file_name", "video", "path", "video_path", "file")
USUAL_TABLE = "metadata"
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
ROWS_AT_ONCE = 1024  # of a parquet file
# A row's number in the file, as an editor shows it, and its cells.
Row = tuple[int, dict[str, object]]


@dataclass
class TableOfClips(Data):
    """A table in instance_data_root, with a column of captions and a column of paths.

    dataset_name None: the file called metadata. A column None: the one that has a usual name.
    """

    dataset_name: str | None
    caption_column: str | None
    video_column: str | None

    needs_root: ClassVar[bool] = True

    def problems(self) -> list[str]:
        parquet = (self.dataset_name or "").endswith(".parquet")
        return super().problems() + (lacking("pyarrow", "a .parquet table") if parquet else [])

    def rows(self) -> list[ListedClip]:
        path = self.table()
        if not self.allow_outside_root:
            require_no_link_out(path, self.root())
        rows = READERS[path.suffix.lower()](path)
        names = list(dict.fromkeys(name for _, cells in rows for name in cells))
        caption = self.caption_column or usual(names, USUAL_CAPTIONS, path, "data.caption_column")
        video = self.video_column or usual(names, USUAL_VIDEOS, path, "data.video_column")
        image = [] if self.image_column is None else [self.image_column]
        if rows:
            require_columns(path.name, names, [caption, video, *image])
        self.said = (f"list    {path.name}: captions from {caption}, clips from {video}",)
        found = [
            ListedClip(
                cells.get(caption),
                cells.get(video),
                self.image_column and (cells.get(self.image_column) or ""),
                f"{path.name}:{number}",
            )
            for number, cells in rows
            if any(cell not in (None, "") for cell in cells.values())
        ]
        return located(found, self.root(), anywhere=self.allow_outside_root, known=self.known)

    def require_list(self) -> None:
        self.table()

    def table(self) -> Path:
        root = self.root()
        if self.dataset_name is None:
            return only_table(root)
        path = root / self.dataset_name
        if not path.is_file():
            raise UserError(f"{path} does not exist (data.dataset_name). {tables_in(root)}")
        if path.suffix.lower() not in READERS:
            raise UserError(
                f"data.dataset_name={self.dataset_name}: a table ends in {', '.join(READERS)}"
            )
        return path


def only_table(root: Path) -> Path:
    """The file called metadata. UserError if there is none, or more than one."""
    found = [path for ending in READERS if (path := root / f"{USUAL_TABLE}{ending}").is_file()]
    if len(found) == 1:
        return found[0]
    what = "has none" if not found else f"has {' and '.join(path.name for path in found)}"
    raise UserError(
        f"data=table reads {USUAL_TABLE}{' or '.join(READERS)}, and {root} {what}: choose the file "
        f"with data.dataset_name=FILE. {tables_in(root)}"
    )


def tables_in(root: Path) -> str:
    found = sorted(p.name for p in root.iterdir() if p.suffix.lower() in READERS and p.is_file())
    return f"Tables in {root}: {', '.join(found) or 'none'}"


def usual(names: list[str], known: tuple[str, ...], path: Path, setting: str) -> str:
    """The column with one of the known names. UserError if there is none."""
    found = next((name for name in known if name in names), None)
    if found is None:
        raise UserError(
            f"{path.name} has no column called {', '.join(known[:-1])} or {known[-1]}. Its "
            f"columns: {', '.join(map(str, names)) or 'none'}. Choose one: {setting}=NAME"
        )
    return found


# -- readers -------------------------------------------------------------------------------------


def comma_rows(path: Path, delimiter: str = ",") -> list[Row]:
    lines = text_of(path).splitlines(keepends=True)
    settings = {"skipinitialspace": True, "delimiter": delimiter}
    reader = csv.DictReader(lines, **settings)
    require_header(path, reader, delimiter)
    require_closed_quotes(path, csv.reader(lines, strict=True, **settings))
    return list(sound_rows(path, reader))


def require_header(path: Path, reader: csv.DictReader, delimiter: str) -> None:
    """UserError if two columns have one name, or if the first line is separated otherwise."""
    names = [name for name in reader.fieldnames or [] if name]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path.name}:1 has two columns called {twice}: rename or remove one")
    others = [other for other in SEPARATORS if other != delimiter and other in "".join(names)]
    if len(names) == 1 and others:
        ours, theirs = (SEPARATORS[each] for each in (delimiter, others[0]))
        raise UserError(
            f"{path.name}:1 has one column, {names[0]!r}: a {path.suffix} file has {ours} between "
            f"its columns, and this line has {theirs}. Save it anew; a file with tabs ends in .tsv"
        )


def require_closed_quotes(path: Path, reader) -> None:
    """UserError if a text in quote marks never ends: all further rows would be part of it."""
    line = 1
    try:
        for _ in reader:
            line = reader.line_num + 1
    except csv.Error as error:
        # Other things that strict reading refuses are read as they are meant.
        if "unexpected end of data" in str(error):
            raise UserError(
                f"{path.name}:{line} has a text that begins with a quote mark and never ends: "
                f"close it, or write a quote mark within a text twice"
            ) from error


def sound_rows(path: Path, reader: csv.DictReader) -> Iterator[Row]:
    try:
        for row in reader:
            if row.get(None):
                raise UserError(
                    f"{path.name}:{reader.line_num} has more cells than the first line has "
                    f"columns: put quote marks around a text with commas"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path.name}:{reader.line_num + 1} cannot be read: {error}") from error


def tab_rows(path: Path) -> list[Row]:
    return comma_rows(path, delimiter="\t")


def json_line_rows(path: Path) -> list[Row]:
    problems, found = [], []
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        # RecursionError: thousands of brackets.
        except (ValueError, RecursionError) as error:
            problems.append(f"{path.name}:{number} is not JSON: {error}")
            continue
        if isinstance(cells, dict):
            found.append((number, cells))
        else:
            problems.append(f"{path.name}:{number} is no object: {{...}} with names and values")
    if problems:
        raise UserError(listed(f"{path} cannot be read:", problems))
    return found


def json_rows_of_one_list(path: Path) -> list[Row]:
    try:
        rows = json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON: {error}. One object per line is a .jsonl file"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(cells, dict) for cells in rows):
        raise UserError(f"{path} must be a list of objects: [{{...}}, {{...}}]")
    return list(enumerate(rows, start=1))


def parquet_rows(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            texts = [field.name for field in file.schema_arrow if is_text(field.type)]
        # Each text is in memory once, however many rows have it.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            rows, size = [], 0
            for part in file.iter_batches(ROWS_AT_ONCE):
                size += sum(map(bytes_of_cells, part.columns))
                if size > LARGEST_TEXT:
                    raise UserError(
                        f"{path.name} holds more than {LARGEST_TEXT:,} bytes: is it a table of "
                        f"clips and captions? Clips within a table: data=dataset"
                    )
                rows += part.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet: {first_line(error)}") from error
    return list(enumerate(rows, start=1))


def is_text(kind) -> bool:
    import pyarrow.types as kinds

    return any(
        is_kind(kind) for is_kind in (kinds.is_string, kinds.is_large_string, kinds.is_binary)
    )


def bytes_of_cells(column) -> int:
    """Of a column of pyarrow, if each cell has its own text."""
    import pyarrow.compute as compute
    import pyarrow.types as kinds

    if not kinds.is_dictionary(column.type) or not is_text(column.type.value_type):
        return column.nbytes
    lengths = compute.binary_length(column.dictionary)
    return compute.sum(lengths.take(column.indices).cast("int64")).as_py() or 0


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": comma_rows,
    ".tsv": tab_rows,
    ".jsonl": json_line_rows,
    ".json": json_rows_of_one_list,
    ".parquet": parquet_rows,
}
