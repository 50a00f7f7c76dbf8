"""Everything that a GPU must settle, in one command: python tests/gpu/battery.py

Writes battery.md (a table), battery.json and battery.log. README.md beside this file says what
the machine needs. Every entry of entries.py runs in a process of its own with a time limit, so an
error, a crash or a hang costs its own lines only. Every line is written as soon as it is known.
[no torch here]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve()
PROJECT = HERE.parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests"), str(HERE.parent)]

import table  # noqa: E402
from table import Row  # noqa: E402

# Seconds. Machines with a GPU often allow a command ten minutes. A rehearsal on few cores is slow.
BUDGET, BUDGET_OF_A_REHEARSAL = 530, 3600
SLOWER_ON_A_CPU = 5  # times the limit of an entry
LOOK_EVERY = 0.1  # seconds
# No entry is begun when less is left.
SMALLEST_REST = 12  # seconds
KEPT_OF_A_LOG = 6000  # characters in battery.log


@dataclass(frozen=True)
class Entry:
    """A function of entries.py (or of another file) and how it is run."""

    name: str
    about: str  # one line of the table
    mend: str  # where to look if it fails
    limit: int = 90  # seconds
    alone: bool = True  # False: others may run beside it, because no time is measured
    imports_torch: bool = True  # before its turn, while another entry runs


@dataclass
class Here:
    """What an entry's function gets."""

    entry: str
    rows: Path
    scratch: Path
    device: str  # cuda or cpu
    small: bool  # tiny models instead of the real sizes

    def line(self, what: str, value: object = None, unit: str = "", **about: object) -> None:
        """Adds a line to the table. `about`: other fields of table.Row."""
        append(self.rows, Row(self.entry, what, value, unit, **about))

    def folder(self, name: str) -> Path:
        place = self.scratch / self.entry / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place


def append(path: Path, row: Row) -> None:
    """One write: what is in the file is whole, also after a kill."""
    text = json.dumps(dataclasses.asdict(row)) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())


# -- in the process of an entry -------------------------------------------------------------------


def run_entry(here: Here, entries: Path) -> int:
    """Waits for its turn, runs the entry and reports its error as a line."""
    # The first process asks with this signal where a hanging entry is.
    faulthandler.register(signal.SIGUSR1)
    module = module_of(entries)
    if next(each for each in module.ENTRIES if each.name == here.entry).imports_torch:
        module.import_torch()
    sys.stdin.readline()
    began = time.monotonic()
    try:
        module.function(here.entry)(here)
    except module.Skipped as reason:
        here.line("skipped", status="skipped", note=str(reason))
    except BaseException as error:
        traceback.print_exc()
        here.line("error", status="failed", note=told(error))
        return 1
    finally:
        here.line("took", round(time.monotonic() - began, 1), "s", status="time")
    return 0


