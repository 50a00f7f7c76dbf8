"""task=cache, on a cache and runs that are made up."""

import os
import time

import pytest
import torch
import yaml

from cogvx.data.cache import Cache, content_key
from cogvx.data.filled import filled
from cogvx.errors import UserError
from cogvx.files import unfinished
from cogvx.options.tasks import CacheTask, CacheWork
from cogvx.records import cached, record

LONG_AGO = time.time() - 3 * 86400


@pytest.fixture
def outputs(tmp_path):
    """Two runs that use the clips 0, 1 and 1, 2 of a cache with four; one run says nothing."""
    root, cache = tmp_path / "outputs", Cache(tmp_path / "cache")
    paths = [cache.path("latents", content_key(number)) for number in range(4)]
    for path in paths:
        cache.write(path, {"latent_moments": torch.rand(1000)}, {"frames": 9})
    for name in ("quantised/ab/x.safetensors", "fingerprints/abc", "models/nano/model.bin"):
        (cache.folder / name).parent.mkdir(parents=True)
        (cache.folder / name).write_bytes(b"0" * 3000)
    for name, model, used in (
        ("first", "a/model", paths[:2]),
        ("second", "another/model", paths[1:3]),
        ("silent", "a/model", None),
    ):
        (root / name).mkdir(parents=True)
        settings = {"data": {"cache_dir": str(cache.folder)}, "model": {"path": model}}
        text = yaml.safe_dump({"defaults": [{"task": "train"}, "_self_"], **settings})
        (root / name / record.CONFIG).write_text(text)
        if used is not None:
            record.note(root / name, cache_list=cache.keep_list(used))
    cache.keep_list(paths)  # of a run that is gone
    make_older(cache.folder, LONG_AGO)
    return root


def make_older(folder, when):
    for path in folder.rglob("*"):
        os.utime(path, (when, when))


def work(outputs, **settings):
    given = {"do": CacheWork.stats, "older_than": None, "keep_gb": None, "used": False, "yes": True}
    task = CacheTask(folder=outputs, **given | settings)
    cached.work_on_cache(outputs.parent / "cache", task)


def left(outputs) -> dict[str, int]:
    """How many files each folder of the cache has."""
    folders = [path for path in (outputs.parent / "cache").iterdir() if path.is_dir()]
    return {
        folder.name: found
        for folder in folders
        if (found := sum(path.is_file() for path in folder.rglob("*")))
    }


def test_stats_say_what_lies_there_and_what_uses_it(outputs, capsys):
    work(outputs)
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
    assert rows["latents"][0] == "4" and rows["quantised"][0] == "1" and rows["models"][0] == "1"
    assert rows["a/model"][0] == rows["another/model"][0] == "2"
    assert rows[str(outputs / "first")][0] == rows[str(outputs / "second")][0] == "2"
    assert "1 file is of no run in " in said and "task=cache task.do=gc" in said
    assert "not known what 1 run uses" in said and "silent" in said


def test_a_flipped_byte_is_found_and_the_file_made_again(outputs, capsys):
    files = sorted((outputs.parent / "cache" / "latents").rglob("*.safetensors"))
    for place, path in ((-100, files[0]), (3, files[1])):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        os.utime(path, (LONG_AGO, LONG_AGO))
    about = files[2].read_bytes()
    assert b'\\"frames\\": 9' in about
    files[2].write_bytes(about.replace(b'\\"frames\\": 9', b'\\"frames\\": 5'))
    work(outputs, do=CacheWork.verify)
    said = capsys.readouterr().out
    assert [path.is_file() for path in files] == [False, False, False, True]
    assert all(f"damaged {path}" in said for path in files[:3])
    assert "its content is not what was written; removed" in said and "cannot be read" in said
    # The file under quantised/ is none either.
    assert "verify  5 files: 1 are whole, 4 damaged" in said


def test_files_without_a_digest_are_said_and_stay(outputs, capsys):
    from safetensors.torch import save_file

    path = outputs.parent / "cache" / "quantised" / "ab" / "x.safetensors"
    save_file({"weights": torch.ones(3)}, path)
    work(outputs, do=CacheWork.verify)
    said = capsys.readouterr().out
    assert "verify  5 files: 4 are whole, 0 damaged, 1 have no digest" in said and path.is_file()


