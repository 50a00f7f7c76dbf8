"""data=folder: clips with a caption file of the same name beside each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cogvx.data.listed import (
    ListedClip,
    caption_of_cell,
    no_file,
    require_inside,
    shortened,
    text_of,
    unusable_name,
)
from cogvx.data.sources import Data
from cogvx.errors import UserError, listed
from cogvx.progress import counted

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
ENDING = re.compile(r"(\.\w+)+")


@dataclass
class Folder(Data):
    """caption_column, video_column and image_column are the endings of the files.

    Folders inside instance_data_root are read too. Hidden files and folders are not.
    """

    caption: str | None  # of every clip that has no caption file

    needs_root: ClassVar[bool] = True

    def problems(self) -> list[str]:
        endings = {
            "caption_column": [self.caption_column],
            "video_column": self.video_column.split() or [""],
            "image_column": [] if self.image_column is None else [self.image_column],
        }
        both = self.image_column in endings["video_column"]
        twice = [
            f"data.image_column={self.image_column} is an ending of data.video_column too: such "
            f"files are clips, or the images that clips start from; leave it out of one of them"
        ]
        return [*super().problems(), *(twice if both else [])] + [
            f"data.{name}={getattr(self, name)}: with data=folder it is the ending of files: a dot "
            f"and letters or digits, such as {'.mp4' if name == 'video_column' else '.txt'}"
            for name, found in endings.items()
            if not all(ENDING.fullmatch(each) for each in found)
        ]

    def rows(self) -> list[ListedClip]:
        root, files = self.root(), self.files()
        clips = self.clips(files)
        require_usable(clips, root)
        require_files([self.caption_file(clip) for clip in clips], root)
        if not self.allow_outside_root:
            require_no_way_out(self.read_of(clips), root)
        captions = {path: self.captions_of(path) for path in clips}
        require_captions(captions, root)
        missing = [path for path, found in captions.items() if not found]
        if missing:
            raise UserError(self.captions_missing(root, clips, missing))
        images = {path: self.image_of(path) for path in clips}
        if without := [path for path, image in images.items() if image and not image.is_file()]:
            headline = f"{len(without)} of {counted(len(clips), 'clip')} in {root} have no image:"
            names = [
                f"{path.relative_to(root)}: {images[path].name} is not there" for path in without
            ]
            raise UserError(listed(headline, names))
        self.said = (
            *self.said_of_captions_alone(files, clips),
            *self.said_of_folders(root),
        )
        return [
            ListedClip(found, path, images[path], str(path.relative_to(root)))
            for path, found in captions.items()
        ]

    def read_of(self, clips: list[Path]) -> Iterator[Path]:
        """Every file that is read of these clips."""
        for clip in clips:
            found = (clip, self.caption_file(clip), self.image_of(clip))
            yield from (path for path in found if path is not None and path.is_file())

    def files(self) -> list[Path]:
        return sorted(visible_files(self.root()))

    def clips(self, files: list[Path]) -> list[Path]:
        """Those of the files that are clips. UserError if there is none."""
        endings = self.video_column.lower().split()
        clips = [path for path in files if path.suffix.lower() in endings]
        if clips:
            return clips
        found = sorted({path.suffix for path in files if path.suffix})
        pictures = " ".join(ending for ending in found if ending.lower() in PICTURES)
        train_on_them = f'. Pictures: data.video_column="{pictures}" data.min_num_frames=1'
        raise UserError(
            f"{self.root()} has no clip: no file ends in {', '.join(endings)} "
            f"(data.video_column). Endings there now: {', '.join(found) or 'none'}"
            f"{train_on_them if pictures else ''}"
        )

    def caption_file(self, clip: Path) -> Path:
        return clip.with_suffix(self.caption_column)

    def captions_of(self, clip: Path) -> list[str]:
        """The file's text as one line, or the lines of it that data.caption_split makes."""
        path = self.caption_file(clip)
        parts = self.phrasing().several(text_of(path)) if path.is_file() else []
        written = [line for part in parts if (line := " ".join(part.split()))]
        return written or ([self.caption] if self.caption else [])

    def captions_missing(self, root: Path, clips: list[Path], missing: list[Path]) -> str:
        problems = [
            f"{path.relative_to(root)} has no caption: {self.caption_file(path).name} "
            f"{'is blank' if self.caption_file(path).is_file() else 'is not there'}"
            for path in missing
        ]
        headline = (
            f"{len(missing)} of {counted(len(clips), 'clip')} in {root} have no caption. Write "
            f"one into a text file beside each clip, have a model write them (task=caption), or "
            f'give them all the same: data.caption="..."'
        )
        return listed(headline, problems)

    def image_of(self, clip: Path) -> Path | None:
        return None if self.image_column is None else clip.with_suffix(self.image_column)

    def said_of_captions_alone(self, files: list[Path], clips: list[Path]) -> Iterator[str]:
        """A warning, if caption files belong to no clip."""
        named = {self.caption_file(clip) for clip in clips}
        alone = [p for p in files if p.suffix == self.caption_column and p not in named]
        if alone:
            names = shortened(", ".join(path.name for path in alone))
            yield (
                f"warning {counted(len(alone), 'caption file has', 'caption files have')} no clip "
                f"of the same name: {names}"
            )

    def said_of_folders(self, root: Path) -> Iterator[str]:
        """A warning, if a folder has a clip's name, as some downloaders make them."""
        endings = self.video_column.lower().split()
        found = [p for p in sorted(root.iterdir()) if p.suffix.lower() in endings and p.is_dir()]
        if found:
            names = shortened(", ".join(path.name for path in found))
            what = counted(len(found), "folder has", "folders have")
            yield f"warning {what} the name of a clip: {names}"


