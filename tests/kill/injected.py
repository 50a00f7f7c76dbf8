"""Damage, full and read-only disks, deletion and other trouble, each with what must be seen.

Each injection starts from a run that was killed after step 5 of 6, with checkpoints after steps 2
and 4. Afterwards the same command has to end with the result of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import same
from kinds import RUNS
from trials import Place, Start

KIND = RUNS["LoRA"]
NEWEST, BEFORE = "step_000004", "step_000002"
SIZE = "64m"  # of a small disk
AT_STEP = {"role": "launcher", "step": 5}


@dataclass
class Bench:
    """A folder with a run in it, and the commands that an injection gives."""

    place: Place
    folder: Path
    said: str = ""  # by the last start
    strays: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def newest(self) -> Path:
        return self.run / "checkpoints" / NEWEST

    def latents(self) -> Path:
        return sorted(self.folder.glob("cache/latents/*/*.safetensors"))[0]

    def start(self, *more: str, **strike: object) -> Start:
        given = {**AT_STEP, **strike} if strike else None
        start = self.place.start(KIND, self.folder, given, more=more)
        self.said = start.said
        assert "Traceback" not in self.said, self.said
        return start

    def refuses(self, *texts: str, **strike: object) -> None:
        """The next start ends with exit code 2, and says this."""
        start = self.start(**strike)
        assert start.code == 2, (start.code, self.said)
        self.says(*texts)

    def says(self, *texts: str) -> None:
        absent = [text for text in texts if text not in self.said]
        assert not absent, (absent, self.said)

    def ends_equal(self, *texts: str, left: tuple[str, ...] = ()) -> None:
        """The same command ends, says this, and its result is an undisturbed run's.

        left: parts of the names of files that may be there in addition.
        """
        assert self.start().code == 0, self.said
        self.says(*texts)
        wanted = self.place.undisturbed("LoRA")
        found = same.differences(self.folder, wanted)
        assert not found, found
        self.strays = same.strays(self.folder, wanted)
        more = [name for name in self.strays if not any(part in name for part in left)]
        assert not more, more


# -- damage --------------------------------------------------------------------------------------


def flipped(path: Path) -> None:
    """One byte in the middle gets other bits."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def zeroed(path: Path) -> None:
    """A block in the middle is zero, as after a power cut."""
    content, block = bytearray(path.read_bytes()), min(4096, path.stat().st_size // 2)
    start = (len(content) - block) // 2
    content[start : start + block] = bytes(block)
    path.write_bytes(content)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {"a flipped byte": flipped, "a block of zeros": zeroed, "truncated": truncated}


def damaged_checkpoint(bench: Bench, damage: Callable[[Path], None]) -> None:
    damage(bench.newest / "pytorch_lora_weights.safetensors")
    aside = f"{NEWEST}.damaged"
    bench.ends_equal(f"{NEWEST} is damaged", f"{BEFORE} after step 2", left=(aside,))
    assert (bench.run / "checkpoints" / aside).is_dir()


def damaged_latents(bench: Bench, damage: Callable[[Path], None]) -> None:
    damage(bench.latents())
    bench.ends_equal("1 file of the cache is damaged, and made again", f"{NEWEST} after step 4")


def damaged_metrics(bench: Bench, damage: Callable[[Path], None]) -> None:
    """The lost lines stay lost. The weights and all other lines are equal."""
    path, wanted = bench.run / "metrics.jsonl", bench.place.undisturbed("LoRA")
    damage(path)
    assert bench.start().code == 0, bench.said
    bench.says("metrics.jsonl", "warning", f"{NEWEST} after step 4")
    differing = same.differences(bench.folder, wanted)
    assert differing == ["run/metrics.jsonl differs"], differing
    ours, theirs = (same.content(p, p) for p in (path, wanted / "run" / "metrics.jsonl"))
    assert ours and ours <= theirs, "no line is wrong"
    assert same.strays(bench.folder, wanted) == []


# -- disks ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(at: Path) -> Iterator[Path]:
    """A disk of SIZE, with what lies at this place. OSError if this user cannot mount one."""
    kept = at.parent.with_name(f"{at.name}.kept")
    at.rename(kept)
    at.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(at)]
        if subprocess.run(mount, capture_output=True).returncode:
            raise OSError("no disk can be mounted here")
        try:
            shutil.copytree(kept, at, dirs_exist_ok=True)
            yield at
        finally:
            subprocess.run(["umount", "-l", str(at)], check=True)
    finally:
        at.rmdir()
        kept.rename(at)


def full_disk(bench: Bench) -> None:
    """It fills while the run goes on. Whatever is written next fails."""
    with small_disk(bench.run):
        filler = bench.run.parent / "run" / "filler"
        bench.refuses("ree some space", how="fill", path=str(filler))
        assert (bench.newest / "manifest.json").is_file()
        filler.unlink()
        bench.ends_equal(f"{NEWEST} after step 4")


def full_disk_of_the_cache(bench: Bench) -> None:
    with small_disk(bench.folder / "cache"):
        shutil.rmtree(bench.folder / "cache" / "latents")
        filler = bench.folder / "cache" / "filler"
        filler.touch()
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        bench.refuses("ree some space")
        filler.unlink()
        bench.ends_equal(f"{NEWEST} after step 4")


def read_only_run(bench: Bench) -> None:
    """As a disk becomes after an error."""
    with small_disk(bench.run):
        subprocess.run(["mount", "-o", "remount,ro", str(bench.run)], check=True)
        bench.refuses("cannot be written")
        subprocess.run(["mount", "-o", "remount,rw", str(bench.run)], check=True)
        bench.ends_equal(f"{NEWEST} after step 4")


