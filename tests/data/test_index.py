"""What is known of files is remembered until they change. The memory may be lost or damaged."""

import errno
import json
import os
import threading

import pytest
import torch

from cogvx.data import cache as caching
from cogvx.data import index as indexing
from cogvx.data.cache import Cache
from cogvx.data.index import Index


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    return path


def kept(folder, file, *values):
    index = Index(folder / "index.jsonl", "a set")
    for value in values:
        index.keep("sha256", str(file), os.stat(file), value)
    return index


def test_it_is_remembered_until_the_file_changes(tmp_path, file):
    kept(tmp_path, file, "first", "second")
    again = Index(tmp_path / "index.jsonl", "a set")
    assert again.recall("sha256", str(file), os.stat(file)) == "second"
    assert again.recall("facts", str(file), os.stat(file)) is None
    file.write_bytes(b"three")
    assert again.recall("sha256", str(file), os.stat(file)) is None
    file.write_bytes(b"one")
    os.utime(file, ns=(0, 1))
    assert again.recall("sha256", str(file), os.stat(file)) is None, "of another time"


@pytest.mark.parametrize("damage", [b"\n[1, 2", b"\n3\n{}\n[1,2,3,4,5]\n\xff\n\n", b""])
def test_lines_that_are_none_are_left_out(tmp_path, file, damage):
    kept(tmp_path, file, "first")
    with (tmp_path / "index.jsonl").open("ab") as written:
        written.write(damage)
    index = kept(tmp_path, file)
    assert index.recall("sha256", str(file), os.stat(file)) == "first"
    other = tmp_path / "other"
    other.write_bytes(b"two")
    index.keep("sha256", str(other), os.stat(other), "later")
    index.forget()
    assert index.recall("sha256", str(other), os.stat(other)) == "later", "not behind half a line"


def test_lines_that_are_out_of_date_do_not_pile_up(tmp_path, file, monkeypatch):
    monkeypatch.setattr(indexing, "OUTDATED_LINES", 10)
    kept(tmp_path, file, *range(50))
    assert kept(tmp_path, file).recall("sha256", str(file), os.stat(file)) == 49
    about, line = (tmp_path / "index.jsonl").read_text().splitlines()
    assert json.loads(about) == {"index of": "a set"} and json.loads(line)[-1] == 49


def test_processes_add_to_one_file(tmp_path, file):
    indexes = [Index(tmp_path / "index.jsonl", "a set") for _ in range(4)]

    def add(index, number):
        for each in range(50):
            index.keep("sha256", f"{number} {each}", os.stat(file), each)

    threads = [
        threading.Thread(target=add, args=(index, number)) for number, index in enumerate(indexes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    indexes[0].forget()
    assert len(indexes[0].all("sha256")) == 200


def test_without_a_place_to_write_nothing_is_remembered_beyond_this_process(tmp_path, file):
    (tmp_path / "index.jsonl").mkdir()
    index = kept(tmp_path, file, "first")
    assert index.recall("sha256", str(file), os.stat(file)) == "first"
    assert index.refusal == "Is a directory"
    index.forget()
    assert index.recall("sha256", str(file), os.stat(file)) == "first"
    assert kept(tmp_path, file).recall("sha256", str(file), os.stat(file)) is None


def test_a_cache_that_cannot_be_written_is_used_and_said(tmp_path, file):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index").write_text("in the way")
    cache = Cache(tmp_path / "cache", "a set")
    assert cache.said_of_refusal() == []
    assert cache.fingerprint(file) == cache.fingerprint(file)
    [line] = cache.said_of_refusal()
    assert line.startswith(
        f"warning {cache.folder} cannot be written (File exists): what this start"
    )


def test_a_disk_that_is_full_takes_half_a_line_and_the_others_stay(tmp_path, file, monkeypatch):
    kept(tmp_path, file, "first")
    write = os.write

    def full(descriptor, content):
        write(descriptor, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as filling:
        filling.setattr(indexing.os, "write", full)
        index = kept(tmp_path, file, "second", "third")
    assert index.recall("sha256", str(file), os.stat(file)) == "third"
    assert index.refusal == "No space left on device"
    assert kept(tmp_path, file).recall("sha256", str(file), os.stat(file)) == "first"
    assert kept(tmp_path, file, "fourth").refusal is None
    assert kept(tmp_path, file).recall("sha256", str(file), os.stat(file)) == "fourth"


def test_names_in_any_script_are_remembered(tmp_path):
    file = tmp_path / "видео \N{CAT FACE} e\u0301.mp4"
    file.write_bytes(b"one")
    folder = tmp_path / "кэш \u7f13\u5b58"
    cache = Cache(folder, "набор")
    path = cache.path("latents", cache.fingerprint(file)[:40])
    cache.write(path, {"latent_moments": torch.ones(2)}, {"name": file.name})
    again = Cache(folder, "набор")
    assert again.knows(file) and again.lacking([path]) == []
    assert again.about(path)["name"] == file.name


def test_known_files_of_the_cache_are_not_opened(tmp_path, monkeypatch):
    first, opened = Cache(tmp_path, "a set"), []
    path, really = first.path("latents", "ab" * 20), caching.read_whole
    monkeypatch.setattr(caching, "read_whole", lambda path: opened.append(path) or really(path))
    first.write(path, {"latent_moments": torch.ones(2, 3)}, {"frames": 9})
    about = {"frames": 9, "shapes": {"latent_moments": [2, 3]}}
    assert first.about(path) == Cache(tmp_path, "a set").about(path) == about and opened == []
    assert Cache(tmp_path, "another set").about(path) == about and len(opened) == 1
    first.write(path, {"latent_moments": torch.ones(2, 5)}, {"frames": 5})
    assert Cache(tmp_path, "a set").about(path)["frames"] == 5, "it has changed"
    path.unlink()
    assert first.about(path) is None, "it has vanished"


def test_files_that_are_known_are_not_read(tmp_path, monkeypatch):
    read, sha256 = [], caching.sha256_of
    monkeypatch.setattr(caching, "sha256_of", lambda path: read.append(path) or sha256(path))
    paths = [tmp_path / f"{number}.mp4" for number in range(9)]
    for path in paths:
        path.write_text(path.name)
    Cache(tmp_path / "cache", "a set").look_at([*paths, *paths, tmp_path / "absent.mp4"])
    assert sorted(read) == paths
    again = Cache(tmp_path / "cache", "a set")
    again.look_at(paths)
    assert all(len(again.fingerprint(path)) == 64 for path in paths) and len(read) == 9
