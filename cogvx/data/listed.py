"""Helpers of data/sources.py: read a list of clips, and find its files on disk.

Nothing is repaired silently. Every mistake is named with the line it stands in.
"""

import functools
import glob
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from cogvx.errors import MOST_SHOWN, UserError, did_you_mean, listed
from cogvx.progress import counted

WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]")
# Characters. T5 reads 226 tokens, about 1,000 characters. More is a file that was taken for a text.
LONGEST_CAPTION = 20_000
# Bytes of a text file that is read into memory as a whole: the captions of 10 million clips.
LARGEST_TEXT = 2 * 2**30
# Names of a folder that one is compared with: 2,000 take 0.1 s.
MOST_COMPARED = 2_000
# How files begin that are often given the ending of a text or a table.
OTHER_KINDS = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a zip or Excel file",
}
KINDS_OF_CELLS = {
    list: "a list",
    dict: "an object",
    int: "a number",
    float: "a number",
    bool: "true or false",
}


class ListedClip(NamedTuple):
    """What a list says about one clip."""

    prompt: object  # a text, or a list of texts
    video: object
    image: object  # None if no image column is asked for
    origin: str  # where it is listed, for messages: "prompts.txt:4"


def text_of(path: Path) -> str:
    """The file's text (UTF-8), without a byte order mark.

    UserError if it cannot be read; it names the first line that is not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_TEXT:
            raise UserError(f"{path} has {size:,} bytes, too many for a text: is it another file?")
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    for start, kind in OTHER_KINDS.items():
        if raw.startswith(start):
            raise UserError(f"{path} is not UTF-8 text, but {kind}. Save it as UTF-8 text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = raw[: error.start].count(b"\n") + 1, raw[error.start]
        raise UserError(
            f"{path}:{line} is not UTF-8 text (byte {byte:#04x}). Save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{path}:{line} has a zero byte: it is UTF-16, or no text. Save the file as UTF-8"
        )
    return text


def read_lines(path: Path) -> list[str]:
    """The file's lines, stripped. Blank lines are kept, except at the end.

    So the number of a line stays what an editor shows.
    """
    text = text_of(path).replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def paired(columns: dict[str, list[str]], root: Path) -> list[ListedClip]:
    """Line i of each file belongs to line i of the others.

    columns: the lines of each file, by its name: captions, videos and, if there are any, images.
    A line that is blank in all files is skipped. UserError if it is blank in only some of them,
    or if one file has more lines: a shift by one line would give every clip a wrong caption.
    """
    prompt_file, *others = columns
    for other in others:
        require_as_many_lines(columns, prompt_file, other, root)
    problems, found = [], []
    for line, values in enumerate(zip(*columns.values(), strict=True), start=1):
        if all(values):
            image = values[2] if len(values) > 2 else None
            found.append(ListedClip(values[0], values[1], image, f"{others[0]}:{line}"))
        elif any(values):
            problems.append(blank_line(dict(zip(columns, values, strict=True)), line, prompt_file))
    if problems:
        raise UserError(listed(f"{root}: captions and clips do not pair up:", problems))
    return found


def blank_line(values: dict[str, str], line: int, prompt_file: str) -> str:
    """Describes a line that is blank in one file, but not in another."""
    blank = next(name for name, value in values.items() if not value)
    filled = next(name for name, value in values.items() if value)
    value = values[filled]
    says = f"says {shortened(value)!r}" if filled == prompt_file else f"names {value}"
    return f"{blank}:{line} is blank, but {filled}:{line} {says}"


def require_as_many_lines(columns: dict[str, list[str]], one: str, other: str, root: Path) -> None:
    longer, shorter = sorted((one, other), key=lambda name: -len(columns[name]))
    line = len(columns[shorter]) + 1
    if len(columns[longer]) < line:
        return
    raise UserError(
        f"{root}: {one} has {counted(len(columns[one]), 'line')}, {other} {len(columns[other])}. "
        f"The first line without a partner is {longer}:{line} "
        f"({shortened(columns[longer][line - 1])!r}). Line i of both must belong together: "
        f"add the missing line to {shorter}, or remove this one"
    )


def nothing_known(path: str) -> bool:
    return False


def located(
    rows: list[ListedClip],
    root: Path | None,
    *,
    anywhere: bool = False,
    known: Callable[[str], bool] = nothing_known,
) -> list[ListedClip]:
    """The rows with the paths of their files. UserError names every row that lacks something.

    anywhere: data.allow_outside_root. known(path): whether a file that does not exist any more may
    be listed.
    """
    problems, found = [], []
    for row in rows:
        try:
            hints = len(problems) < MOST_SHOWN
            found.append(located_row(row, root, anywhere=anywhere, known=known, hints=hints))
        except UserError as error:
            problems.append(f"{row.origin} {error}")
    if problems:
        headline = f"{len(problems)} of {counted(len(rows), 'clip')} cannot be used as listed:"
        raise UserError(listed(headline, problems))
    return found


def located_row(
    row: ListedClip,
    root: Path | None,
    *,
    anywhere: bool,
    known: Callable[[str], bool],
    hints: bool = True,
) -> ListedClip:
    captions = captions_of_cell(row.prompt)
    # A Path is a file that was written just now, from the bytes in the row.
    video, image = (
        value
        if isinstance(value, Path) or (value is None and name == "image")
        else locate(text_of_cell(value, name), root, anywhere=anywhere, known=known, hints=hints)
        for name, value in (("path", row.video), ("image", row.image))
    )
    return ListedClip(captions, video, image, row.origin)


def captions_of_cell(value: object) -> list[str]:
    """The captions of a clip. UserError if one is no text."""
    is_list = isinstance(value, list | tuple)
    if not is_list or not all(isinstance(each, str) for each in value):
        return [caption_of_cell(value)]
    if not value:
        raise UserError("has no caption")
    return [caption_of_cell(each) for each in value]


def caption_of_cell(value: object) -> str:
    caption = text_of_cell(value, "caption")
    if len(caption) > LONGEST_CAPTION:
        raise UserError(
            f"has a caption of {len(caption)} characters, and the longest allowed has "
            f"{LONGEST_CAPTION}: is it another file? It begins {shortened(caption)!r}"
        )
    return caption


def text_of_cell(value: object, name: str) -> str:
    """UserError if there is no text. A list's or number's text would be trained on as it prints."""
    if value is None or (isinstance(value, str) and not unquoted(value)):
        raise UserError(f"has no {name}")
    if not isinstance(value, str):
        kind = KINDS_OF_CELLS.get(type(value), type(value).__name__)
        raise UserError(f"has a {name} that is not text, but {kind}: {shortened(repr(value))}")
    # JSON can hold one half of a character that is written as two. No file can.
    if not is_unicode(value) or "\0" in value:
        raise UserError(f"has a {name} with a character that is none: {shortened(ascii(value))}")
    return unquoted(value)


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def locate(
    name: str,
    root: Path | None,
    *,
    anywhere: bool = False,
    known: Callable[[str], bool] = nothing_known,
    hints: bool = True,
) -> Path:
    """The path of a file in the list. UserError if it cannot be used.

    It must lie below the root: then the clips can be moved together with their list. `anywhere`:
    it may lie elsewhere. known: as in located(). `hints`: the error guesses what was meant, for
    which folders are read.
    """
    base = os.getcwd() if root is None else os.path.abspath(root)
    inside = root is not None and not anywhere
    for spelling in spellings(name):
        path = os.path.normpath(os.path.join(base, spelling))
        if os.path.isfile(path) and (not inside or is_below(path, base)):
            if inside:
                require_inside(path, base, f"names {name!r}, which")
            return readable(path, name)
    path = os.path.normpath(os.path.join(base, name))
    if known(path) and not os.path.lexists(path) and (not inside or is_below(path, base)):
        return Path(path)
    if WINDOWS_PATH.match(name):
        raise UserError(
            f"names {name!r}, a path of another machine: write paths that start from {base}"
        )
    if inside and not is_below(path, base):
        raise UserError(
            f"names {name!r}, which is outside of {base}: move the clip there, set "
            f"data.instance_data_root to a folder higher up, or data.allow_outside_root=true"
        )
    if root is None:
        hint = "; it is relative: set data.instance_data_root to the folder it starts from"
        hint = "" if os.path.isabs(name) else hint
        raise UserError(f"names {shortened(name)!r}, which {no_file(path)}{hint}")
    near = nearby(Path(path), Path(base)) if hints and is_below(path, base) else ""
    near = "" if os.path.lexists(path) else near
    shown = path if len(path) < 300 else shortened(path)
    raise UserError(f"names {shortened(name)!r}; looked for {shown}, which {no_file(path)}{near}")


def is_below(path: str, base: str) -> bool:
    return path.startswith(base.rstrip(os.sep) + os.sep)


def require_inside(path: str, base: str, file: str = "") -> None:
    """UserError if a link leads out of the folder. path: below it, as it is written."""
    real = os.path.join(real_folder(os.path.dirname(path)), os.path.basename(path))
    real = os.path.realpath(real) if os.path.islink(real) else real
    if not any(is_below(real, place) for place in places_of(base)):
        raise UserError(
            f"{file} is a link to {real}, outside of {base}: move the file there, or allow it with "
            f"data.allow_outside_root=true"
        )


def require_no_link_out(path: Path, root: Path) -> None:
    """UserError if a list in the folder is a link out of it. A list may lie elsewhere itself."""
    base, place = os.path.abspath(root), os.path.abspath(path)
    if is_below(place, base):
        require_inside(place, base, path.name)


@functools.lru_cache(maxsize=10_000)
def real_folder(path: str) -> str:
    return os.path.realpath(path)


def places_of(base: str) -> list[str]:
    """The folder itself, without links. Of a snapshot of the hub's cache: the files it links to."""
    real = real_folder(base)
    before, between, _ = f"{real}{os.sep}".rpartition(f"{os.sep}snapshots{os.sep}")
    return [real, *([os.path.join(before, "blobs")] if between else [])]


