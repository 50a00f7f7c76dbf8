"""Where clips with captions come from: the settings of `data=`, and how each format is read.

Each file in conf/data/ has a class here. To add a format: a class with rows(), and its YAML.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from cogvx.data import demo, world
from cogvx.data.arriving import Arrived, remembered, remembering
from cogvx.data.listed import (
    ListedClip,
    located,
    paired,
    read_lines,
    require_columns,
    shortened,
)
from cogvx.data.phrasing import Phrasing
from cogvx.errors import UserError, first_line, lacking
from cogvx.files import absolute, is_hub_id, write_bytes
from cogvx.hub_client import OnTheHub, split_revision
from cogvx.progress import bar, counted


@dataclass(frozen=True)
class Example:
    prompt: str
    video: Path
    origin: str  # where it is listed, for messages: "prompts.txt:4"
    # Image-to-video: the image that the clip starts from. None: its first frame.
    image: Path | None = None
    # Training draws one caption for each epoch: `prompt` or one of these.
    other_captions: tuple[str, ...] = ()
    source: str = ""  # the name of its part of data=mix
    # The captions without id_token, and the share of epochs in which they are used.
    plain_captions: tuple[str, ...] = ()
    plain_share: float = 0.0
    # If a file makes several examples: the frames from `start` to the one before `end` (None: to
    # the last), and where between them the clip lies: 0 at their start, 1 at their end.
    start: int = 0
    end: int | None = None
    place: float = 0.0

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.prompt, *self.other_captions)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each caption, with and without id_token."""
        return [*zip(self.captions, self.plain_captions or self.captions, strict=True)]


def example_of(row: ListedClip, captions: list[str], phrasing: Phrasing) -> Example:
    plain = phrasing.variants(captions)
    prompt, *others = map(phrasing.named, plain)
    example = Example(prompt, row.video, row.origin, row.image, tuple(others))
    if not phrasing.id_token or phrasing.share == 1:
        return example
    without = tuple(map(phrasing.plain, plain))
    return replace(example, plain_captions=without, plain_share=1 - phrasing.share)


class Reshape(Enum):
    center = "center"
    random = "random"
    none = "none"
    pad = "pad"


class LongFiles(Enum):
    """Which frames of a file that is longer than the clip."""

    head = "head"
    middle = "middle"
    random = "random"
    uniform = "uniform"
    sliding = "sliding"
    scenes = "scenes"


class ShortFiles(Enum):
    """What becomes of a file that is shorter than the clip."""

    drop = "drop"
    loop = "loop"
    hold = "hold"


