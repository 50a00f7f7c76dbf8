"""A folder of tensors, shared by runs, ranks and the jobs of a sweep.

A file's name is a hash of everything that decides its content: two processes that write the same
name write the same content. A process locks a file while it makes it, so that others that run at
the same time do not make it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING

from cogvx.data.index import Index
from cogvx.errors import UserError, first_line
from cogvx.files import flush_to_disk, replacing, write_text
from cogvx.progress import bar, heartbeat

if TYPE_CHECKING:
    from torch import Tensor

    from cogvx.data.decoders import Limits
    from cogvx.data.footage import FileFacts


# Folders of the sets' indexes, and of the lists of files that runs use.
INDEX, LISTS = "index", "lists"
# What the index calls `about` of a file whose content was compared with its digest.
WHOLE = "whole"
LOOKED_AT_ONCE = 4
VERSION_OF_SCENES = 1  # raise it when a change finds other scenes in the same file


class DamagedFile(Exception):
    """Why a file of the cache cannot be used. It can be made again."""


class Cache:
    """What is known of its files, and of the clips, is remembered in an index for each set.

    set_name: of the set of clips. limits: what facts() may take for a file.
    """

    def __init__(self, folder: Path, set_name: str = "other files", limits: Limits = (None, None)):
        self.folder, self.limits = folder, limits
        self.index = self.index_of(set_name)
        # A model is used with many sets, and its files on the hub's cache are links.
        self.models = self.index_of("models")
        # Files that are there and cannot be used, and why.
        self.damaged: dict[Path, str] = {}
        # Files that were asked for and do not exist any more.
        self.vanished: set[Path] = set()

    def index_of(self, name: str) -> Index:
        return Index(self.folder / INDEX / f"{content_key(name)[:16]}.jsonl", name)

    def path(self, kind: str, key: str) -> Path:
        # Many times faster than one part after the other.
        return Path(f"{self.folder}/{kind}/{key[:2]}/{key}.safetensors")

    def write(
        self, path: Path, tensors: dict[str, Tensor], about: dict[str, object] | None = None
    ) -> None:
        """save(), and UserError if a value is not finite: training would go wrong silently."""
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"encoding gave {name} with values that are not finite ({tensor.dtype}): "
                    f"fp16 can overflow where bf16 does not; try train.mixed_precision=bf16"
                )
        self.save(path, tensors, about or {})

    def save(self, path: Path, tensors: dict[str, Tensor], about: dict[str, object]) -> None:
        """Writes the tensors, with `about` and a digest of all of it as the file's metadata.

        The file is on the disk before the index says that it is whole: otherwise a power cut could
        leave zeros that nobody looks at again. UserError on a full disk.
        """
        from safetensors.torch import save_file

        # In one text: safetensors writes several in any order.
        metadata = {"about": json.dumps({**about, "digest": digest_of(about, tensors)})}
        try:
            with replacing(path) as partial:
                save_file(tensors, partial, metadata=metadata)
                # safetensors writes files that only their owner can read.
                partial.chmod(path.parent.stat().st_mode & 0o666)
                flush_to_disk(partial)
        # safetensors reports a full disk as an error of its own, not as OSError.
        except Exception as error:
            raise UserError(
                f"cannot write to the cache, {path.parent}: {error}. Free some space there, "
                f"or set data.cache_dir to another disk"
            ) from error
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        self.keep_about(path, os.stat(path), {**about, "shapes": shapes})

    def said_of_refusal(self) -> list[str]:
        refusal = self.index.refusal or self.models.refusal
        if refusal is None:
            return []
        return [
            f"warning {self.folder} cannot be written ({refusal}): what this start has found out "
            f"of clips and model is forgotten, and the next one reads them again"
        ]

    def about(self, path: Path) -> dict | None:
        """What write() was given as `about`, and the tensors' shapes as `shapes`.

        A file that has changed since it was last looked at is read, and compared with its digest.
        None if there is no whole file; self.damaged says why, if there is a file.
        """
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            return None
        known = self.index.recall(WHOLE, self.name_of(path), stat)
        return self.checked(path, stat) if known is None else known

    def checked(self, path: Path, stat: os.stat_result) -> dict | None:
        try:
            about, _ = read_whole(path)
        except FileNotFoundError:
            return None
        except DamagedFile as reason:
            self.damaged[path] = str(reason)
            return None
        self.keep_about(path, stat, about)
        return about

    def lacking(self, paths: Iterable[Path]) -> list[Path]:
        """Those that are not there, or damaged. Several are read at a time."""
        paths, absent, unchecked = list(dict.fromkeys(paths)), set(), []
        for path in paths:
            try:
                stat = os.stat(path)
            except FileNotFoundError:
                absent.add(path)
                continue
            if self.index.recall(WHOLE, self.name_of(path), stat) is None:
                unchecked.append(path)
        with ThreadPoolExecutor(LOOKED_AT_ONCE) as pool:
            found = pool.map(self.about, unchecked)
            settings = {"desc": "check   cache", "unit": "file", "leave": False}
            abouts = bar(found, total=len(unchecked), **settings)
            absent |= {p for p, about in zip(unchecked, abouts, strict=True) if about is None}
        return [path for path in paths if path in absent]

    def keep_about(self, path: Path, stat: os.stat_result, about: dict) -> None:
        self.damaged.pop(path, None)
        self.index.keep(WHOLE, self.name_of(path), stat, about)

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
        encoder are read only once. Of a file that has vanished it is what it was.
        """
        stat = self.stat_of(path)
        if stat is None or not S_ISDIR(stat.st_mode):
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
        told = {"total": len(unknown), "desc": f"{what}    clips", "unit": "clip", "leave": False}
        with ThreadPoolExecutor(LOOKED_AT_ONCE) as pool:
            try:
                for _ in bar(pool.map(look, unknown), **told):
                    pass
            finally:
                # A run that is stopped does not read the rest.
                pool.shutdown(cancel_futures=True)

    def knows(self, path: Path, *wanted: str) -> bool:
        """Whether this is remembered of the file; without more, its fingerprint."""
        try:
            name, stat = str(path.absolute()), self.stat_of(path)
        except OSError:
            return False
        found = (self.index.recall(what, name, stat) for what in wanted or ["sha256"])
        return all(value is not None for value in found)

    def has_known(self, path: str) -> bool:
        """Whether this file's content was known once."""
        return self.index.recall("sha256", path, None) is not None

    def stat_of(self, path: Path) -> os.stat_result | None:
        """None if the file has vanished."""
        try:
            return os.stat(path)
        except FileNotFoundError:
            self.vanished.add(path)
            return None

    def facts(self, path: Path) -> FileFacts:
        """What is known of a video file, remembered as fingerprints are.

        BadClip if the file cannot be used.
        """
        from cogvx.data.decoders import surveyed
        from cogvx.data.footage import FileFacts

        def survey(path: Path) -> dict:
            return dataclasses.asdict(surveyed(path, *self.limits).facts)

        return FileFacts(**self.remembered("facts", path, self.stat_of(path), survey, self.index))

    def scenes(self, path: Path, threshold: float) -> list[tuple[int, int]]:
        """The first frame of each scene and the one after its last, remembered as facts are.

        threshold: as in scenes.jumps(). BadClip if the file cannot be used.
        """
        from cogvx.data.decoders import found_jumps, surveyed

        def look(path: Path) -> list[tuple[int, int]]:
            footage = surveyed(path, *self.limits)
            starts = [0, *found_jumps(footage, threshold, *self.limits)]
            return list(zip(starts, [*starts[1:], len(footage.times)], strict=True))

        what = scenes_at(threshold)
        known = self.remembered(what, path, self.stat_of(path), look, self.index)
        return [(start, end) for start, end in known]

    def remembered(
        self,
        what: str,
        path: Path,
        stat: os.stat_result | None,
        find: Callable[[Path], object],
        index: Index,
    ) -> object:
        """find(path), unless the index has it. stat: None if the file has vanished."""
        name = str(path.absolute())
        found = index.recall(what, name, stat)
        if found is None:
            if stat is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            found = find(path)
            index.keep(what, name, stat, found)
        return found


