"""Does the held-out loss rank settings as what their videos show does? The demo's sweep over rank and a learning rate too low, right and too high.

python tests/benchmarks/ranking.py                     not run whole yet; writes tests/golden/ranking.md
python tests/benchmarks/ranking.py hydra.launcher.jobs=1       overrides may follow
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

PROJECT = Path(__file__).parent.parent.parent
TABLE = PROJECT / "tests" / "golden" / "ranking.md"
RATES = {1e-6: "too low", 5e-4: "right", 3e-2: "too high"}
RANKS = (1, 4, 16)
STEPS = 810  # the demo's own; 300 teach a rank of 4 nothing
VIDEOS = 8  # of each kind, of 15 sampling steps


@dataclass(frozen=True)
class Job:
    rank: int
    rate: float
    heldout_loss: float  # infinite where training broke off
    taught: float  # shares of videos
    others: float

    @classmethod
    def from_row(cls, row: dict[str, str]) -> Job:
        return cls(
            int(row["rank"]), float(row["learning_rate"]), float(row["objective"] or "inf"),
            float(row["score_taught"] or 0), float(row["score_other"] or 0),
        )  # fmt: skip

    @property
    def score(self) -> float:
        return (self.taught + self.others) / 2

    def cells(self) -> str:
        return f"| {self.rank} | {self.rate:g} | {RATES[self.rate]} | {self.heldout_loss:.4f} | {self.taught:.0%} | {self.others:.0%} | {self.score:.2f} |"


def trained() -> list[Job]:
    with tempfile.TemporaryDirectory() as folder:
        swept = [f"lora.rank={','.join(map(str, RANKS))}", f"optimizer.learning_rate={','.join(f'{rate:g}' for rate in RATES)}"]  # fmt: skip
        settings = [
            f"train.max_train_steps={STEPS}",
            f"validation.scored_prompts={VIDEOS}",
            "validation.num_inference_steps=15",
            "validation.num_validation_videos=0",
            f"data.cache_dir={folder}/cache",
            f"output_dir={folder}/sweep",
        ]
        subprocess.run([sys.executable, str(PROJECT / "launch.py"), "-m", *swept, *settings, *sys.argv[1:]], check=True)
        with (Path(folder) / "sweep" / "leaderboard.csv").open(encoding="utf-8") as file:
            return [Job.from_row(row) for row in csv.DictReader(file)]


def wrong_ones_are_last(jobs: list[Job], badness: Callable[[Job], float]) -> bool:
    groups = [[badness(job) for job in jobs if (RATES[job.rate] == "right") is right] for right in (True, False)]
    return max(groups[0]) < min(groups[1])


def main() -> int:
    jobs = trained()
    correlation = stats.spearmanr([-job.heldout_loss for job in jobs], [job.score for job in jobs]).statistic
    last = {
        "held-out loss": wrong_ones_are_last(jobs, lambda job: job.heldout_loss),
        "score": wrong_ones_are_last(jobs, lambda job: -job.score),
    }
    text = "\n".join([
        f"The demo (`python launch.py`) of {STEPS} steps at nine settings, by `python tests/benchmarks/ranking.py`. Taught and others: shares of {VIDEOS} videos that",
        "show what was taught, and of as many that do what a prompt of the old world says; score: the mean of the two.", "",
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
