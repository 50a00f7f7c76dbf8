"""data=webdataset: clips in tar archives, each with its caption beside it.

The archives are read as a stream, from the start to the end, once. Clips are written into the cache
as they come, so the memory that this takes does not depend on the archives' size.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar

from cogvx.data.arriving import kept_file, remembered, remembering, require_bytes
from cogvx.data.listed import ListedClip, captions_of_cell, shortened
from cogvx.data.sources import Data
from cogvx.data.tables import USUAL_CAPTIONS
from cogvx.errors import UserError, first_line, listed
from cogvx.progress import bar, counted

ARCHIVES = (".tar", ".tar.gz", ".tgz")
# Bytes of a member that holds a caption.
LONGEST_TEXT = 1_000_000
# Bytes of what stands before a member: its long name, its dates and the like.
LONGEST_BEFORE_MEMBER = 1_000_000
# A packed archive may become so many times as large, from so many bytes on. Clips hardly shrink.
MOST_TIMES_AS_LARGE, ALWAYS_ALLOWED = 100, 10**9
# What reading half an archive raises.
CUT_OFF = (tarfile.TarError, EOFError, zlib.error, OSError)
PACKED = b"\x1f\x8b"  # how gzip's files begin
HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


@dataclass
class WebDataset(Data):
    """dataset_name: the archives in instance_data_root, with blanks between; None: all of them.

    caption_column: the ending of the captions, or a name in the .json members; None: .txt, or one
    of the usual names. video_column and image_column are endings.
    """

    dataset_name: str | None
    caption_column: str | None
    caption: str | None  # of every clip that has none

    needs_root: ClassVar[bool] = True

    def problems(self) -> list[str]:
        endings = {"video_column": self.video_column.split() or [""]}
        if self.image_column is not None:
            endings["image_column"] = [self.image_column]
        return super().problems() + [
            f"data.{name}={getattr(self, name)}: with data=webdataset it is the ending of members, "
            f"such as {'.mp4' if name == 'video_column' else '.png'}"
            for name, found in endings.items()
            if not all(re.fullmatch(r"(\.\w+)+", each) for each in found)
        ]

    def rows(self) -> list[ListedClip]:
        archives = self.archives()
        found = self.read_all(archives)
        self.said = tuple(said_of_cut(found))
        require_few_cut(found, self.max_bad_fraction)
        rows, problems = [], []
        for archive in found:
            for sample in archive.samples:
                try:
                    rows.append(self.row(archive.name, sample))
                except UserError as error:
                    problems.append(f"{archive.name}:{shortened(sample.key)} {error}")
        if problems:
            total = len(rows) + len(problems)
            headline = f"{len(problems)} of {counted(total, 'clip')} cannot be used as they are:"
            raise UserError(listed(headline, problems))
        return rows

    def row(self, archive: str, sample: TarSample) -> ListedClip:
        """UserError if there is no clip, no caption, or no image where images are asked for."""
        if sample.problem:
            raise UserError(sample.problem)
        if sample.caption is None and self.caption is None:
            raise UserError(
                'has no caption beside it; the same one for all that have none: data.caption="..."'
            )
        if self.image_column is not None and sample.image is None:
            raise UserError(f"has no image beside it: {sample.key}{self.image_column}")
        folder = self.cache_dir / "videos"
        return ListedClip(
            captions_of_cell(self.caption if sample.caption is None else sample.caption),
            folder / sample.video,
            sample.image and folder / sample.image,
            f"{archive}:{sample.key}",
        )

    def archives(self) -> list[Path]:
        """UserError if one is not there, or if there is none."""
        root = self.root()
        if self.dataset_name is None:
            found = sorted(p for p in root.rglob("*") if p.name.lower().endswith(ARCHIVES))
            found = [path for path in found if path.is_file()]
            if not found:
                raise UserError(f"{root} has no archive: no file ends in {', '.join(ARCHIVES)}")
            return found
        names = [name for part in self.dataset_name.split() for name in in_braces(part)]
        missing = [name for name in names if not (root / name).is_file()]
        if missing or not names:
            here = sorted(p.name for p in root.iterdir() if p.name.lower().endswith(ARCHIVES))
            raise UserError(
                f"data.dataset_name={self.dataset_name}: {', '.join(missing[:3]) or 'no archive'} "
                f"not found in {root}. Archives there: {', '.join(here[:8]) or 'none'}"
            )
        return [root / name for name in names]

    def read_all(self, archives: list[Path]) -> list[Archive]:
        """What each archive holds. One that was read before is not opened."""
        kinds = [self.caption_column, self.video_column, self.image_column]
        places = [remembered(self.cache_dir, "archive", path, *kinds) for path in archives]
        total = sum(path.stat().st_size for path in archives)
        found = []
        with bar(
            total=total, desc="read    archives", unit="B", unit_scale=True, leave=False
        ) as progress:
            for path, place in zip(archives, places, strict=True):
                with remembering(place, self.cache_dir / "videos") as kept:
                    if not kept.done:
                        kept.restart()
                        for value in self.read_one(path, progress):
                            kept.add(value)
                        kept.finish()
                    found.append(Archive.of(path.name, kept.rows))
                progress.update(path.stat().st_size)
        return found

    def read_one(self, path: Path, progress) -> Iterator[dict]:
        """A dictionary for each sample, then one that says how the archive ends."""
        samples: dict[str, TarSample] = {}
        member, why = None, None
        try:
            with (
                unpacked(path) as content,
                tarfile.open(path, "r|", content, tarinfo=Member) as archive,
            ):
                for member in archive:
                    self.take(member, archive, samples)
        except CUT_OFF as error:
            if member is None:
                raise UserError(f"{path} is no tar archive: {first_line(error)}") from error
            why = first_line(error)
        why = why or (None if ends(path) else "it has no end")
        # Of the sample that the end cuts, the caption may be missing.
        whole = [s for s in samples.values() if s.video or s.problem]
        if why is not None and whole and whole[-1].caption is None:
            whole.pop()
        alone = sum(each.caption is not None and not each.video for each in samples.values())
        yield from (dataclasses.asdict(sample) | {"files": sample.files()} for sample in whole)
        yield {"cut": why, "alone": alone}

    def take(self, member: tarfile.TarInfo, archive: tarfile.TarFile, samples: dict) -> None:
        """Puts a member where it belongs. Folders, links and hidden files are left out."""
        parts = member.name.split("/")
        if not member.isfile() or parts[-1].startswith(".") or "__MACOSX" in parts:
            return
        ending = self.ending_of(member.name)
        if ending is None:
            return
        key = member.name[: -len(ending)]
        sample = samples.setdefault(key, TarSample(ascii(key)[1:-1]))
        # A few bytes can say that such a file has a terabyte.
        if member.issparse():
            sample.problem = f"has a {ending} with holes, which is not read: pack it without tar -S"
            return
        content = archive.extractfile(member)
        if ending in self.video_column.lower().split():
            if sample.video is not None:
                sample.problem = "comes twice in the archive"
            sample.video = kept_file(self.cache_dir / "videos", content, ending, member.size)
        elif ending == self.image_column:
            sample.image = kept_file(self.cache_dir / "videos", content, ending, member.size)
        else:
            raw = content.read(LONGEST_TEXT + 1)
            require_bytes(len(raw), min(member.size, LONGEST_TEXT + 1))
            sample.read_caption(raw, ending, self.caption_column)

    def ending_of(self, name: str) -> str | None:
        """Which of the endings that are asked for a name has."""
        caption = self.caption_column
        texts = [caption] if caption and caption.startswith(".") else [".json"]
        texts += [".txt"] if caption is None else []
        known = [*self.video_column.lower().split(), *texts, self.image_column]
        fitting = [each for each in known if each and name.lower().endswith(each)]
        return max(fitting, key=len, default=None)


class Member(tarfile.TarInfo):
    """tarfile reads what stands before a member into memory, however long it says that it is."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> Member:
        found = super().frombuf(buf, encoding, errors)
        if found.type in HEADERS and found.size > LONGEST_BEFORE_MEMBER:
            raise tarfile.ReadError(f"a header says that it has {found.size} bytes")
        return found