@dataclass
class Data:
    """What all formats share.

    max_num_frames and min_num_frames count frames that the model sees, skip_frames_start and
    skip_frames_end frames of the file.
    """

    instance_data_root: Path | None
    allow_outside_root: bool
    caption_column: str
    video_column: str
    image_column: str | None
    image_noise_variants: int
    id_token: str | None
    id_token_position: str
    id_token_share: float
    caption_split: str | None
    tag_shuffles: int
    keep_tags: int
    height: int  # pixels
    width: int  # pixels
    fps: float | None
    max_num_frames: int
    min_num_frames: int
    buckets: Any  # a list of sizes, auto, or None
    skip_frames_start: int
    skip_frames_end: int
    long_files: LongFiles
    random_windows: int
    window_overlap: float  # share of a window
    scene_threshold: float
    short_files: ShortFiles
    video_reshape_mode: Reshape
    decode_seconds: float
    flip: bool
    cache_dir: Path
    shard: str | None
    validation_fraction: float
    max_validation_clips: int
    max_train_clips: int | None
    validation_seed: int
    near_duplicates_together: bool
    max_bad_fraction: float
    needs_root: ClassVar[bool] = False  # True: the clips are listed in instance_data_root
    said: ClassVar[tuple[str, ...]] = ()  # after read(): lines that a user should see

    def read(self) -> list[Example]:
        """The examples, in the order of the list, with id_token before each prompt.

        UserError names everything that is wrong.
        """
        rows = list(self.rows())
        if not rows:
            raise UserError(
                f"{self.described()} lists no clips: a caption and a path are needed for each"
            )
        phrasing = self.phrasing()
        texts = [[one for text in row.prompt for one in phrasing.several(text)] for row in rows]
        written = [caption for captions in texts for caption in captions]
        phrasing.require_place(written)
        self.said = (*self.said, *phrasing.said(written))
        return [
            example_of(row, captions, phrasing) for row, captions in zip(rows, texts, strict=True)
        ]

    def of(self, example: Example) -> "Data":
        """The settings of the source that an example comes from."""
        return self

    def phrasing(self) -> Phrasing:
        return Phrasing(
            self.id_token,
            self.id_token_position,
            self.id_token_share,
            self.caption_split,
            self.tag_shuffles,
            self.keep_tags,
        )

    def id_tokens(self) -> list[str]:
        """The words that stand for what is learned."""
        return [self.id_token] if self.id_token else []

    def shares(self) -> dict[str, float]:
        """The share of training samples by source. Empty: every clip is used equally often."""
        return {}

    def rows(self) -> Iterable[ListedClip]:
        """The clips of the list, with the paths of their files."""
        raise TypeError(f"{type(self).__name__} has no rows()")

    def columns(self) -> list[str]:
        """Those that are named: of captions, clips and images."""
        names = (self.caption_column, self.video_column, self.image_column)
        return [name for name in names if name is not None]

    def described(self) -> str:
        return str(self.instance_data_root)

    def shown_clips(self) -> int:
        """How many held-out clips give the validation videos their prompts, if none is set."""
        return 3 if self.is_demo() else 1

    def is_demo(self) -> bool:
        """Whether the clips are those of data/demo.py."""
        return False

    def require_list(self) -> None:
        """UserError if the list of clips is not there. It is not read: that can take long."""
        if self.instance_data_root is not None:
            self.root()

    def root(self) -> Path:
        root = self.instance_data_root
        if not os.path.isdir(root):
            what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
            raise UserError(
                f"data.instance_data_root={shortened(str(root), 300)} {what}: give the folder that "
                f"holds the clips' list"
            )
        return root

    def shard_numbers(self) -> tuple[int, int]:
        """Which part of the clips this process encodes, counted from 1, and of how many."""
        part, _, parts = (self.shard or "1/1").partition("/")
        return int(part), int(parts)

    def own_part(self, examples: list[Example]) -> list[Example]:
        """Every n-th example. UserError if there are fewer examples than parts."""
        part, parts = self.shard_numbers()
        if part > len(examples):
            raise UserError(
                f"data.shard={self.shard}: there are only {counted(len(examples), 'clip')}, "
                f"and each part needs one: data.shard=1/{len(examples)} is the most"
            )
        return examples[part - 1 :: parts]

    def shard_problems(self) -> list[str]:
        if self.shard is None:
            return []
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", self.shard)
        if found and 1 <= int(found[1]) <= int(found[2]):
            return []
        return [
            f"data.shard={self.shard}: must be PART/PARTS, counted from 1: 1/64 is the first of "
            f"64 parts and 64/64 the last"
        ]

    def problems(self) -> list[str]:
        none, shortest = "none: data.validation_fraction=0", self.min_num_frames
        most_train = self.max_train_clips
        rules = [
            ("skip_frames_start", self.skip_frames_start >= 0, "0 or more frames of the file"),
            ("skip_frames_end", self.skip_frames_end >= 0, "0 or more frames of the file"),
            ("id_token_position", bool(self.id_token_position), "start, end or a text"),
            ("id_token_share", 0 < self.id_token_share <= 1, "above 0, at most 1"),
            ("caption_split", self.caption_split != "", "lines or a text; null: not split"),
            ("tag_shuffles", self.tag_shuffles >= 0, "0 (as written) or more"),
            ("keep_tags", self.keep_tags >= 0, "0 or more"),
            ("image_noise_variants", self.image_noise_variants >= 0, "0 (no noise) or more"),
            (
                "fps",
                self.fps is None or self.fps > 0,
                "above 0, or null for every frame of the file",
            ),
            (
                "min_num_frames",
                1 <= shortest <= max(1, self.max_num_frames),
                f"from 1 to max_num_frames={self.max_num_frames}",
            ),
            ("decode_seconds", self.decode_seconds > 0, "above 0 seconds"),
            ("random_windows", self.random_windows >= 1, "1 or more windows of a file"),
            ("window_overlap", 0 <= self.window_overlap < 1, "at least 0 and below 1"),
            ("scene_threshold", 0 < self.scene_threshold <= 255, "above 0, up to 255"),
            ("validation_fraction", 0 <= self.validation_fraction < 1, "at least 0 and below 1"),
            ("max_validation_clips", self.max_validation_clips >= 1, f"1 or more; {none}"),
            ("max_train_clips", most_train is None or most_train >= 1, "1 or more; all: null"),
            ("max_bad_fraction", 0 <= self.max_bad_fraction <= 1, "from 0 to 1"),
        ]
        found = [
            f"data.{name}={getattr(self, name)}: must be {must}"
            for name, holds, must in rules
            if not holds
        ]
        found += self.shard_problems()
        if len(set(self.columns())) < len(self.columns()):
            found.append(
                f"data: captions, clips and images each need their own column, "
                f"and these are {', '.join(self.columns())}"
            )
        return found + self.problems_of_long_files()

    @property
    def divides_files(self) -> bool:
        """Whether a file can make several examples."""
        return self.long_files in (LongFiles.sliding, LongFiles.scenes)

    @property
    def scene_threshold_used(self) -> float | None:
        return self.scene_threshold if self.long_files is LongFiles.scenes else None

    @property
    def needs_facts(self) -> bool:
        """Whether something must be known of each file before it is encoded."""
        return self.buckets is not None or self.long_files is not LongFiles.head

    def problems_of_long_files(self) -> list[str]:
        chosen, found = self.long_files, []
        if chosen is LongFiles.scenes:
            found += lacking("scenedetect", "data.long_files=scenes", "scenedetect-headless")
        # A given image shows the start of the file.
        elsewhere = chosen not in (LongFiles.head, LongFiles.uniform)
        if self.image_column is not None and elsewhere:
            found.append(
                f"data.long_files={chosen.name} takes clips from anywhere in a file, and an image "
                f"of data.image_column shows its start: data.long_files=head, or "
                f"data.image_column=null for the first frame of each clip"
            )
        return found