def read_only_cache(bench: Bench) -> None:
    """All that the run needs is in it."""
    with small_disk(bench.folder / "cache"):
        subprocess.run(["mount", "-o", "remount,ro", str(bench.folder / "cache")], check=True)
        bench.ends_equal(f"{NEWEST} after step 4")


# -- other trouble -------------------------------------------------------------------------------


def deleted_run(bench: Bench) -> None:
    start = bench.start(how="remove", path=str(bench.run))
    assert start.code == 2, (start.code, bench.said)
    bench.ends_equal("steps 1 to 6")


def deleted_cache(bench: Bench) -> None:
    start = bench.start(how="remove", path=str(bench.folder / "cache"))
    assert start.code in (0, 2), (start.code, bench.said)
    shutil.rmtree(bench.folder / "cache", ignore_errors=True)
    (bench.run / "summary.json").unlink(missing_ok=True)
    bench.ends_equal()


def clock_jumps_back(bench: Bench) -> None:
    start = bench.start(how="jump_back", seconds=10 * 24 * 3600)
    assert start.code == 0, bench.said
    bench.ends_equal("is finished: nothing to do")


def two_starters(bench: Bench) -> None:
    with ThreadPoolExecutor(2) as pool:
        starts = list(pool.map(lambda number: started_beside(bench, number), range(2)))
    assert sorted(start.code for start in starts) in ([0, 2], [0, 0]), [s.said for s in starts]
    for start in starts:
        assert start.code == 0 or "in use by another process" in start.said, start.said
        assert "Traceback" not in start.said
    bench.ends_equal("is finished: nothing to do")


def started_beside(bench: Bench, number: int) -> Start:
    return bench.place.start(KIND, bench.folder, name=f"starter{number}")


def changed_settings(bench: Bench) -> None:
    start = bench.start("lora.rank=8", "seed=1")
    assert start.code == 2, bench.said
    bench.says("lora.rank: 4 -> 8", "seed: 42 -> 1")
    bench.ends_equal(f"{NEWEST} after step 4")


@dataclass(frozen=True)
class Injection:
    what: str
    seen: str
    act: Callable[[Bench], None]


def of_damage(where: str, seen: str, act: Callable) -> list[Injection]:
    def one(damage: Callable[[Path], None]) -> Callable[[Bench], None]:
        return lambda bench: act(bench, damage)

    return [Injection(f"{where}: {what}", seen, one(how)) for what, how in DAMAGES.items()]


EQUAL = "the result is equal"
INJECTIONS = [
    *of_damage(
        "Newest checkpoint",
        f"It is named and set aside. The run goes on from the one before; {EQUAL}",
        damaged_checkpoint,
    ),
    *of_damage(
        "Cached latents", f"The clip is encoded again, with a line; {EQUAL}", damaged_latents
    ),
    *of_damage(
        "metrics.jsonl",
        "A warning counts the lost lines. No line is wrong, and the weights are equal",
        damaged_metrics,
    ),
    Injection(
        "The run's disk fills at step 5",
        f"Exit code 2, with how to free space. With space again {EQUAL}",
        full_disk,
    ),
    Injection(
        "The cache's disk is full",
        f"Exit code 2, with how to free space. With space again {EQUAL}",
        full_disk_of_the_cache,
    ),
    Injection(
        "The run's disk has become read-only",
        f"Exit code 2. Writable again, {EQUAL}",
        read_only_run,
    ),
    Injection("A read-only cache that has all", f"The run goes on; {EQUAL}", read_only_cache),
    Injection(
        "The run's folder is deleted at step 5",
        f"Exit code 2. The same command starts anew; {EQUAL}",
        deleted_run,
    ),
    Injection(
        "The cache is deleted at step 5",
        f"The run ends, or stops with exit code 2. The same command: {EQUAL}",
        deleted_cache,
    ),
    Injection("The clock jumps back ten days at step 5", f"Nothing; {EQUAL}", clock_jumps_back),
    Injection(
        "The same command twice at once",
        f"One runs. The other ends with exit code 2 and names it; {EQUAL}",
        two_starters,
    ),
    Injection(
        "Other settings at the restart",
        f"Exit code 2 and the settings that differ. With the right ones {EQUAL}",
        changed_settings,
    ),
]


class Injecting:
    """Makes the killed run once, and gives each injection a copy at the same place."""

    def __init__(self, place: Place):
        self.place, self.folder = place, place.folder / "injected" / "trial"
        self.kept, self.made = self.folder.with_name("kept"), False

    def bench(self) -> Bench:
        if not self.made:
            self.made = True
            for place in (self.folder, self.kept):
                shutil.rmtree(place, ignore_errors=True)
            self.folder.mkdir(parents=True)
            strike = {**AT_STEP, "group": True}
            start = self.place.start(KIND, self.folder, strike)
            assert start.kills, start.said
            time.sleep(1.5)  # the process that writes the page sees that it is alone
            shutil.copytree(self.folder, self.kept, symlinks=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.kept, self.folder, symlinks=True)
        return Bench(self.place, self.folder)

    def outcome(self, injection: Injection) -> str:
        """`as it must be`, `not tried: REASON` or `FAULT: ...`."""
        bench = self.bench()
        try:
            injection.act(bench)
        except AssertionError as error:
            return f"FAULT: {error}"
        except OSError as error:
            return f"not tried: {error}"
        return "as it must be"
