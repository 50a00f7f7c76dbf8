"""Does the held-out loss rank settings as what their videos show does? The demo's sweep over rank and a learning rate too low, right and too high.

python tests/benchmarks/ranking.py                     15 minutes on 2 cores; writes tests/golden/ranking.md
python tests/benchmarks/ranking.py hydra.launcher.jobs=1       overrides may follow
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

PROJECT = Path(__file__).parent.parent.parent
TABLE = PROJECT / "tests" / "golden" / "ranking.md"
# The demo's own rate, 5e-4 for a rank of 64, teaches a rank of 1 little in as many steps.
RATES = {1e-6: "too low", 2e-3: "right", 3e-2: "too high"}
RANKS = (1, 4, 16)
STEPS = 810  # the demo's own; 300 teach a rank of 4 nothing
VIDEOS = 12  # of each kind, of 15 sampling steps


@dataclass(frozen=True)
class Job:
    rank: int
    rate: float
    heldout_loss: float  # infinite where training broke off
    taught: float  # shares of videos right in all respects: a ruined model may paint everything in the new colour
    others: float

    @classmethod
    def read(cls, row: dict[str, str], sweep: Path) -> Job:
        """Of a row of the leaderboard."""
        judged = sweep / row["folder"] / "evaluation.json"
        found = (
            json.loads(judged.read_text(encoding="utf-8"))["comparisons"]["result"]
            if judged.is_file()
            else []
        )
        right = {each["kind"]: each["tuned"] for each in found if each["measure"] == "all"}
        return cls(
            int(row["rank"]), float(row["learning_rate"]), float(row["objective"] or "inf"),
            right.get("taught", 0.0), right.get("other", 0.0),
        )  # fmt: skip

    @property
    def score(self) -> float:
        return (self.taught + self.others) / 2

    def cells(self) -> str:
        return f"| {self.rank} | {self.rate:g} | {RATES[self.rate]} | {self.heldout_loss:.4f} | {self.taught:.0%} | {self.others:.0%} | {self.score:.2f} |"


def trained() -> list[Job]:
    """A sweep in outputs/, named by the commit: started again after it was stopped, it goes on. Delete it to measure anew."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    sweep = PROJECT / "outputs" / "sweeps" / f"ranking_{commit}"
    swept = [f"lora.rank={','.join(map(str, RANKS))}", f"optimizer.learning_rate={','.join(f'{rate:g}' for rate in RATES)}"]  # fmt: skip
    settings = [
        f"train.max_train_steps={STEPS}", f"validation.scored_prompts={VIDEOS}", "validation.num_inference_steps=15",
        "validation.num_validation_videos=0", f"output_dir='{sweep}'",
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, str(PROJECT / "launch.py"), "-m", *swept, *settings, *sys.argv[1:]],
        check=True,
    )
    with (sweep / "leaderboard.csv").open(encoding="utf-8") as file:
        return [Job.read(row, sweep) for row in csv.DictReader(file)]


def wrong_ones_are_last(jobs: list[Job], badness: Callable[[Job], float]) -> bool:
    groups = [
        [badness(job) for job in jobs if (RATES[job.rate] == "right") is right]
        for right in (True, False)
    ]
    return max(groups[0]) < min(groups[1])


def main() -> int:
    jobs = trained()
    correlation = stats.spearmanr(
        [-job.heldout_loss for job in jobs], [job.score for job in jobs]
    ).statistic
    last = {
        "held-out loss": wrong_ones_are_last(jobs, lambda job: job.heldout_loss),
        "score": wrong_ones_are_last(jobs, lambda job: -job.score),
    }
    text = "\n".join([
        f"The demo (`python launch.py`) of {STEPS} steps at nine settings, by `python tests/benchmarks/ranking.py`. Taught and others: of {VIDEOS} videos with the",
        "taught word in the prompt, and of as many without, the share that is right in all of shape, colour, direction and background; score: the mean",
        "of the two.", "",
        "| rank | learning rate | | held-out loss | taught | others | score |", "|---|---|---|---|---|---|---|",
        *(job.cells() for job in jobs), "",
        f"Rank correlation (Spearman) of held-out loss, lowest first, and score: {correlation:.2f}. Wrong rates are last by "
        + ", ".join(f"{name}: {'yes' if right else 'no'}" for name, right in last.items()) + ".", "",
    ])  # fmt: skip
    print(text)
    TABLE.write_text(text, encoding="utf-8")
    return int(not all(last.values()))


if __name__ == "__main__":
    sys.exit(main())