@dataclass
class TextFiles(Data):
    """The seed's small format: two text files. Line i of one belongs to line i of the other.

    caption_column and video_column are the names of the files.
    """

    needs_root: ClassVar[bool] = True

    def require_list(self) -> None:
        root = self.root()
        absent = [name for name in self.columns() if not (root / name).is_file()]
        if absent:
            here = sorted(p.name for p in root.iterdir() if p.is_file())[:8]
            raise UserError(
                f"{' and '.join(absent)} not found in {root}. {self.caption_column} holds one "
                f"caption per line, {self.video_column} one path per line. "
                f"Files there now: {', '.join(here) or 'none'}. For a CSV file: data=csv"
            )

    def rows(self) -> list[ListedClip]:
        self.require_list()
        root = self.root()
        lines = {name: read_lines(root / name) for name in self.columns()}
        return located(paired(lines, root), root, anywhere=self.allow_outside_root)


@dataclass
class Demo(TextFiles):
    """Text files, as above. Without instance_data_root: the demo's clips, made in the cache."""

    needs_root: ClassVar[bool] = False

    def root(self) -> Path:
        if self.instance_data_root is None:
            return demo.render_demo(self.cache_dir)
        return super().root()

    def is_demo(self) -> bool:
        return self.instance_data_root is None

    def require_list(self) -> None:
        if not self.is_demo():
            super().require_list()


@dataclass
class World(TextFiles):
    """The little world that model=nano was trained on, made in the cache."""

    clips: int
    clips_seed: int

    needs_root: ClassVar[bool] = False

    def root(self) -> Path:
        name = f"{world.WORLD_FOLDER}_{self.clips}_{self.clips_seed}"
        return world.render_clips(self.cache_dir, world.scenes(self.clips, self.clips_seed), name)

    def require_list(self) -> None:
        """It is made when it is needed."""

    def described(self) -> str:
        return "data=world"

    def problems(self) -> list[str]:
        few = [] if self.clips >= 1 else [f"data.clips={self.clips}: must be 1 or more"]
        return super().problems() + few


def fetched_from_hub(path: object) -> object:
    """A streamed row names a file on the hub as hf://datasets/name/repo@commit/clip.mp4."""
    if not str(path).startswith("hf://"):
        return path
    from huggingface_hub import HfFileSystem, hf_hub_download

    place = HfFileSystem().resolve_path(path)
    how = {"repo_type": place.repo_type, "revision": place.revision}
    return Path(hf_hub_download(place.repo_id, place.path_in_repo, **how))


def storable(value: object, videos: Path) -> dict[str, object]:
    """A path of a list, or a file that is on this machine, as JSON can hold it."""
    if not isinstance(value, Path):
        return {"listed": value}
    inside = value.is_relative_to(videos)
    return {"file": str(value.relative_to(videos) if inside else value.absolute())}


def restored(stored: dict, videos: Path) -> object:
    return videos / stored["file"] if "file" in stored else stored["listed"]


