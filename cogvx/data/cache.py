"""A folder of tensors, shared by runs, ranks and the jobs of a sweep.

A file's name is a hash of everything that decides its content: two processes that write the same
name write the same content. A process locks a file while it makes it, so that others that run at
the same time do not make it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING

from cogvx.data.index import Index
from cogvx.errors import UserError, first_line
from cogvx.files import replacing, write_text
from cogvx.progress import bar, heartbeat

if TYPE_CHECKING:
    from torch import Tensor

    from cogvx.data.footage import FileFacts


# Folders of the sets' indexes, and of the lists of files that runs use.
INDEX, LISTS = "index", "lists"
LOOKED_AT_ONCE = 4
VERSION_OF_SCENES = 1  # raise it when a change finds other scenes in the same file


class Cache:
    """What is known of its files, and of the clips, is remembered in an index for each set.

    set_name: of the set of clips. decode_seconds: facts() gives up then; None: never.
    """

    def __init__(
        self, folder: Path, set_name: str = "other files", decode_seconds: float | None = None
    ):
        self.folder, self.decode_seconds = folder, decode_seconds
        self.index = self.index_of(set_name)
        # A model is used with many sets, and its files on the hub's cache are links.
        self.models = self.index_of("models")

    def index_of(self, name: str) -> Index:
        return Index(self.folder / INDEX / f"{content_key(name)[:16]}.jsonl", name)

    def path(self, kind: str, key: str) -> Path:
        # Many times faster than one part after the other.
        return Path(f"{self.folder}/{kind}/{key[:2]}/{key}.safetensors")

    def write(
        self, path: Path, tensors: dict[str, Tensor], about: dict[str, object] | None = None
    ) -> None:
        """Writes the tensors, with `about` and a digest of all of it as the file's metadata.

        UserError if a value is not finite (training would go wrong silently), or on a full disk.
        """
        from safetensors.torch import save_file

        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"encoding gave {name} with values that are not finite ({tensor.dtype}): "
                    f"fp16 can overflow where bf16 does not; try train.mixed_precision=bf16"
                )
        about = about or {}
        # In one text: safetensors writes several in any order.
        metadata = {"about": json.dumps({**about, "digest": digest_of(about, tensors)})}
        try:
            with replacing(path) as partial:
                save_file(tensors, partial, metadata=metadata)
                # safetensors writes files that only their owner can read.
                partial.chmod(path.parent.stat().st_mode & 0o666)
        # safetensors reports a full disk as an error of its own, not as OSError.
        except Exception as error:
            raise UserError(
                f"cannot write to the cache, {path.parent}: {error}. Free some space there, "
                f"or set data.cache_dir to another disk"
            ) from error
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        self.keep_about(path, os.stat(path), {**about, "shapes": shapes})

    def about(self, path: Path) -> dict | None:
        """What write() was given as `about`, and the tensors' shapes as `shapes`.

        None if there is no file, or only a part of one.
        """
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            return None
        known = self.index.recall("about", self.name_of(path), stat)
        if known is None and (known := about_in_file(path)) is not None:
            self.keep_about(path, stat, known)
        return known

    def keep_about(self, path: Path, stat: os.stat_result, about: dict) -> None:
        self.index.keep("about", self.name_of(path), stat, about)

    def keep_list(self, paths: Iterable[Path]) -> str:
        """The name of a list of these files, for task=cache: runs with the same files share it."""
        names = "\n".join(sorted({self.name_of(path) for path in paths}))
        key = content_key(names)
        path = self.folder / LISTS / f"{key}.txt"
        # A run can do without it.
        with contextlib.suppress(OSError):
            if not path.is_file():
                write_text(path, names)
        return key

    def name_of(self, path: Path) -> str:
        """A file of the cache, from the cache's folder."""
        return str(path).removeprefix(f"{self.folder}/")

    def fingerprint(self, path: Path) -> str:
        """The SHA-256 of a file, or of all files below a folder.

        It is remembered for each file, by path, size and time of change, so that 10 GB of text
        encoder are read only once.
        """
        stat = os.stat(path)
        if not S_ISDIR(stat.st_mode):
            return self.remembered("sha256", path, stat, sha256_of, self.index)
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        digests = (
            self.remembered("sha256", file, os.stat(file), sha256_of, self.models)
            for file in map(Path.resolve, files)
        )
        names = (str(file.relative_to(path)) for file in files)
        return content_key(*zip(names, digests, strict=True))

    def look_at(
        self, paths: Iterable[Path], *, facts: bool = False, threshold: float | None = None
    ) -> None:
        """Fingerprints of files, several at a time: what is found here is remembered.

        facts: their facts too. threshold: their scenes too.
        """
        from cogvx.data.footage import BadClip

        def look(path: Path) -> None:
            # It is asked for again, and the clip is then named.
            with contextlib.suppress(OSError, BadClip):
                self.fingerprint(path)
                if facts:
                    self.facts(path)
                if threshold is not None:
                    self.scenes(path, threshold)

        wanted = ["sha256"] + ["facts"] * facts
        wanted += [] if threshold is None else [scenes_at(threshold)]
        unknown = [path for path in dict.fromkeys(paths) if not self.knows(path, *wanted)]
        what = "hash" if wanted == ["sha256"] else "read"
        with ThreadPoolExecutor(LOOKED_AT_ONCE) as pool:
            looked = pool.map(look, unknown)
            for _ in bar(
                looked, total=len(unknown), desc=f"{what}    clips", unit="clip", leave=False
            ):
                pass

    def knows(self, path: Path, *wanted: str) -> bool:
        """Whether this is remembered of the file; without more, its fingerprint."""
        try:
            name, stat = str(path.absolute()), os.stat(path)
        except OSError:
            return False
        found = (self.index.recall(what, name, stat) for what in wanted or ["sha256"])
        return all(value is not None for value in found)

    def facts(self, path: Path) -> FileFacts:
        """What is known of a video file, remembered as fingerprints are.

        BadClip if the file cannot be used.
        """
        from cogvx.data.decoders import surveyed
        from cogvx.data.footage import FileFacts

        def survey(path: Path) -> dict:
            return dataclasses.asdict(surveyed(path, self.decode_seconds).facts)

        return FileFacts(**self.remembered("facts", path, os.stat(path), survey, self.index))

    def scenes(self, path: Path, threshold: float) -> list[tuple[int, int]]:
        """The first frame of each scene and the one after its last, remembered as facts are.

        threshold: as in scenes.jumps(). BadClip if the file cannot be used.
        """
        from cogvx.data.decoders import found_jumps, surveyed

        def look(path: Path) -> list[tuple[int, int]]:
            footage = surveyed(path, self.decode_seconds)
            starts = [0, *found_jumps(footage, threshold, self.decode_seconds)]
            return list(zip(starts, [*starts[1:], len(footage.times)], strict=True))

        what = scenes_at(threshold)
        known = self.remembered(what, path, os.stat(path), look, self.index)
        return [(start, end) for start, end in known]

    def remembered(
        self,
        what: str,
        path: Path,
        stat: os.stat_result,
        find: Callable[[Path], object],
        index: Index,
    ) -> object:
        """find(path), unless the index has it."""
        name = str(path.absolute())
        found = index.recall(what, name, stat)
        if found is None:
            found = find(path)
            index.keep(what, name, stat, found)
        return found


