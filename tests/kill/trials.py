"""One trial: a run that is killed, started again until it ends, and compared.

An undisturbed run of each kind is made first. It says how many file operations each phase has, and
what the result has to be.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import same
import warm
from kinds import INTERVAL, KINDS, LIKE, RUNS, Kind

STRUCK = Path(__file__).with_name("struck.py")
LONGEST = 240  # seconds of one start; what takes longer hangs
# The processes of a killed start may hold its folder for a moment.
IN_USE, WAIT = "is in use by another process", 60
# An export that was killed after its folder had its name.
WHOLE_ALREADY = "exists already: remove it"
MOST_STARTS = 8
starting = threading.Lock()


@dataclass
class Start:
    """One start of the command and how it ended."""

    code: int
    said: str
    seconds: float
    kills: list[dict]  # what struck.py noted before each
    operations: collections.Counter  # by (role, phase)
    steps: dict[str, set[int]]  # logged, by the file of metrics


@dataclass
class Trial:
    kind: str
    seed: int
    kills: list[str] = field(default_factory=list)  # the phase of each
    how: list[dict] = field(default_factory=list)  # each kill in full
    starts: int = 0
    again: int = 0  # steps computed twice after one kill, at most
    recovered: bool = False
    differences: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    fault: str | None = None
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        clean = not self.differences and not self.strays and self.again <= INTERVAL
        return self.recovered and self.fault is None and clean


class Place:
    """Where the trials run: the undisturbed runs, and a folder for each trial."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.references: dict[str, Start] = {}
        self.locks: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)

    def finished(self) -> Path:
        """A finished run, for tasks that read one."""
        return self.undisturbed("LoRA") / "run"

    def undisturbed(self, name: str) -> Path:
        folder = self.folder / "undisturbed" / slug(name)
        with self.locks[name]:
            if name not in self.references:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                self.references[name] = start = self.start({**KINDS, **LIKE}[name], folder)
                assert start.code == 0, f"{name}: {start.said}"
        return folder

    def start(
        self,
        kind: Kind,
        folder: Path,
        strike: dict | None = None,
        *,
        after: float | None = None,
        more: tuple[str, ...] = (),
        words: list[str] | None = None,
        name: str = "",
    ) -> Start:
        """strike: as struck.py takes it. after: seconds until all of it is killed from outside.

        words: instead of the kind's own command. name: of one of several starts at the same time.
        """
        finished = folder if kind in RUNS.values() else self.finished()
        log = folder.with_name(f"{folder.name}{name}.log")
        said_to = log.with_suffix(".said")
        log.unlink(missing_ok=True)
        spec = {"root": str(folder), "log": str(log), "strike": strike}
        words = kind.arguments(folder, finished) if words is None else words
        began = time.monotonic()
        with open_silently(
            folder, said_to, STRUCK, json.dumps(spec), warm.LAUNCH, *words, *more
        ) as process:
            code = wait(process, after, log)
        said = said_to.read_text(errors="replace")
        return read_log(log, code, said, time.monotonic() - began)


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


@contextlib.contextmanager
def open_silently(folder: Path, said_to: Path, *words: object):
    with said_to.open("w") as said, starting:
        process = warm.python(
            *words,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(process: subprocess.Popen, after: float | None, log: Path) -> int:
    if after is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(after)
        facts = last_operation(log) | {"what": "moment"}
        with log.open("a") as file:
            file.write(json.dumps({**facts, "killed": {"after": round(after, 2)}}) + "\n")
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()
    try:
        return process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        return 1000


def last_operation(log: Path) -> dict:
    """Of any process but the one that writes the page."""
    found = [line for line in lines_of(log) if line.get("role") not in (None, "page")]
    return found[-1] if found else {"role": "launcher", "phase": "start"}


def lines_of(log: Path) -> list[dict]:
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in log.read_text().splitlines()]
    return []


def read_log(log: Path, code: int, said: str, seconds: float) -> Start:
    lines, operations, steps = lines_of(log), collections.Counter(), collections.defaultdict(set)
    last = {}  # of each process
    kills = []
    for line in lines:
        if "killed" in line:
            kills.append({**last.get(line.get("pid"), {}), **line})
            continue
        last[line["pid"]] = line
        operations[line["role"], line["phase"]] += 1
        if "step" in line:
            steps[line["path"]].add(line["step"])
    return Start(code, said, seconds, kills, operations, steps)