def test_gc_removes_what_no_run_uses(outputs, capsys):
    work(outputs, do=CacheWork.gc)
    assert left(outputs) == {"index": 1, "latents": 3, "lists": 2, "models": 1, "quantised": 1}
    assert "removed 3 files" in capsys.readouterr().out
    work(outputs, do=CacheWork.gc)
    assert "nothing to remove" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "latents", "quantised"),
    [
        ({"older_than": 4.0}, 4, 1),
        ({"older_than": 2.0}, 3, 0),
        ({"older_than": 2.0, "used": True}, 0, 0),
        ({"keep_gb": 1.0, "used": True}, 4, 1),
        ({"keep_gb": 0.0, "used": True}, 0, 0),
    ],
)
def test_gc_by_age_and_size(outputs, settings, latents, quantised):
    work(outputs, do=CacheWork.gc, **settings)
    found = left(outputs)
    assert (found.get("latents", 0), found.get("quantised", 0)) == (latents, quantised)
    assert found["models"] == 1


def test_gc_takes_the_oldest_first_until_the_size_is_reached(outputs):
    files = sorted((outputs.parent / "cache" / "latents").rglob("*.safetensors"))
    for age, path in enumerate(files):
        os.utime(path, (LONG_AGO - 100 * age, LONG_AGO - 100 * age))
    sizes = [each.size for each in cached.files_in(outputs.parent / "cache")]
    work(outputs, do=CacheWork.gc, keep_gb=(sum(sizes) - 5000) / 1e9, used=True)
    assert [path.is_file() for path in files] == [True, True, False, False]


def test_gc_asks_and_leaves_what_is_new(outputs, capsys):
    work(outputs, do=CacheWork.gc, older_than=2.0, yes=False)
    assert "python launch.py task=cache task.do=gc task.older_than=2 task.yes=true" in (
        capsys.readouterr().out
    )
    make_older(outputs.parent / "cache", time.time())
    work(outputs, do=CacheWork.gc)
    assert left(outputs)["latents"] == 4


def test_gc_waits_for_a_run_that_has_not_said_what_it_uses(outputs):
    with (
        record.locked(outputs / "silent"),
        pytest.raises(UserError, match=r"silent is running, and has not said yet"),
    ):
        work(outputs, do=CacheWork.gc)
    assert left(outputs)["latents"] == 4


def test_a_cache_that_is_not_there_is_said(outputs):
    with pytest.raises(UserError, match="nothing is cached there yet"):
        cached.work_on_cache(outputs / "none", None)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task.older_than=3"], "are for task.do=gc, and this is task.do=stats"),
        (["task.do=gc", "task.used=true"], "alone would remove everything"),
        (["task.do=gc", "task.keep_gb=-1"], "task.keep_gb=-1: must be 0 or more"),
        (["task.do=gcc"], "gc"),
    ],
)
def test_settings_that_do_not_fit_are_refused(compose, overrides, said):
    with pytest.raises(UserError, match=said):
        compose("task=cache", *overrides)


def test_verify_reads_folders_too(outputs, capsys):
    def fill(folder):
        (folder / "weights").write_bytes(b"0123456789")

    for name in ("models/nano_i2v", "demo_3"):
        filled(outputs.parent / "cache" / name, fill)
    weights = outputs.parent / "cache" / "models" / "nano_i2v" / "weights"
    stat = weights.stat()
    weights.write_bytes(b"0123456780")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    work(outputs, do=CacheWork.verify)
    said = capsys.readouterr().out
    assert f"damaged {weights.parent}: the bytes of weights are not those" in said
    assert not weights.parent.exists() and (outputs.parent / "cache" / "demo_3").is_dir()


def test_gc_removes_what_killed_processes_left(outputs, capsys):
    file = outputs.parent / "cache" / "latents" / "ab" / "abcd.safetensors"
    file.parent.mkdir(exist_ok=True)
    left = unfinished(file)
    left = left.with_name(left.name.replace(f".{os.getpid()}.", ".99999999."))
    for path in (left, file.with_suffix(".safetensors.lock")):
        path.touch()
    work(outputs, do=CacheWork.gc, yes=False)
    assert "removed 2 files that killed processes had left" in capsys.readouterr().out
    assert not left.exists()