def scenes_at(threshold: float) -> str:
    """The name under which they are remembered."""
    return f"scenes {VERSION_OF_SCENES} {threshold}"


def about_in_file(path: Path) -> dict | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            about.pop("digest", None)
            names = list(file.keys())
            shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
            return {**about, "shapes": shapes}
    except (FileNotFoundError, SafetensorError):
        return None


def damage(path: Path) -> str | None:
    """What is wrong with a file of the cache: None if nothing is, "" if it has no digest."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            digest = about.pop("digest", "")
            if not digest:
                return ""
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        return f"it cannot be read ({first_line(error)})"
    return None if digest_of(about, tensors) == digest else "its content is not what was written"


def digest_of(about: dict, tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of what is said about a file, and of names, types, shapes and contents."""
    import torch

    digest = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        # numpy knows no bf16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file, heartbeat(f"hash    still reading {path.name}"):
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Gives True if this process is the one to make `path`. It must look first if `path` exists.

    While another process has the claim: gives False, or waits for its turn with `wait`. A claim
    ends with its process, even if that is killed.
    """
    import filelock  # 50 ms: not at start

    # Without fallback_to_soft: such a lock would stay behind when its process is killed.
    lock = filelock.FileLock(f"{path}.lock", fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
    except filelock.Timeout:
        yield False
        return
    except OSError:
        # A disk that has no locks, or cannot be written. Two processes may do the same work there.
        yield True
        return
    try:
        yield True
    finally:
        # Removed while it is held. Those who wait for it see that, and open a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def filled(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder. If it does not exist, fill(path) writes its content first.

    The content is written under a temporary name, so a folder with the right name is complete. If
    several processes start together, one fills the folder and the others wait.
    """
    for wait in (False, True):
        if folder.is_dir():
            return folder
        with claimed(folder, wait=wait) as claim:
            if claim and not folder.is_dir():
                fill_under_another_name(folder, fill)
        if not wait and not claim:
            print(f"waiting for another run to make {folder}", flush=True)
    return folder


def fill_under_another_name(folder: Path, fill: Callable[[Path], None]) -> None:
    from safetensors import SafetensorError

    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        # A killed process of the same number may have left it.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(folder)
    # safetensors reports a full disk as an error of its own.
    except (OSError, SafetensorError) as error:
        # If the folder exists now, another process was faster, on a disk without locks.
        if not folder.is_dir():
            raise UserError(
                f"cannot write {folder}: {error}. If the disk is full, free some space there, "
                f"or choose another disk: data.cache_dir for the cache, task.to for an export"
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def content_key(*parts: object) -> str:
    """A hash of values that JSON can hold, as 40 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]
