"""A folder of tensors named by content: what they were made from, and how. Runs, ranks and sweep jobs share it.

A file is written under another name and renamed when whole, so a reader never sees half of one, and two writers of the
same name write the same content. Who makes a file holds its lock, so that others that run at the same time need not make it too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.errors import UserError

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
        """Refuses values that are not finite: they would train silently for hours. `about` is kept as metadata."""
        from safetensors.torch import save_file

        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"encoding gave {name} with values that are not finite ({tensor.dtype}): "
                    f"fp16 can overflow where bf16 does not; try train.mixed_precision=bf16"
                )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            save_file(tensors, partial, metadata={"about": json.dumps(about or {})})
            partial.chmod(
                partial.parent.stat().st_mode & 0o666
            )  # safetensors writes files for their owner alone
            partial.replace(path)
        except (
            Exception
        ) as error:  # safetensors reports a full disk as its own error, not as OSError
            raise UserError(
                f"cannot write to the cache, {path.parent}: {error}. Free some space there, or set data.cache_dir to another disk"
            ) from error

    def about(self, path: Path) -> dict | None:
        """What write() was told, and the tensors' shapes as `shapes`; None if there is no whole file."""
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
        """SHA-256 of a file, or of every file below a folder. Remembered per file by place, size and time of change, so
        that 10 GB of text encoder are read once."""
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            return key_of(*((str(p.relative_to(path)), self.fingerprint(p)) for p in files))
        real = path.resolve()
        stat = real.stat()
        note = self.folder / "fingerprints" / key_of(str(real), stat.st_size, stat.st_mtime_ns)
        if note.is_file() and len(digest := note.read_text()) == 64:
            return digest
        with real.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f"{note.name}.{os.getpid()}.partial")
        partial.write_text(digest)
        partial.replace(note)
        return digest


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process is the one to make `path`, if it still is not there; False, without `wait`, while another one is.
    A claim ends with its process, however that ends."""
    lock = path.with_name(f"{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a disk without locks: two processes may do the same work there
            pass
        yield True
        # `path` is there now. After an error it is not, and the lock stays for those who wait for it.
        lock.unlink(missing_ok=True)


def filled(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder, filled unless it is there. That happens under another name, renamed when done: a folder of this name is
    whole. When several processes start together, one fills it and the others wait."""
    for wait in (False, True):
        if folder.is_dir():
            return folder
        with claimed(folder, wait=wait) as mine:
            if mine and not folder.is_dir():
                fill_under_another_name(folder, fill)
        if not wait and not mine:
            print(f"waits for another run to make {folder}", flush=True)
    return folder


def fill_under_another_name(folder: Path, fill: Callable[[Path], None]) -> None:
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process with the same number
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(folder)
    except Exception as error:  # safetensors reports a full disk as its own error, not as OSError
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.is_dir():  # else another process was first, on a disk without locks
            raise UserError(
                f"cannot write {folder}: {error}. If the disk is full, free some space there or set data.cache_dir to another"
            ) from error


def key_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]
