"""Where clips with captions come from: the settings that all options of `data=` share.

Each file in conf/data/ has a class, in a file of this folder. To add a format: a class with
rows(), and its YAML.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from cogvx.data.listed import (
    ListedClip,
    nothing_known,
    shortened,
)
from cogvx.data.phrasing import Phrasing
from cogvx.errors import UserError, lacking
from cogvx.progress import counted


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
    decode_gigabytes: float
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
    # Set by knowing().
    known: ClassVar[Callable[[str], bool]] = staticmethod(nothing_known)

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

    @contextlib.contextmanager
    def knowing(self, known: Callable[[str], bool]) -> Iterator[None]:
        """Within this context read() lists files that do not exist any more, if known(path)."""
        self.known = known
        try:
            yield
        finally:
            # The settings are sent to other processes.
            del self.known

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
            ("decode_gigabytes", self.decode_gigabytes > 0, "above 0 gigabytes of memory"),
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
    def decode_limits(self) -> tuple[float, float]:
        """The seconds and the gigabytes of memory that reading a clip may take."""
        return self.decode_seconds, self.decode_gigabytes

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