def told(error: BaseException) -> str:
    """The first and the last line of an error, and the innermost line of ours that it came from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    if len(lines) > 1:
        text += f" ... {lines[-1]}"
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(str(PROJECT / "cogvx"))
    ]
    frames = ours or traceback.extract_tb(error.__traceback__)
    if frames:
        where = Path(frames[-1].filename)
        where = where.relative_to(PROJECT) if where.is_relative_to(PROJECT) else where.name
        text += f" ({where}:{frames[-1].lineno})"
    return text


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# -- in the first process ------------------------------------------------------------------------


@dataclass
class Child:
    name: str
    process: subprocess.Popen
    log: Path
    began: float = 0.0
    limit: float = 0.0


@dataclass
class Battery:
    entries: list[Entry]
    source: Path  # the file that they are in
    plans: dict[str, list[str]]  # name -> overrides of task=plan
    out: Path
    scratch: Path
    budget: float
    device: str
    small: bool
    beside: int  # entries that run at the same time, and plans
    rows: list[Row] = field(default_factory=list)
    planned: dict[str, dict] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    read: int = 0
    ahead: dict[str, Child] = field(default_factory=dict)
    running: dict[str, Child] = field(default_factory=dict)
    planning: dict[str, Child] = field(default_factory=dict)

    def run(self) -> int:
        self.began = time.monotonic()
        self.states = {entry.name: "not reached" for entry in self.entries}
        waiting, plans = list(self.entries), dict(self.plans)
        signal.signal(signal.SIGTERM, stop)
        try:
            self.write()
            while (waiting or self.running) and self.left() > 2:
                changed = self.begin(waiting) | self.plan(plans)
                changed |= self.reap() | self.reap_plans() | self.read_rows()
                if changed:
                    self.write()
                time.sleep(LOOK_EVERY)
        except KeyboardInterrupt:
            print("stopped; what is done is in the table", flush=True)
        self.end()
        return int(any(table.is_bad(row, self.planned) for row in self.rows))

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def begin(self, waiting: list[Entry]) -> bool:
        """Begins what may run now, and starts the process of what comes next."""
        changed = False
        while waiting and self.may_begin(waiting[0]):
            if self.left() < SMALLEST_REST:
                waiting.clear()
                break
            entry = waiting.pop(0)
            child = self.ahead.pop(entry.name, None) or self.start(entry.name)
            child.began = time.monotonic()
            slower = SLOWER_ON_A_CPU if self.device == "cpu" and entry.limit > 10 else 1
            child.limit = min(entry.limit * slower, self.left() - 2)
            with contextlib.suppress(BrokenPipeError):
                child.process.stdin.write(b"go\n")
                child.process.stdin.flush()
            self.running[entry.name], self.states[entry.name] = child, "running"
            print(f"begin   {entry.name:20} {entry.about}", flush=True)
            changed = True
        for entry in waiting[: 1 if waiting and waiting[0].alone else self.beside]:
            if entry.imports_torch and entry.name not in self.ahead:
                self.ahead[entry.name] = self.start(entry.name)
        return changed

    def may_begin(self, entry: Entry) -> bool:
        if not self.running:
            return True
        alone = {each.name for each in self.entries if each.alone}
        return not entry.alone and not alone & {*self.running} and len(self.running) < self.beside

    def start(self, name: str) -> Child:
        log = self.scratch / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, str(HERE), "--entry", name, "--entries", str(self.source)]
        command += ["--scratch", str(self.scratch), "--device", self.device]
        command += ["--small"] if self.small else []
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment(self.device),
                cwd=PROJECT,
            )
        return Child(name, process, log)

    def reap(self) -> bool:
        ended = []
        for name, child in self.running.items():
            code, late = child.process.poll(), time.monotonic() - child.began > child.limit
            if code is None and not late:
                continue
            if code is None:
                last, where = last_line(child.log), hanging_at(child)
                kill_tree(child.process.pid)
                what = f"stopped after {child.limit:.0f} s, its limit, {where}"
                self.complain(child, what, last)
            elif code < 0:
                self.complain(child, f"ended by {signal.Signals(-code).name}")
            elif code > 0 and not self.has_said(name):
                self.complain(child, f"ended with exit code {code}")
            self.keep_log(child)
            ended.append(name)
        for name in ended:
            del self.running[name]
            self.states[name] = "done"
        return bool(ended)

    def has_said(self, name: str) -> bool:
        self.read_rows()
        return any(row.entry == name and row.status == "failed" for row in self.rows)

    def complain(self, child: Child, what: str, last: str | None = None) -> None:
        last = last_line(child.log) if last is None else last
        note = f"{what}; its last line: {last}" if last else what
        append(self.scratch / "rows.jsonl", Row(child.name, "error", status="failed", note=note))

    def keep_log(self, child: Child) -> None:
        text = child.log.read_text(encoding="utf-8", errors="replace")
        with (self.out / "battery.log").open("a", encoding="utf-8") as file:
            file.write(f"\n==== {child.name} ====\n{text[-KEPT_OF_A_LOG:]}")

    def read_rows(self) -> bool:
        path = self.scratch / "rows.jsonl"
        data = path.read_bytes()[self.read :] if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self.read += len(whole)
        for text in whole.splitlines():
            row = Row(**json.loads(text))
            self.rows.append(row)
            if row.status != "time":
                print("        " + table.spoken(row, self.planned), flush=True)
        return bool(whole)

    # -- plans: on the CPU, beside everything ---------------------------------------------------

    def plan(self, plans: dict[str, list[str]]) -> bool:
        while plans and len(self.planning) < self.beside:
            name, overrides = next(iter(plans.items()))
            del plans[name]
            folder = self.scratch / "plans" / name.replace(" ", "_")
            folder.parent.mkdir(exist_ok=True)
            log = folder.with_suffix(".log")
            command = [sys.executable, str(PROJECT / "launch.py"), "task=plan", *overrides]
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [*command, f"output_dir='{folder}'"],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    env=environment("cpu"),
                    cwd=self.scratch,
                    preexec_fn=lower_priority,
                )
            self.planning[name] = Child(name, process, log, time.monotonic())
        return False

    def reap_plans(self) -> bool:
        """A plan is read as soon as its file is there: it goes on looking for alternatives."""
        changed = False
        for name, child in list(self.planning.items()):
            ended, path = child.process.poll() is not None, child.log.with_suffix("") / "plan.json"
            if not path.exists() and not ended:
                continue
            if path.exists():
                self.planned[name] = json.loads(path.read_text(encoding="utf-8"))
            else:
                row = Row("plan", name, status="failed", note=last_line(child.log))
                append(self.scratch / "rows.jsonl", row)
            kill_tree(child.process.pid)
            del self.planning[name]
            changed = True
        return changed

    # -- the end --------------------------------------------------------------------------------

    def end(self) -> None:
        # What was planned only late is still worth its few seconds.
        while self.planning and self.left() > 2:
            self.reap_plans()
            time.sleep(LOOK_EVERY)
        for child in self.running.values():
            kill_tree(child.process.pid)
            self.complain(child, "cut off: the time was over")
            self.states[child.name] = "cut off"
            self.keep_log(child)
        for child in [*self.ahead.values(), *self.planning.values()]:
            kill_tree(child.process.pid)
        self.read_rows()
        self.write()
        print(f"\ntable   {self.out / 'battery.md'}")

    def write(self) -> None:
        about = {
            "seconds": round(time.monotonic() - self.began, 1),
            "budget": self.budget,
            "device": self.device,
            "sizes": "tiny" if self.small else "real",
        }
        table.write(self.out, self.entries, self.states, self.rows, self.planned, about)


def stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def lower_priority() -> None:
    os.nice(10)


def environment(device: str) -> dict[str, str]:
    """Without a network, and on the CPU with no GPU in sight."""
    changed = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        changed |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | changed


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[-300:] for line in reversed(lines) if line.strip()), "")


def hanging_at(child: Child) -> str:
    """Where the process is; of its innermost lines the one that is ours."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.process.pid, signal.SIGUSR1)
    text, ends = "", time.monotonic() + 2
    while "most recent call first" not in text and time.monotonic() < ends:
        time.sleep(LOOK_EVERY)
        text = child.log.read_text(encoding="utf-8", errors="replace")
    stack = re.findall(r'File "(.+?)", line (\d+) in', text.rpartition("most recent call first")[2])
    ours = [place for place in stack if place[0].startswith(str(PROJECT / "cogvx"))]
    if not stack:
        return "in no line of Python"
    name, line = (ours or stack)[0]
    return f"at {name.removeprefix(f'{PROJECT}/')}:{line}"