def choose_kill(kind: Kind, reference: Start, rng: random.Random) -> dict:
    """A moment (every fourth), or a file operation of a phase. The phases come equally often."""
    if rng.random() < 0.25:
        return {"after": rng.uniform(0.05, 0.8 * reference.seconds)}
    roles = ["launcher", *kind.more, *(["page"] if rng.random() < 0.1 else [])]
    roles = [role for role in roles if any(own == role for own, _ in reference.operations)]
    role = rng.choice(roles)
    phase = rng.choice(sorted(phase for own, phase in reference.operations if own == role))
    return {
        "role": role,
        "phase": phase,
        "nth": rng.randint(1, reference.operations[role, phase]),
        "torn": rng.random() < 0.5,
        # Where there are several processes: mostly one alone, which is the harder case.
        "group": rng.random() < (0.3 if kind.more else 0.5),
    }


def choose_kills(kind: Kind, reference: Start, rng: random.Random, number: int) -> list[dict]:
    """One for each start, those of earlier phases first: what is done is not met again."""
    phases = list(dict.fromkeys(phase for _, phase in reference.operations))
    kills = [choose_kill(kind, reference, rng) for _ in range(number)]
    return sorted(kills, key=lambda kill: phases.index(kill.get("phase", phases[0])))


def run_trial(place: Place, name: str, seed: int, kills: list[dict] | None = None) -> Trial:
    """kills: as struck.py takes them, one for each start. None: one to four by the seed."""
    kind, rng, trial = KINDS[name], random.Random(f"{name} {seed}"), Trial(name, seed)
    place.undisturbed(name)
    wanted = place.undisturbed(kind.like or name)
    if kills is None:
        number = rng.choices([1, 2, 3, 4], [2, 3, 3, 2])[0]
        kills = choose_kills(kind, place.references[name], rng, number)
    folder = place.folder / "trials" / f"{slug(name)}_{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    end_it(place, kind, folder, kills, rng, trial)
    if trial.recovered:
        search = kind.like is not None
        trial.differences = same.differences(folder, wanted, search=search)
        trial.strays = same.strays(folder, wanted, search=search)
    trial.seconds = round(time.monotonic() - began, 1)
    if trial.good:
        for path in folder.parent.glob(f"{folder.name}.*"):
            path.unlink()
        shutil.rmtree(folder)
    return trial


def end_it(
    place: Place, kind: Kind, folder: Path, kills: list[dict], rng: random.Random, trial: Trial
) -> None:
    """Starts the command until it has ended well, with one of `kills` in each start."""
    steps: dict[str, set[int]] = collections.defaultdict(set)
    kills, waiting = list(kills), time.monotonic() + WAIT
    while trial.starts < MOST_STARTS:
        kill = kills.pop(0) if kills else None
        after = kill.get("after") if kill else None
        words = resuming(kind, folder, rng)
        start = place.start(kind, folder, None if after else kill, after=after, words=words)
        if start.code == 2 and IN_USE in start.said and time.monotonic() < waiting:
            kills[:0] = [kill] if kill else []
            time.sleep(0.5)
            continue
        trial.starts += 1
        trial.kills += [each.get("phase", "start") for each in start.kills]
        trial.how += start.kills
        if kind.counts_steps:
            again = [len(steps[path] & done) for path, done in start.steps.items()]
            trial.again = max([trial.again, *again])
            for path, done in start.steps.items():
                steps[path] |= done
        kills = [] if start.code == 0 and not start.kills else kills
        whole = trial.starts > 1 and start.code == 2 and WHOLE_ALREADY in start.said
        if (start.code == 0 and not kills) or whole:
            trial.recovered = True
            return
        if start.code != 0 and not start.kills:
            trial.fault = f"exit code {start.code}: {' | '.join(start.said.splitlines()[-3:])}"
            return
        waiting = time.monotonic() + WAIT
    trial.fault = f"not done after {MOST_STARTS} starts"


def resuming(kind: Kind, folder: Path, rng: random.Random) -> list[str] | None:
    """Half of the runs that have a checkpoint go on by train.resume=RUN; None: the same command."""
    if kind not in RUNS.values() or rng.random() < 0.5:
        return None
    run = folder / kind.output
    whole = [path for path in run.glob("checkpoints/step_*") if path.suffix == ""]
    return [f"train.resume={run}"] if whole and (run / "config.yaml").is_file() else None


def as_line(trial: Trial) -> str:
    return json.dumps(asdict(trial))
