"""Whether files from the hub are what the hub has.   [no torch]

The hub's client looks at the size of a file alone. It names each file in its cache by the hash
that the hub gave: SHA-256 for large files, git's SHA-1 for small ones. So the file itself can be
compared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from cogvx.files import read_json, write_json
from cogvx.progress import bar

# In the folder of the repository in the client's cache: what was compared, at which size and time.
HASHES_FILE = "compared_by_cogvx.json"
AT_ONCE = 1 << 22  # bytes


def damaged_files(folder: Path) -> list[Path]:
    """The files of a download whose bytes are others than the hub's. `folder`: its snapshot.

    A file is read once, and again when its size or time has changed. A cache without links keeps
    no hashes: nothing is found there.
    """
    remembered = folder.parents[1] / HASHES_FILE
    compared = read_json(remembered)
    blobs = {path.resolve(): path for path in sorted(folder.rglob("*")) if path.is_symlink()}
    stamps = {blob: stamp(blob) for blob in blobs if blob.is_file() and hash_of_name(blob.name)}
    wanted = [blob for blob in stamps if compared.get(blob.name) != stamps[blob]]
    if not wanted:
        return []
    total = sum(stamps[blob][0] for blob in wanted)
    with bar(total=total, desc="compare", unit="B", unit_scale=True, leave=False) as shown:
        damaged = [blob for blob in wanted if hash_of_blob(blob, shown.update) != blob.name]
    compared |= {blob.name: stamps[blob] for blob in wanted if blob not in damaged}
    remember(remembered, compared)
    return [blobs[blob] for blob in damaged]


def remove_download(path: Path) -> None:
    """Removes a file of a snapshot, so that the client fetches it again."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def stamp(blob: Path) -> list[int]:
    about = os.stat(blob)
    return [about.st_size, about.st_mtime_ns]


def hash_of_name(name: str) -> str | None:
    """The kind of hash that a file of the client's cache is named by. Mirrors have other names."""
    if set(name) - set("0123456789abcdef"):
        return None
    return {40: "sha1", 64: "sha256"}.get(len(name))


def hash_of_blob(blob: Path, tell) -> str:
    digest = hashlib.new(hash_of_name(blob.name), usedforsecurity=False)
    if len(blob.name) == 40:
        # git's hash of a file counts its length too.
        digest.update(b"blob %d\0" % blob.stat().st_size)
    for part in pieces_of(blob):
        digest.update(part)
        tell(len(part))
    return digest.hexdigest()


def pieces_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(AT_ONCE):
            yield part


def remember(path: Path, compared: dict) -> None:
    try:
        write_json(path, compared)
    except OSError:
        # A cache that belongs to somebody else: it is compared at every start.
        return
