"""Where captioned clips come from: one YAML under conf/data/ and one class here each, all read into Examples.

To add a format: a class with read(), and its YAML.
"""

import csv
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from cogvx.data import demo, world
from cogvx.errors import UserError, did_you_mean, first_line, listed
from cogvx.files import absolute, write_bytes


@dataclass(frozen=True)
class Example:
    prompt: str
    video: Path
    origin: str  # where it was listed, for messages: "prompts.txt:4"
    image: Path | None = None  # image-to-video: what the clip starts from; None: its first frame


class ListedClip(NamedTuple):
    """What a list says of a clip; `image` is None where no image column is asked for."""

    prompt: object
    video: object
    image: object
    origin: str


class Reshape(Enum):
    center = "center"
    random = "random"


@dataclass
class Data:
    """What all sources share. Frames are frames of the clip the model sees, skipped ones frames of the file."""

    instance_data_root: Path | None
    caption_column: str
    video_column: str
    image_column: str | None
    image_noise_variants: int
    id_token: str | None
    height: int  # pixels
    width: int
    fps: float | None
    max_num_frames: int
    min_num_frames: int
    skip_frames_start: int
    skip_frames_end: int
    video_reshape_mode: Reshape
    cache_dir: Path
    validation_fraction: float
    max_validation_clips: int
    max_train_clips: int | None
    validation_seed: int
    max_bad_fraction: float

    def read(self) -> list[Example]:
        """The examples, in the order listed, with id_token before every prompt. UserError names all that is wrong."""
        examples = [
            Example(f"{self.id_token} {prompt}" if self.id_token else prompt, video, origin, image)
            for prompt, video, image, origin in self.rows()
        ]
        if not examples:
            raise UserError(
                f"{self.described()} lists no clips: a caption and a path are needed for each"
            )
        return examples

    def rows(self) -> Iterable[ListedClip]:
        """With the paths found on disk."""
        raise TypeError(f"{type(self).__name__} has no rows()")

    def columns(self) -> list[str]:
        return [
            self.caption_column,
            self.video_column,
            *([] if self.image_column is None else [self.image_column]),
        ]

    def described(self) -> str:
        return str(self.instance_data_root)

    def held_out(self, examples: int) -> list[bool]:
        """Of each example whether it is held out: a seeded choice of validation_fraction, at least one, never all."""
        import numpy

        wanted = max(1, min(round(self.validation_fraction * examples), self.max_validation_clips))
        count = 0 if self.validation_fraction == 0 else min(examples - 1, wanted)
        chosen = set(
            numpy.random.default_rng(self.validation_seed).permutation(examples)[:count].tolist()
        )
        return [index in chosen for index in range(examples)]

    def trained_on(self, examples: int) -> list[bool]:
        """Of each example whether it is trained on: it is not held out and, with max_train_clips, among so many of a seeded choice; a
        larger one keeps those of a smaller. UserError when there are fewer."""
        import numpy

        left = [index for index, out in enumerate(self.held_out(examples)) if not out]
        wanted = len(left) if self.max_train_clips is None else self.max_train_clips
        if wanted > len(left):
            raise UserError(
                f"data.max_train_clips={wanted}, and {len(left)} clips are left beside those held out: give at most that many"
            )
        order = numpy.random.default_rng(self.validation_seed).permutation(len(left))[:wanted]
        chosen = {left[place] for place in order}
        return [index in chosen for index in range(examples)]

    def problems(self) -> list[str]:
        found = []
        for name in ("skip_frames_start", "skip_frames_end"):
            if getattr(self, name) < 0:
                found.append(
                    f"data.{name}={getattr(self, name)}: must be 0 or more frames of the file"
                )
        if len(set(self.columns())) < len(self.columns()):
            found.append(
                f"data: captions, clips and images need columns of their own, and these are {', '.join(self.columns())}"
            )
        if self.image_noise_variants < 0:
            found.append(
                f"data.image_noise_variants={self.image_noise_variants}: must be 0 (no noise) or more"
            )
        if self.fps is not None and not self.fps > 0:
            found.append(
                f"data.fps={self.fps}: must be above 0, or null for every frame of the file"
            )
        if not 1 <= self.min_num_frames <= max(1, self.max_num_frames):
            found.append(
                f"data.min_num_frames={self.min_num_frames}: must be from 1 to max_num_frames={self.max_num_frames}"
            )
        if not 0 <= self.validation_fraction < 1:
            found.append(
                f"data.validation_fraction={self.validation_fraction}: must be from 0 up to, but not, 1"
            )
        if self.max_validation_clips < 1:
            found.append(
                f"data.max_validation_clips={self.max_validation_clips}: must be 1 or more; none: data.validation_fraction=0"
            )
        if self.max_train_clips is not None and self.max_train_clips < 1:
            found.append(
                f"data.max_train_clips={self.max_train_clips}: must be 1 or more; null: all"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            found.append(f"data.max_bad_fraction={self.max_bad_fraction}: must be from 0 to 1")
        return found

    def is_demo(self) -> bool:
        """Whether the clips are those of cogvx/data/demo.py."""
        return False

    def root(self) -> Path:
        root = self.instance_data_root
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise UserError(
                f"data.instance_data_root={root} {what}: give the folder that holds the clips' list"
            )
        return root


@dataclass
class TextFiles(Data):
    """The seed's small format: caption_column and video_column name two text files; line i belongs to line i."""

    def rows(self) -> list[ListedClip]:
        root = self.root()
        absent = [name for name in self.columns() if not (root / name).is_file()]
        if absent:
            here = sorted(p.name for p in root.iterdir() if p.is_file())[:8]
            raise UserError(
                f"{' and '.join(absent)} not found in {root}. One caption per line goes into {self.caption_column}, one path "
                f"per line into {self.video_column}. Files there now: {', '.join(here) or 'none'}. For a CSV file: data=csv"
            )
        return located(
            paired({name: read_lines(root / name) for name in self.columns()}, root), root
        )


@dataclass
class Demo(TextFiles):
    """The small format; without instance_data_root, over clips rendered into the cache."""

    def root(self) -> Path:
        if self.instance_data_root is None:
            return demo.render_demo(self.cache_dir)
        return super().root()

    def is_demo(self) -> bool:
        return self.instance_data_root is None


@dataclass
class World(TextFiles):
    """The little world that model=nano was trained on, rendered into the cache."""

    clips: int
    clips_seed: int

    def root(self) -> Path:
        name = f"{world.WORLD_FOLDER}_{self.clips}_{self.clips_seed}"
        return world.render_clips(self.cache_dir, world.scenes(self.clips, self.clips_seed), name)

    def described(self) -> str:
        return "data=world"

    def problems(self) -> list[str]:
        few = [] if self.clips >= 1 else [f"data.clips={self.clips}: must be 1 or more"]
        return super().problems() + few


@dataclass
class Csv(Data):
    """A CSV file under instance_data_root with a caption and a path column."""

    dataset_name: str

    def rows(self) -> list[ListedClip]:
        root = self.root()
        path = root / self.dataset_name
        if not path.is_file():
            tables = ", ".join(sorted(p.name for p in root.glob("*.csv"))) or "none"
            raise UserError(
                f"{path} does not exist (data.dataset_name). CSV files in {root}: {tables}"
            )
        reader = csv.DictReader(text_of(path).splitlines(keepends=True), skipinitialspace=True)
        require_columns(path.name, reader.fieldnames or [], self.columns())
        found = [
            ListedClip(
                row[self.caption_column],
                row[self.video_column],
                self.image_column and (row[self.image_column] or ""),
                f"{path.name}:{reader.line_num}",
            )
            for row in reader
            if any(value and value.strip() for value in row.values() if isinstance(value, str))
        ]
        return located(found, root)


@dataclass
class Dataset(Data):
    """Anything datasets.load_dataset reads. Clips held in the rows as bytes are written into the cache."""

    dataset_name: str
    split: str
    streaming: bool

    def make_paths_absolute(self) -> None:
        if Path(self.dataset_name).expanduser().exists():
            self.dataset_name = str(absolute(Path(self.dataset_name)))

    def described(self) -> str:
        return f"data.dataset_name={self.dataset_name}"

    def rows(self) -> list[ListedClip]:
        import datasets

        root = None if self.instance_data_root is None else self.root()
        try:
            return located(self.cells(), root)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            here = Path(self.dataset_name).exists()
            reason = (
                "it is here, but not in a form that datasets reads"
                if here
                else "it is no folder or file here, and on the hub there is none of this name, or it is not public, or there is no network"
            )
            raise UserError(
                f"data.dataset_name={self.dataset_name} (split {self.split}) could not be read: {reason}. "
                f"datasets says: {first_line(error)}"
            ) from error

    def cells(self) -> list[ListedClip]:
        table = self.load()
        columns = table.column_names or list(
            next(iter(table), {})
        )  # a streamed table may not know them yet
        require_columns(self.dataset_name, columns, self.columns())
        for column, feature in (table.features or {}).items():
            if hasattr(feature, "decode"):  # Video, Image: keep path and bytes, decode ourselves
                table = table.cast_column(column, type(feature)(decode=False))
        return [
            ListedClip(
                row[self.caption_column],
                self.path_of(row[self.video_column]),
                self.image_column and (self.path_of(row[self.image_column]) or ""),
                f"{self.dataset_name} row {number}",
            )
            for number, row in enumerate(table)
        ]

    def load(self):
        import datasets

        source = Path(self.dataset_name)
        if not source.is_file():
            return datasets.load_dataset(
                self.dataset_name, split=self.split, streaming=self.streaming
            )
        kind = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}.get(
            source.suffix[1:].lower()
        )
        if kind is None:
            raise UserError(
                f"data.dataset_name={source}: a file must end in csv, json, jsonl or parquet"
            )
        return datasets.load_dataset(
            kind, data_files=str(source), split=self.split, streaming=self.streaming
        )

    def path_of(self, value: object) -> str | Path:
        """The path as listed; of a Video or Image cell with bytes, the file they are written to."""
        if not isinstance(value, dict):
            return value
        if value.get("bytes") is None:
            return value["path"]
        name = (
            hashlib.sha256(value["bytes"]).hexdigest()[:32]
            + Path(value.get("path") or "x.mp4").suffix
        )
        path = self.cache_dir / "videos" / name
        if not path.is_file():
            write_bytes(path, value["bytes"])
        return path


