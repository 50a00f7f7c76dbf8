"""Runs a command of cogvx and strikes at one of its file operations.   python struck.py SPEC WORDS

An operation is what changes a file or a folder: opening to write, writing, fsync, renaming,
removing, making a folder. Each is noted in a log before it happens. cogvx knows nothing of this.
Python tells of most of them (sys.addaudithook). Writing is wrapped where Python, torch and
safetensors do it. Processes that the command forks inherit all of it.

SPEC, in JSON: `root`: operations below it count; `log`; `strike`: null, or
    role     which process: launcher, rank N, job, page
    phase    which part of the work, as phase_of() names it
    nth      the how-manyth operation of that phase in that process
    step     instead of these two: when the losses of this step are logged
    how      kill, the default; or one of the methods below whose names begin with do_
    torn     a write is cut in two: the first half is written
    group    all processes of the group die, as when a machine does; else this one alone
    path, seconds    what do_() takes
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import os
import pathlib
import runpy
import shutil
import signal
import sys
import time

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# The first that fits names the phase. {"part of a path": "phase"}
PHASES = {
    "export": "export",
    "cache/models/": "model files",
    "cache/world_": "made clips",
    "cache/": "encoding",
    "/rehearsal.partial": "rehearsal",
    "/checkpoints": "checkpoint",
    "/metrics.jsonl": "steps",
    "/validation/": "videos",
    "/previews/": "videos",
    "/evaluation.": "scores",
    "/evaluation/": "scores",
    "/videos": "videos",
    "/report.html": "page",
    "/report_stamp.js": "page",
    "/comparison": "page",
    "/progress.json": "progress",
    "/heartbeats": "progress",
    "/summary.json": "summary",
    "/pytorch_lora_weights": "result",
    "/transformer/": "result",
    "/inference.json": "result",
    "/first_frame.png": "result",
    "/dataset": "dataset report",
    "/split.json": "dataset report",
    "/contact_sheet": "dataset report",
    "/held_out": "dataset report",
    "/sweep.": "sweep",
    "/leaderboard": "sweep",
}


def phase_of(path: str) -> str:
    """path: below the root, as in run/checkpoints/step_000002.partial/manifest.json."""
    return next((phase for part, phase in PHASES.items() if part in path), "start")


class Striker:
    def __init__(self, spec: dict):
        self.root = os.path.realpath(spec["root"]) + "/"
        self.log, self.wanted = spec["log"], spec["strike"] or {}
        self.session = os.getsid(0)
        self.begin_process()

    def begin_process(self) -> None:
        """A fork counts anew."""
        self.process, self.counts = os.getpid(), collections.defaultdict(lambda: itertools.count(1))

    def role(self) -> str:
        if "RANK" in os.environ:
            return f"rank {os.environ['RANK']}"
        if pathlib.PurePath(sys.argv[0]).name == "live.py":
            return "page"
        return "launcher" if os.getsid(0) == self.session else "job"

    def below_root(self, path: object, folder: int = -1) -> str | None:
        """The path from the root, or None if it is elsewhere. folder: what it is relative to."""
        if isinstance(path, int):
            folder, path = path, ""
        path = os.fsdecode(path)
        if not os.path.isabs(path):
            start = os.getcwd() if folder < 0 else os.readlink(f"/proc/self/fd/{folder}")
            path = os.path.normpath(os.path.join(start, path))
        return path.removeprefix(self.root) if path.startswith(self.root) else None

    def meets(self, what: str, path: object, folder: int = -1, text: str | None = None) -> bool:
        """Notes an operation. Strikes, or gives True if the caller is to tear it first."""
        name = self.below_root(path, folder)
        if name is None or (what == "remove" and not os.path.lexists(self.root + name)):
            return False
        if os.getpid() != self.process:
            self.begin_process()
        facts = {"role": self.role(), "phase": phase_of(name), **step_of(name, text)}
        facts["nth"] = next(self.counts[facts["phase"]])
        self.note(**facts, what=what, path=name)
        names = [name for name in ("role", "phase", "nth", "step") if name in self.wanted]
        if not names or any(facts.get(name) != self.wanted[name] for name in names):
            return False
        if self.wanted.get("torn") and what == "write":
            return True
        self.strike()
        return False

    def note(self, **facts: object) -> None:
        line = json.dumps({"pid": os.getpid(), **facts}) + "\n"
        # Not kept open: a fork closes what it does not know.
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        real_write(descriptor, line.encode())
        os.close(descriptor)

    # -- what is done ------------------------------------------------------------------------

    def strike(self) -> None:
        wanted, self.wanted = self.wanted, {}
        getattr(self, f"do_{wanted.get('how', 'kill')}")(wanted)

    def do_kill(self, wanted: dict) -> None:
        self.note(killed=wanted)
        os.kill(0 if wanted.get("group") else os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def do_remove(self, wanted: dict) -> None:
        shutil.rmtree(wanted["path"])

    def do_fill(self, wanted: dict) -> None:
        """Leaves no space on the disk of this path."""
        with contextlib.suppress(OSError), open(wanted["path"], "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def do_jump_back(self, wanted: dict) -> None:
        real_time, seconds = time.time, wanted["seconds"]
        time.time = lambda: real_time() - seconds

    # -- where operations are seen -----------------------------------------------------------

    def hear(self, event: str, facts: tuple) -> None:
        """Python's audit events come before the operation."""
        if event == "open":
            path, _, flags = facts
            if path is not None and not isinstance(path, int) and flags & WRITES:
                self.meets("open", path)
        elif event == "os.rename":
            self.meets("rename", facts[1], facts[3])
        elif event in ("os.remove", "os.rmdir"):
            self.meets(event[3:], facts[0], facts[1])
        elif event == "os.mkdir":
            self.meets("mkdir", facts[0], facts[2])

    def sync(self, descriptor: int) -> None:
        self.meets("fsync", descriptor)
        real_sync(descriptor)

    def write(self, descriptor: int, content: bytes) -> int:
        if self.meets("write", descriptor):
            real_write(descriptor, content[: len(content) // 2])
            self.strike()
        return real_write(descriptor, content)

    def open_path(self, path: pathlib.Path, mode: str = "r", *others, **settings):
        file = real_open(path, mode, *others, **settings)
        if self.below_root(path) is not None and not set(mode).isdisjoint("wax+"):
            file.write = functools.partial(self.write_file, file, file.write)
        return file

    def write_file(self, file, write, content):
        said = content if isinstance(content, str) else None
        if self.meets("write", file.name, text=said):
            write(content[: len(content) // 2])
            file.flush()
            self.strike()
        return write(content)

    def writing(self, save, position: int):
        """`save` writes a file by itself. position: of the file's name among its arguments."""

        @functools.wraps(save)
        def write(*arguments, **settings):
            given = [*arguments, *settings.values()]
            path = given[position] if len(given) > position else None
            if not isinstance(path, str | pathlib.Path):
                return save(*arguments, **settings)
            torn = self.meets("write", path)
            made = save(*arguments, **settings)
            if torn:
                os.truncate(path, os.path.getsize(path) // 2)
                self.strike()
            return made

        return write


def step_of(name: str, text: str | None) -> dict:
    """The step whose losses a line of metrics.jsonl tells."""
    if text is None or not name.endswith("metrics.jsonl") or '"loss"' not in text:
        return {}
    return {"step": json.loads(text)["step"]}


real_sync, real_write, real_open = os.fsync, os.write, pathlib.Path.open


def main() -> None:
    spec, words = json.loads(sys.argv[1]), sys.argv[2:]
    import safetensors.torch
    import torch

    striker = Striker(spec)
    os.fsync, os.write = striker.sync, striker.write
    pathlib.Path.open = lambda path, *others, **settings: striker.open_path(
        path, *others, **settings
    )
    safetensors.torch.serialize_file = striker.writing(safetensors.torch.serialize_file, 1)
    torch.save = striker.writing(torch.save, 1)
    sys.addaudithook(striker.hear)
    sys.argv = words
    sys.path.insert(0, os.path.dirname(words[0]))
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