def readable(path: str, name: str) -> Path:
    if not os.access(path, os.R_OK):
        raise UserError(f"names {name!r}, which this user may not read")
    if reason := unusable_name(path):
        raise UserError(f"names {name!r}, which {reason}")
    return Path(path)


def unusable_name(path: str) -> str | None:
    """Why a file of this name cannot be used: its messages and tables could not be read."""
    if not is_unicode(path):
        return "has a name that is not UTF-8: rename it"
    if not path.isprintable() and ({"\n", "\r"} & {*path}):
        return "has a line break in its name: rename it"
    return None


def no_file(path: str) -> str:
    """Why os.path.isfile() says no, after "which"."""
    if os.path.isdir(path):
        return "is a folder"
    if os.path.exists(path):
        return "is no file, but a pipe or a device"
    if os.path.islink(path):
        return f"is a link to {os.readlink(path)}, where no file is"
    if max(map(len, os.fsencode(path).split(b"/"))) > 255:
        return "is longer than the name of a file can be"
    return "does not exist"


def spellings(name: str) -> Iterator[str]:
    """The name, and the same name as other systems write it.

    Windows separates folders with \\, a URL writes a blank as %20, and a Mac writes an accent as
    a character of its own.
    """
    for spelling in dict.fromkeys([name, name.replace("\\", "/"), unquote(name)]):
        yield spelling
        yield unicodedata.normalize("NFC", spelling)
        yield unicodedata.normalize("NFD", spelling)