def text_of(path: Path) -> str:
    """The file as UTF-8, without a byte order mark; UserError when it cannot be read, naming the line that is not UTF-8."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line} is not UTF-8 text (byte {raw[error.start]:#04x}). Save the file as UTF-8"
        ) from error


def read_lines(path: Path) -> list[str]:
    """Its lines, stripped, with blank ones kept so that line numbers hold, but none at the end."""
    lines = [
        line.strip() for line in text_of(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    ]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def paired(columns: dict[str, list[str]], root: Path) -> list[ListedClip]:
    """Line i of every file with line i of the others: captions, videos and (if there) images, by file name. Lines blank in all
    are passed over; blank in one is an error, never a shift."""
    prompt_file, *others = columns
    for other in others:
        require_as_many_lines(columns, prompt_file, other, root)
    problems, found = [], []
    for line, values in enumerate(zip(*columns.values(), strict=True), start=1):
        blank = next((name for name, value in zip(columns, values, strict=True) if not value), None)
        filled = next((name for name, value in zip(columns, values, strict=True) if value), None)
        if blank is None:
            found.append(
                ListedClip(
                    values[0],
                    values[1],
                    values[2] if len(values) > 2 else None,
                    f"{others[0]}:{line}",
                )
            )
        elif filled is not None:
            value = columns[filled][line - 1]
            says = f"says {shortened(value)!r}" if filled == prompt_file else f"names {value}"
            problems.append(f"{blank}:{line} is blank, but {filled}:{line} {says}")
    if problems:
        raise UserError(listed(f"{root}: captions and clips do not pair up:", problems))
    return found


def require_as_many_lines(columns: dict[str, list[str]], one: str, other: str, root: Path) -> None:
    longer, shorter = sorted((one, other), key=lambda name: -len(columns[name]))
    line = len(columns[shorter]) + 1
    if len(columns[longer]) >= line:
        raise UserError(
            f"{root}: {one} has {len(columns[one])} lines, {other} {len(columns[other])}. The first line without a partner "
            f"is {longer}:{line} ({shortened(columns[longer][line - 1])!r}). Line i of both must belong together: add the missing "
            f"line to {shorter} or remove it here"
        )


def located(rows: list[ListedClip], root: Path | None) -> list[ListedClip]:
    """Rows with their paths found on disk; UserError lists every row that has no caption or no file."""
    problems, found = [], []
    for row in rows:
        wanted = {"caption": row.prompt, "path": row.video} | (
            {} if row.image is None else {"image": row.image}
        )
        texts = {name: unquoted(value) for name, value in wanted.items()}
        lacking = [name for name, text in texts.items() if not text]
        if lacking:
            problems.append(f"{row.origin} has no {lacking[0]}")
            continue
        try:
            paths = [
                value if value is None or isinstance(value, Path) else locate(unquoted(value), root)
                for value in (row.video, row.image)
            ]
            found.append(ListedClip(texts["caption"], *paths, row.origin))
        except UserError as error:
            problems.append(f"{row.origin} {error}")
    if problems:
        raise UserError(
            listed(f"{len(problems)} of {len(rows)} clips cannot be used as listed:", problems)
        )
    return found


def locate(name: str, root: Path | None) -> Path:
    """The clip's path. It may not leave the root: what is listed there should travel with it."""
    if root is None:
        if Path(name).is_file():
            return Path(name).absolute()
        hint = (
            ""
            if Path(name).is_absolute()
            else "; it is relative: set data.instance_data_root to the folder it starts from"
        )
        raise UserError(f"names {name!r}, which does not exist{hint}")
    base = Path(os.path.abspath(root))
    path = Path(os.path.abspath(base / name))
    if not path.is_relative_to(base):
        raise UserError(
            f"names {name!r}, which leads out of {base}: move the clip there, or set data.instance_data_root higher"
        )
    if path.is_file() and not os.access(path, os.R_OK):
        raise UserError(f"names {name!r}, which this user may not read")
    if path.is_file():
        return path
    raise UserError(
        f"names {name!r}; looked for {path}, which {'is a folder' if path.is_dir() else 'does not exist'}{nearby(path, base)}"
    )


def nearby(path: Path, root: Path) -> str:
    """What was probably meant by a path that does not exist."""
    parts = path.relative_to(root).parts
    doubled = root.joinpath(*parts[1:])
    if len(parts) > 1 and doubled.is_file():
        return f". {parts[0]}/ is doubled: {doubled} exists, so leave {parts[0]}/ out of the path or set the root one folder higher"
    inside = [p for p in root.glob(f"*/{parts[-1]}") if p.is_file()]
    if inside:
        return f"; there is {inside[0].relative_to(root)}"
    if path.parent.is_dir():
        return did_you_mean(path.name, (p.name for p in path.parent.iterdir()))
    return f"; there is no folder {path.parent}"


def require_columns(table: str, columns: list[str], wanted: list[str]) -> None:
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise UserError(
            f"{table} has no column {' or '.join(missing)}{did_you_mean(missing[0], columns)} "
            f"Its columns: {', '.join(columns) or 'none'}. Set data.caption_column, data.video_column and data.image_column"
        )


def unquoted(value: object) -> str:
    """Without surrounding space, and without one pair of quote marks that CSV parsing left (the seed's sample has them)."""
    text = "" if value is None else str(value).strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1].strip()
    return text


def shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
