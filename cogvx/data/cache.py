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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.data.footage import FileFacts, survey
from cogvx.errors import UserError
from cogvx.files import replacing, write_text
from cogvx.progress import heartbeat

if TYPE_CHECKING:
    from torch import Tensor


class Cache:
    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def write(
        self, path: Path, tensors: dict[str, Tensor], about: dict[str, object] | None = None
    ) -> None:
        """Writes the tensors, with `about` as the file's metadata.

        UserError if a value is not finite (training would go wrong silently), or on a full disk.
        """
        from safetensors.torch import save_file

        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"encoding gave {name} with values that are not finite ({tensor.dtype}): "
                    f"fp16 can overflow where bf16 does not; try train.mixed_precision=bf16"
                )
        try:
            with replacing(path) as partial:
                save_file(tensors, partial, metadata={"about": json.dumps(about or {})})
                # safetensors writes files that only their owner can read.
                partial.chmod(path.parent.stat().st_mode & 0o666)
        # safetensors reports a full disk as an error of its own, not as OSError.
        except Exception as error:
            raise UserError(
                f"cannot write to the cache, {path.parent}: {error}. Free some space there, "
                f"or set data.cache_dir to another disk"
            ) from error

    def about(self, path: Path) -> dict | None:
        """What write() was given as `about`, and the tensors' shapes as `shapes`.

        None if there is no file, or only a part of one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("about", "{}"))
                names = list(file.keys())
                shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
                return {**about, "shapes": shapes}
        except (FileNotFoundError, SafetensorError):
            return None

    def fingerprint(self, path: Path) -> str:
        """The SHA-256 of a file, or of all files below a folder.

        It is remembered for each file, by path, size and time of change, so that 10 GB of text
        encoder are read only once.
        """
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            return content_key(*((str(p.relative_to(path)), self.fingerprint(p)) for p in files))
        remembered = self.remembered("fingerprints", path)
        if remembered.is_file() and len(digest := remembered.read_text()) == 64:
            return digest
        real = path.resolve()
        with real.open("rb") as file, heartbeat(f"hash    still reading {real.name}"):
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        write_text(remembered, digest)
        return digest

    def facts(self, path: Path) -> FileFacts:
        """What is known of a video file. It is remembered, as fingerprints are.

        BadClip if the file cannot be used.
        """
        remembered = self.remembered("facts", path)
        with contextlib.suppress(OSError, ValueError, TypeError):
            return FileFacts(**json.loads(remembered.read_text()))
        found = survey(path).facts
        write_text(remembered, json.dumps(dataclasses.asdict(found)))
        return found

    def remembered(self, kind: str, path: Path) -> Path:
        """Where something about a file is kept, by its path, size and time of change."""
        real = path.resolve()
        stat = real.stat()
        return self.folder / kind / content_key(str(real), stat.st_size, stat.st_mtime_ns)


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