class Unpacked(gzip.GzipFile):
    """A packed archive. OSError where it becomes many times as large as the file."""

    most = 0  # bytes

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        if self.tell() > self.most:
            raise OSError(f"it unpacks to more than {MOST_TIMES_AS_LARGE} times its size")
        return found


def unpacked(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        packed = file.read(2) == PACKED
    if not packed:
        return path.open("rb")
    content = Unpacked(path)
    content.most = max(ALWAYS_ALLOWED, MOST_TIMES_AS_LARGE * path.stat().st_size)
    return content


@dataclass
class TarSample:
    """What an archive holds of one clip. The files are in the cache."""

    key: str
    video: str | None = None
    image: str | None = None
    caption: object = None  # a text, or a list of texts
    problem: str | None = None

    def files(self) -> list[str]:
        return [name for name in (self.video, self.image) if name]

    def read_caption(self, raw: bytes, ending: str, column: str | None) -> None:
        """A .txt comes before a .json."""
        if len(raw) > LONGEST_TEXT:
            self.problem = f"has a caption of more than {LONGEST_TEXT} bytes: is it another file?"
            return
        try:
            text = raw.decode("utf-8-sig")
            if ending != ".json" or column == ".json":
                self.caption = " ".join(text.split()) or None
            elif self.caption is None:
                self.caption = from_json(json.loads(text), column)
        except UnicodeDecodeError:
            self.problem = f"has a caption ({ending}) that is not UTF-8 text"
        except (ValueError, RecursionError) as error:
            self.problem = f"has a .json that is not JSON: {first_line(error)}"


def from_json(values: object, column: str | None) -> object:
    """The caption in the values of a .json member; None if there is none."""
    if not isinstance(values, dict):
        return None
    names = USUAL_CAPTIONS if column is None else (column,)
    return next((values[name] for name in names if name in values), None)


@dataclass
class Archive:
    """What was read of an archive."""

    name: str
    samples: list[TarSample] = field(default_factory=list)
    cut: str | None = None  # why its end is missing
    alone: int = 0  # captions without a clip

    @classmethod
    def of(cls, name: str, rows: list[dict]) -> Archive:
        *samples, last = rows
        names = [each.name for each in dataclasses.fields(TarSample)]
        found = [TarSample(**{key: row[key] for key in names}) for row in samples]
        return cls(name, found, last["cut"], last["alone"])


def said_of_cut(archives: list[Archive]) -> Iterator[str]:
    for archive in archives:
        if archive.cut is not None:
            yield (
                f"warning {archive.name} is cut off after {counted(len(archive.samples), 'clip')} "
                f"({archive.cut}): these are used. Copy the archive again to have the others"
            )
        if archive.alone:
            what = counted(archive.alone, "caption has", "captions have")
            yield f"warning {archive.name}: {what} no clip of the same name"


def require_few_cut(archives: list[Archive], most: float) -> None:
    """UserError if more archives are cut off than data.max_bad_fraction allows."""
    cut = [archive for archive in archives if archive.cut is not None]
    if len(cut) > most * len(archives):
        problems = [
            f"{each.name} is cut off after {counted(len(each.samples), 'clip')} ({each.cut})"
            for each in cut
        ]
        raise UserError(
            listed(
                f"{len(cut)} of {counted(len(archives), 'archive')} are cut off, more than "
                f"data.max_bad_fraction={most} allows. Copy them again, or use what is there: "
                f"data.max_bad_fraction=1",
                problems,
            )
        )


def ends(path: Path) -> bool:
    """Whether a plain archive ends as it must: with two blocks of zeros."""
    if path.suffix.lower() != ".tar":
        return True
    with path.open("rb") as file:
        file.seek(-min(1024, path.stat().st_size), 2)
        return not file.read().strip(b"\0")


def in_braces(name: str) -> list[str]:
    """As a shell does: {000..002}.tar is 000.tar, 001.tar and 002.tar; {a,b}.tar is two names."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", name)
    if found is None:
        return [name]
    if found[3] is not None:
        values = found[3].split(",")
    else:
        values = [f"{n:0{len(found[1])}}" for n in range(int(found[1]), int(found[2]) + 1)]
    before, after = name[: found.start()], name[found.end() :]
    return [whole for value in values for whole in in_braces(f"{before}{value}{after}")]