def scenes_at(threshold: float) -> str:
    """The name under which they are remembered."""
    return f"scenes {VERSION_OF_SCENES} {threshold}"


def read_whole(path: Path) -> tuple[dict, str]:
    """What write() was given as `about`, with the tensors' shapes as `shapes`; and the digest.

    Reads all of the file. The digest is "" in files of earlier versions. DamagedFile if it is not
    what was written, FileNotFoundError if it is not there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # Not mapped into memory: there, an error of the disk would end the process.
        content = path.read_bytes()
        tensors, about = load(content), about_in(content)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, LookupError) as error:
        raise DamagedFile(f"it cannot be read ({first_line(error)})") from error
    digest = about.pop("digest", "")
    misnamed = not digest and any(is_digest(value) for value in about.values())
    if misnamed or (digest and digest_of(about, tensors) != digest):
        raise DamagedFile("its content is not what was written")
    return {**about, "shapes": {name: list(t.shape) for name, t in tensors.items()}}, digest


def about_in(content: bytes) -> dict:
    """The metadata of a safetensors file: its header is JSON, after eight bytes with its length.

    LookupError or ValueError if there is other metadata.
    """
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__")
    about = {} if metadata is None else json.loads(metadata["about"])
    if not isinstance(about, dict):
        raise ValueError("its metadata is not what was written")
    return about


def is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


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


def content_key(*parts: object) -> str:
    """A hash of values that JSON can hold, as 40 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]