def nearby(path: Path, root: Path) -> str:
    """Guesses what was meant by a path that does not exist. The end of a sentence."""
    parts = path.relative_to(root).parts
    without_first = root.joinpath(*parts[1:])
    if len(parts) > 1 and os.path.isfile(without_first):
        return (
            f". {parts[0]}/ is doubled: {without_first} exists, so leave {parts[0]}/ out of "
            f"the path, or set the root one folder higher"
        )
    inside = [p for p in root.glob(f"*/{glob.escape(parts[-1])}") if p.is_file()]
    if inside:
        return f"; there is {inside[0].relative_to(root)}"
    if os.path.isdir(path.parent):
        names = [p.name for p in path.parent.iterdir()]
        blank = [name for name in names if name.strip() == path.name]
        if blank:
            return f"; there is {blank[0]!r}, with a blank at its start or end: rename it"
        return did_you_mean(path.name, names if len(names) <= MOST_COMPARED else ())
    return f"; there is no folder {path.parent}"


def require_columns(table: str, columns: list[str], wanted: list[str]) -> None:
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise UserError(
            f"{table} has no column {' or '.join(missing)}{did_you_mean(missing[0], columns)} "
            f"Its columns: {', '.join(columns) or 'none'}. "
            f"Set data.caption_column, data.video_column and data.image_column"
        )


def unquoted(text: str) -> str:
    """The text without space around it, and without one pair of quote marks.

    The seed's sample has a pair that reading CSV leaves in place.
    """
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1].strip()
    return text


def shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