def require_captions(captions: dict[Path, list[str]], root: Path) -> None:
    """UserError if a caption cannot be one. Those that are missing have an error of their own."""
    problems = []
    for path, found in captions.items():
        try:
            for caption in found:
                caption_of_cell(caption)
        except UserError as error:
            problems.append(f"{path.relative_to(root)} {error}")
    if problems:
        headline = f"{len(problems)} of {counted(len(captions), 'clip')} in {root}:"
        raise UserError(listed(headline, problems))


def require_usable(clips: list[Path], root: Path) -> None:
    """UserError if one is no file that this user may read, or has an unusable name."""
    problems = []
    for path in map(str, clips):
        reason = unusable_name(path)
        if reason is None and not os.path.isfile(path):
            reason = no_file(path)
        if reason is None and not os.access(path, os.R_OK):
            reason = "may not be read by this user"
        if reason is not None:
            problems.append(f"{os.path.relpath(path, root)!a} {reason}")
    if problems:
        headline = f"{len(problems)} of {counted(len(clips), 'clip')} in {root} cannot be used:"
        raise UserError(listed(headline, problems))


def require_no_way_out(files: Iterable[Path], root: Path) -> None:
    """UserError if one is a link out of the folder."""
    problems, base = [], os.path.abspath(root)
    for path in files:
        try:
            require_inside(os.path.abspath(path), base, os.path.relpath(path, root))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(listed(f"{root} has files that are not in it:", problems))


def require_files(captions: list[Path], root: Path) -> None:
    """UserError if a caption file is a folder, a pipe, or a link that leads nowhere."""
    wrong = [path for path in captions if os.path.lexists(path) and not os.path.isfile(path)]
    if wrong:
        problems = [f"{path.relative_to(root)} {no_file(str(path))}" for path in wrong]
        raise UserError(listed(f"{root}: these should be caption files:", problems))


def visible_files(root: Path) -> Iterator[Path]:
    """Every file below the folder, also through links. A folder is entered once."""
    entered = set()
    for place, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        # A Mac's archives hold a folder __MACOSX and files ._NAME, which are no clips.
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        yield from (Path(place, name) for name in files if not name.startswith("."))
