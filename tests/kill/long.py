"""The long form: hundreds of kills, and a table of what became of the runs.

    python tests/kill/long.py --kills 300 --seed 0 --injections --out /tmp/kills

Every trial is a line of OUT/trials.jsonl. The same command goes on where it was stopped. What
failed keeps its folder in OUT/trials/. The table is written to OUT/kills.md at the end.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests"), str(Path(__file__).parent)]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import warm  # noqa: E402
from injected import INJECTIONS, Injecting  # noqa: E402
from kinds import INTERVAL, KINDS  # noqa: E402
from tqdm import tqdm  # noqa: E402
from trials import Place, Trial, as_line, run_trial  # noqa: E402

from cogvx.files import read_json, write_json  # noqa: E402


def main() -> int:
    asked = arguments()
    out, kinds = asked.out.absolute(), asked.kinds or list(KINDS)
    out.mkdir(parents=True, exist_ok=True)
    warm.serve()
    done = [trial for trial in trials_of(out / "trials.jsonl") if trial.kind in kinds]
    if sum(len(trial.kills) for trial in done) < asked.kills:
        done += run_trials(Place(out), out / "trials.jsonl", kinds, done, asked)
    seen = seen_of_injections(out, make=asked.injections)
    table = "\n".join([*lines_of_table(done, asked.seed), *lines_of_injections(seen)])
    (out / "kills.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    return int(not all(trial.good for trial in done) or any("FAULT" in s for s in seen.values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial of each kind")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--injections", action="store_true", help="those of injected.py too")
    parser.add_argument("--workers", type=int, default=2, help="trials at the same time")
    parser.add_argument("--kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    asked = parser.parse_args()
    if unknown := sorted(set(asked.kinds or []) - set(KINDS)):
        parser.error(f"--kinds: {', '.join(unknown)} is none of: {', '.join(KINDS)}")
    return asked


def trials_of(file: Path) -> list[Trial]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [Trial(**json.loads(line)) for line in lines]


def run_trials(
    place: Place, file: Path, kinds: list[str], done: list[Trial], asked: argparse.Namespace
) -> list[Trial]:
    """Trials of each kind in turn, until there are enough kills."""
    tried, made = {(trial.kind, trial.seed) for trial in done}, []
    waiting = (
        (kind, seed)
        for seed in range(asked.seed, asked.seed + 10_000)
        for kind in kinds
        if (kind, seed) not in tried
    )
    struck = sum(len(trial.kills) for trial in done)
    with (
        tqdm(total=asked.kills, initial=struck, desc="kills", unit="kill") as progress,
        concurrent.futures.ThreadPoolExecutor(asked.workers) as pool,
        file.open("a", encoding="utf-8") as written,
    ):
        running = set()
        while struck < asked.kills or running:
            while struck < asked.kills and len(running) < asked.workers:
                running.add(pool.submit(run_trial, place, *next(waiting)))
            over, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for each in over:
                trial = each.result()
                made.append(trial)
                written.write(as_line(trial) + "\n")
                written.flush()
                struck += len(trial.kills)
                progress.update(len(trial.kills))
                if not trial.good:
                    tqdm.write(f"FAULT {as_line(trial)}")
    return made


def seen_of_injections(out: Path, *, make: bool) -> dict[str, str]:
    """What was seen at each, by what was done. Those of an earlier start are kept."""
    file, injecting = out / "injections.json", Injecting(Place(out))
    seen = read_json(file)
    for each in [each for each in INJECTIONS if make and each.what not in seen]:
        tqdm.write(f"injection: {each.what}")
        seen[each.what] = injecting.outcome(each)
        write_json(file, seen)
    return seen


# -- the table -----------------------------------------------------------------------------------


def lines_of_table(trials: list[Trial], seed: int) -> list[str]:
    kills = sum(len(trial.kills) for trial in trials)
    commit = git("rev-parse", "--short=8", "HEAD")
    options = f"--kills {kills} --seed {seed} --injections --out /tmp/kills"
    yield f"`python tests/kill/long.py {options}`"
    yield ""
    yield f"{kills} kills in {len(trials)} trials at commit {commit}, on {cores()}. A trial is a"
    yield "run of one kind: it is killed once or several times, ends, and is compared."
    yield ""
    heads = ["Kind", "Trials", "Kills", "Recovered", "Differences", "Stray files"]
    yield from rows([*heads, "Steps computed twice, at most"], by_kind(trials))
    yield ""
    yield f"A checkpoint is written every {INTERVAL} steps. The kills by what was being written:"
    yield ""
    yield from rows(["Phase", "Kills", "At an operation", "Torn", "At a moment"], by_phase(trials))


def lines_of_injections(seen: dict[str, str]) -> list[str]:
    if not seen:
        return []
    cells = [[each.what, each.seen, seen[each.what]] for each in INJECTIONS if each.what in seen]
    return ["", *rows(["What is done", "What must be seen", "What was seen"], cells)]


def rows(heads: list[str], cells: list[list[object]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *cells]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def by_kind(trials: list[Trial]) -> list[list[object]]:
    found = []
    for kind in [kind for kind in KINDS if any(trial.kind == kind for trial in trials)]:
        found.append([kind, *counts([trial for trial in trials if trial.kind == kind], kind)])
    return [*found, ["all", *counts(trials, None)]]


def counts(trials: list[Trial], kind: str | None) -> list[object]:
    counted = kind is None or KINDS[kind].counts_steps
    return [
        len(trials),
        sum(len(trial.kills) for trial in trials),
        sum(trial.recovered for trial in trials),
        sum(bool(trial.differences) for trial in trials),
        sum(bool(trial.strays) for trial in trials),
        max((trial.again for trial in trials), default=0) if counted else "",
    ]


def by_phase(trials: list[Trial]) -> list[list[object]]:
    found = collections.defaultdict(lambda: [0, 0, 0, 0])
    for trial in trials:
        for phase, how in zip(trial.kills, trial.how, strict=True):
            at_a_moment, torn = "after" in how["killed"], how["killed"].get("torn")
            torn = bool(torn) and how["what"] == "write"
            for number, holds in enumerate((True, not at_a_moment, torn, at_a_moment)):
                found[phase][number] += holds
    ordered = sorted(found.items(), key=lambda item: -item[1][0])
    return [[phase, *numbers] for phase, numbers in ordered]


def git(*arguments: str) -> str:
    command = ["git", "-C", str(PROJECT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def cores() -> str:
    return f"{os.cpu_count()} CPU cores"


if __name__ == "__main__":
    sys.exit(main())