@dataclass
class Dataset(Data):
    """Anything that datasets.load_dataset() reads.

    Clips that the rows hold as bytes are written into the cache.
    """

    dataset_name: str
    split: str
    streaming: bool

    def problems(self) -> list[str]:
        return super().problems() + lacking("datasets", "data=dataset")

    def make_paths_absolute(self) -> None:
        if Path(self.dataset_name).expanduser().exists():
            self.dataset_name = str(absolute(Path(self.dataset_name)))

    def described(self) -> str:
        return f"data.dataset_name={self.dataset_name}"

    def rows(self) -> list[ListedClip]:
        root = None if self.instance_data_root is None else self.root()
        try:
            return located(self.cells(), root, anywhere=self.allow_outside_root)
        except UserError:
            raise
        # datasets and the hub's client raise errors of many kinds.
        except Exception as error:
            place = "here" if Path(self.dataset_name).exists() else "on the hub"
            if is_hub_id(self.dataset_name):
                self.on_the_hub().require_access()
            raise UserError(
                f"data.dataset_name={self.dataset_name} (split {self.split}) could not be read: "
                f"it is {place}, but not in a form that datasets reads. "
                f"datasets says: {first_line(error)}"
            ) from error

    def on_the_hub(self) -> OnTheHub:
        repo, revision = split_revision(self.dataset_name)
        local = "data.dataset_name=/clips/metadata.csv"
        return OnTheHub(repo, revision, "data.dataset_name", local, kind="dataset")

    def cells(self) -> list[ListedClip]:
        if self.streaming:
            return self.arrived()
        table = self.load()
        require_columns(self.dataset_name, table.column_names, self.columns())
        for column, feature in (table.features or {}).items():
            # Video and Image: keep the path and the bytes, and decode them ourselves.
            if hasattr(feature, "decode"):
                table = table.cast_column(column, type(feature)(decode=False))
        return [self.cell(number, *self.values(row)) for number, row in enumerate(table)]

    def cell(self, number: int, prompt: object, video: object, image: object) -> ListedClip:
        return ListedClip(prompt, video, image, f"{self.dataset_name} row {number}")

    def values(self, row: dict) -> tuple[object, object, object]:
        """Caption, clip and image. Clips and images that the row holds are written to the cache."""
        image = self.image_column and (self.path_of(row[self.image_column]) or "")
        return row[self.caption_column], self.path_of(row[self.video_column]), image

    def arrived(self) -> list[ListedClip]:
        """The rows, each written to the cache as it comes. Those that are there are not fetched."""
        state, videos = self.state(), self.cache_dir / "videos"
        place = remembered(
            self.cache_dir, "rows", self.dataset_name, self.split, *map(str, self.columns())
        )
        with remembering(place, videos) as kept:
            if kept.rows and state not in (None, kept.rows[0]["state"]):
                kept.restart()
            if not kept.rows:
                kept.add({"state": state})
            if not kept.done:
                self.receive(kept, videos)
            rows = kept.rows[1:]
        return [
            self.cell(number, row["prompt"], *(restored(each, videos) for each in row["places"]))
            for number, row in enumerate(rows)
        ]

    def state(self) -> object:
        """What changes when the rows change: a commit, or files' times. None: not known now."""
        source = Path(self.dataset_name)
        if source.exists():
            files = [source] if source.is_file() else sorted(source.rglob("*"))
            return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
        return self.on_the_hub().commit() if is_hub_id(self.dataset_name) else None

    def receive(self, kept: Arrived, videos: Path) -> None:
        """Goes on after the rows that are there."""
        table = self.load()
        if table.features:
            # A cast, as for a table that is not streamed, comes too late for rows that are decoded
            # when they arrive.
            table = table.decode(enable=False)
        # A streamed table may not know its columns before its first row.
        columns = table.column_names or list(next(iter(table), {}))
        require_columns(self.dataset_name, columns, self.columns())
        there = len(kept.rows) - 1
        # A look at a table that has no rows left is an error in some formats.
        rows = table.skip(there) if there else table
        for row in bar(rows, desc="fetch   rows", unit="row", initial=there, leave=False):
            prompt, *values = self.values(row)
            places = [storable(value, videos) for value in values]
            files = [each["file"] for each in places if "file" in each]
            kept.add({"prompt": prompt, "places": places, "files": files})
        kept.finish()

    def load(self):
        import datasets

        if not Path(self.dataset_name).exists() and not is_hub_id(self.dataset_name):
            raise UserError(
                f"data.dataset_name={self.dataset_name} does not exist here, and is not a hub id: "
                f"give a file, a folder, or name/repo (name/repo@revision) on the hub"
            )
        source, how = Path(self.dataset_name), {"split": self.split, "streaming": self.streaming}
        if not source.is_file():
            name, revision = self.dataset_name, None
            if not source.exists():
                name, revision = split_revision(name)
            return datasets.load_dataset(name, revision=revision, **how)
        kinds = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
        kind = kinds.get(source.suffix[1:].lower())
        if kind is None:
            raise UserError(
                f"data.dataset_name={source}: a file must end in csv, json, jsonl or parquet"
            )
        return datasets.load_dataset(kind, data_files=str(source), **how)

    def path_of(self, value: object) -> object:
        """The path as listed. For a cell that holds the bytes: the file they are written to."""
        if isinstance(value, bytes):
            value = {"bytes": value}
        if not isinstance(value, dict) or not {"bytes", "path"} & value.keys():
            return value
        if value.get("bytes") is None:
            return fetched_from_hub(value.get("path"))
        digest = hashlib.sha256(value["bytes"]).hexdigest()[:32]
        path = self.cache_dir / "videos" / f"{digest}{Path(value.get('path') or 'x.mp4').suffix}"
        if not path.is_file():
            write_bytes(path, value["bytes"])
        return path