def kill_tree(number: int) -> None:
    """Ends a process and all that it started, also what is in a session of its own."""
    for each in [*descendants(number), number]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        os.waitpid(number, 0)


def descendants(number: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{number}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [*descendants(int(child)), int(child)]
    return found


def gpu() -> tuple[str, float] | None:
    """The first card's name and GiB. None: there is none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        name, mib = said.splitlines()[0].rsplit(",", 1)
        return name.strip(), float(mib) / 1024
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
        return None


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--budget", type=float, help=f"seconds for everything; {BUDGET}")
    add("--only", nargs="+", metavar="NAME", help="these entries only")
    add("--out", type=Path, default=Path("outputs/battery"), help="outputs/battery")
    add("--rehearse", action="store_true", help="tiny sizes on the CPU: tries the script itself")
    add("--list", action="store_true", help="prints the entries")
    add("--small", action="store_true", help="tiny sizes on the GPU: do all entries run?")
    # For the processes that it starts, and for its tests.
    add("--entries", type=Path, default=HERE.parent / "entries.py", help=argparse.SUPPRESS)
    add("--entry", help=argparse.SUPPRESS)
    add("--beside", type=int, help=argparse.SUPPRESS)
    add("--scratch", type=Path, help=argparse.SUPPRESS)
    add("--device", choices=["cuda", "cpu"], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    asked = parsed(arguments)
    if asked.entry:
        rows = asked.scratch / "rows.jsonl"
        here = Here(asked.entry, rows, asked.scratch, asked.device, asked.small)
        return run_entry(here, asked.entries)
    module = module_of(asked.entries)
    entries = chosen(module.ENTRIES, asked.only)
    if asked.list:
        print("\n".join(f"{entry.name:20} {entry.about}" for entry in entries))
        return 0
    card, small = gpu(), asked.rehearse or asked.small
    if card is None and not asked.rehearse:
        print("No GPU here. To try the script itself: python tests/gpu/battery.py --rehearse")
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "battery.log").unlink(missing_ok=True)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="battery_", ignore_cleanup_errors=True) as scratch:
        battery = Battery(
            entries,
            asked.entries,
            module.plans(entries, card, small=small, scratch=Path(scratch)),
            asked.out,
            Path(scratch),
            asked.budget or (BUDGET_OF_A_REHEARSAL if asked.rehearse else BUDGET),
            "cpu" if asked.rehearse else "cuda",
            small,
            beside=asked.beside or max(1, min(6, cores // 2)),
        )
        return battery.run()


def chosen(entries: list[Entry], names: list[str] | None) -> list[Entry]:
    unknown = {*(names or [])} - {entry.name for entry in entries}
    if unknown:
        known = ", ".join(entry.name for entry in entries)
        sys.exit(f"error: no entry is called {', '.join(sorted(unknown))}; there are {known}")
    return [entry for entry in entries if names is None or entry.name in names]


if __name__ == "__main__":
    sys.modules["battery"] = sys.modules["__main__"]
    sys.exit(main(sys.argv[1:]))
