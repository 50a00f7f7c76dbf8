"""No damaged byte of the cache is trained on: it is found, said, and made again."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from cogvx.data import cache as caching
from cogvx.data.cache import Cache, DamagedFile, content_key, read_whole
from cogvx.data.sharing import make_missing

TENSORS = {"latent_moments": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)}
ABOUT = {"frames": 9, "look": "ab"}


@pytest.fixture
def file(tmp_path):
    """A file of a cache that is remembered as whole."""
    cache = Cache(tmp_path / "cache", "a set")
    path = cache.path("latents", content_key("a clip"))
    cache.write(path, TENSORS, ABOUT)
    return path


def flipped(at: int):
    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[at] ^= 1
        return bytes(changed)

    return flip


DAMAGES = {
    "latents": flipped(-3),
    "metadata": lambda content: content.replace(b'\\"frames\\"', b'\\"fraems\\"'),
    "no metadata": lambda content: content.replace(b'"about"', b'"abouu"'),
    "no digest": lambda content: content.replace(b'\\"digest\\"', b'\\"dihest\\"'),
    "header": flipped(0),
    "truncated": lambda content: content[:-1],
    "zeroed": lambda content: bytes(len(content)),
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again_and_said(tmp_path, file, damage):
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage](whole))
    assert file.read_bytes() != whole
    said, cache = [], Cache(tmp_path / "cache", "a set")

    def make(share):
        for path in share.take_group(1):
            share.write(path, TENSORS, ABOUT)

    assert make_missing([file], cache, make, "clip", said.append) == {}
    assert file.read_bytes() == whole and cache.damaged == {}
    name = file.relative_to(tmp_path / "cache")
    assert said[0].startswith(f"warning 1 file of the cache is damaged, and made again: {name}: it")
    assert Cache(tmp_path / "cache", "a set").about(file)["frames"] == 9


def test_every_flipped_byte_is_found(file):
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(flipped(place)(whole))
        with pytest.raises(DamagedFile):
            read_whole(file)


def test_a_start_reads_only_what_has_changed(tmp_path, file, monkeypatch):
    read, really = [], caching.read_whole
    monkeypatch.setattr(caching, "read_whole", lambda path: read.append(path) or really(path))
    assert Cache(tmp_path / "cache", "a set").lacking([file, file]) == [] and read == []
    os.utime(file, ns=(0, 0))
    for _ in range(2):
        assert Cache(tmp_path / "cache", "a set").lacking([file]) == [] and read == [file]
    assert Cache(tmp_path / "cache", "another set").about(file)["frames"] == 9
    assert read == [file] * 2, "each set has a memory of its own"


def test_what_earlier_versions_remembered_without_reading_it_is_not_believed(tmp_path, file):
    index = next((tmp_path / "cache" / "index").iterdir())
    index.write_text(index.read_text().replace('["whole"', '["about"'))
    stat = file.stat()
    file.write_bytes(flipped(-3)(file.read_bytes()))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Cache(tmp_path / "cache", "a set").about(file) is None


def test_a_file_without_a_digest_is_of_an_earlier_version_and_used(tmp_path, file):
    save_file(TENSORS, file, metadata={"about": json.dumps(ABOUT)})
    found = Cache(tmp_path / "cache", "a set").about(file)
    assert found == ABOUT | {"shapes": {"latent_moments": [2, 3]}}


def test_a_disk_that_cannot_read_a_file_costs_that_file(tmp_path, file, monkeypatch):
    def fails(path):
        raise OSError(5, "Input/output error")

    os.utime(file, ns=(0, 0))
    monkeypatch.setattr(type(file), "read_bytes", fails)
    cache = Cache(tmp_path / "cache", "a set")
    # The index cannot be read either.
    assert cache.lacking([file]) == [file] and "Input/output error" in cache.damaged[file]


def test_a_file_is_on_the_disk_before_it_is_remembered_as_whole(tmp_path, monkeypatch):
    cache, done = Cache(tmp_path / "cache", "a set"), []
    monkeypatch.setattr(caching, "flush_to_disk", lambda path: done.append(path.suffix))
    monkeypatch.setattr(cache.index, "keep", lambda *given: done.append("kept"))
    cache.write(cache.path("latents", content_key("another")), TENSORS, ABOUT)
    assert done == [".partial", "kept"]
