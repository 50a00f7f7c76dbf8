"""data=dataset: whatever datasets.load_dataset() reads, on this machine or on the hub."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cogvx.data.arriving import Arrived, remembered, remembering
from cogvx.data.listed import (
    ListedClip,
    is_below,
    located,
    require_columns,
)
from cogvx.data.sources import Data
from cogvx.errors import UserError, first_line, lacking, listed
from cogvx.files import absolute, is_hub_id, write_bytes
from cogvx.hub_client import COMMITS, OnTheHub, split_revision
from cogvx.progress import bar

# How the name of a clip's file may end.
SUFFIX = re.compile(r"\.\w{1,10}")


def fetched_from_hub(path: object, repo: str) -> object:
    """A streamed row names a file on the hub as hf://datasets/name/repo@commit/clip.mp4.

    UserError if it is of another repository: the user's token may open private ones.
    """
    if not str(path).startswith("hf://"):
        return path
    from huggingface_hub import HfFileSystem, hf_hub_download

    place = HfFileSystem().resolve_path(path)
    if place.repo_id.lower() != repo.lower():
        raise UserError(f"data.dataset_name={repo} names a file of another one: {path}")
    how = {"repo_type": place.repo_type, "revision": place.revision}
    return Path(hf_hub_download(place.repo_id, place.path_in_repo, **how))


def require_from_hub(rows: list[ListedClip], cache_dir: Path) -> None:
    """UserError if a row of a set on the hub names a file that did not come from there."""
    import datasets
    from huggingface_hub import constants

    places = [cache_dir, constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE]
    places = [os.path.abspath(place) for place in places]
    problems = [
        f"{row.origin} names {path}"
        for row in rows
        for path in (row.video, row.image)
        if path is not None and not any(is_below(str(path), place) for place in places)
    ]
    if problems:
        headline = "a data set of the hub names files of this machine, which did not come with it:"
        raise UserError(
            listed(headline, problems) + "\nIf they are yours: data.instance_data_root=THEIR_FOLDER"
        )


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
            found = located(self.cells(), root, anywhere=self.allow_outside_root, known=self.known)
            if root is None and self.is_on_hub() and not self.allow_outside_root:
                require_from_hub(found, self.cache_dir)
            return found
        except UserError:
            raise
        # datasets and the hub's client raise errors of many kinds.
        except Exception as error:
            place = "here" if Path(self.dataset_name).exists() else "on the hub"
            if self.is_on_hub():
                self.on_the_hub().require_access()
            raise UserError(
                f"data.dataset_name={self.dataset_name} (split {self.split}) could not be read: "
                f"it is {place}, but not in a form that datasets reads. "
                f"datasets says: {first_line(error)}"
            ) from error

    def is_on_hub(self) -> bool:
        return is_hub_id(self.dataset_name)

    def on_the_hub(self) -> OnTheHub:
        repo, revision = split_revision(self.dataset_name)
        revision = COMMITS.get(self.dataset_name, revision)
        local = "data.dataset_name=/clips/metadata.csv"
        return OnTheHub(repo, revision, "data.dataset_name", local, kind="dataset")

    def cells(self) -> list[ListedClip]:
        # What comes is the newest now. From here on it is this commit.
        if self.is_on_hub() and (commit := self.on_the_hub().commit()) is not None:
            COMMITS[self.dataset_name] = commit
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
        # The commit is in the state. A run whose record names it finds the rows of its first start.
        name = split_revision(self.dataset_name)[0] if self.is_on_hub() else self.dataset_name
        place = remembered(self.cache_dir, "rows", name, self.split, *map(str, self.columns()))
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
        return COMMITS.get(self.dataset_name)

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

        if not Path(self.dataset_name).exists() and not self.is_on_hub():
            raise UserError(
                f"data.dataset_name={self.dataset_name} does not exist here, and is not a hub id: "
                f"give a file, a folder, or name/repo (name/repo@revision) on the hub"
            )
        source, how = Path(self.dataset_name), {"split": self.split, "streaming": self.streaming}
        if not source.is_file():
            name, revision = self.dataset_name, None
            if not source.exists():
                name, revision = self.on_the_hub().repo, self.on_the_hub().revision
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
            return fetched_from_hub(value.get("path"), split_revision(self.dataset_name)[0])
        digest = hashlib.sha256(value["bytes"]).hexdigest()[:32]
        ending = Path(value.get("path") or "x.mp4").suffix
        ending = ending if SUFFIX.fullmatch(ending) else ".mp4"
        path = self.cache_dir / "videos" / f"{digest}{ending}"
        if not path.is_file():
            write_bytes(path, value["bytes"])
        return path
