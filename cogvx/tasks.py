"""What a run does: one YAML under conf/task/ and one class here each. start() returns the run's summary."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cogvx.errors import UserError

if TYPE_CHECKING:
    from cogvx.config import Config


@dataclass
class Task:
    makes_a_run: ClassVar[bool] = True  # else it reads runs that are there, and has no folder

    def start(self, config: Config, folder: Path) -> dict:
        raise TypeError(f"{type(self).__name__} has no start()")


@dataclass
class Train(Task):
    def start(self, config: Config, folder: Path) -> dict:
        from cogvx.plan.clock import Expectation, present_card
        from cogvx.training.trainer import train

        with Expectation(folder, present_card() if os.environ.get("RANK", "0") == "0" else None) as expected:
            return train(config, folder, expected)


@dataclass
class Plan(Task):
    def start(self, config: Config, folder: Path) -> dict:
        from cogvx.plan.planner import plan

        return plan(config, folder)


@dataclass
class Encode(Task):
    def start(self, config: Config, folder: Path) -> dict:
        from cogvx.training.trainer import encode

        return encode(config, folder)


@dataclass
class NanoVae(Task):
    steps: int
    batch: int
    crop: int
    share_of_whole_frames: float
    learning_rate: float
    max_grad_norm: float
    kl_weight: float
    bf16: bool

    def problems(self) -> list[str]:
        found = [f"task.{n}={getattr(self, n)}: must be 1 or more" for n in ("steps", "batch") if getattr(self, n) < 1]
        if self.crop not in range(16, 65, 16):
            found.append(f"task.crop={self.crop}: must be 16, 32, 48 or 64 pixels")
        if not 0 <= self.share_of_whole_frames <= 1:
            found.append(f"task.share_of_whole_frames={self.share_of_whole_frames}: must be from 0 to 1")
        return found

    def start(self, config: Config, folder: Path) -> dict:
        from cogvx.training.autoencoder import train

        return train(config, self, folder)


@dataclass
class Evaluate(Task):
    run: str
    strengths: list[float]
    checkpoints: bool
    count: int
    prompts_file: str | None
    other_prompts_file: str | None
    seed: int
    clip_path: str | None
    vbench: list[str]

    def problems(self) -> list[str]:
        found = [] if self.count >= 1 else [f"task.count={self.count}: must be 1 or more"]
        if not self.strengths or any(strength <= 0 for strength in self.strengths):
            found.append(f"task.strengths={self.strengths}: must be numbers above 0; the base model is judged anyway")
        return found

    def start(self, config: Config, folder: Path) -> dict:
        from cogvx.inference.evaluate import evaluate

        return evaluate(config, self, folder)


@dataclass
class Report(Task):
    run: str  # of a run or a sweep
    makes_a_run: ClassVar[bool] = False

    def start(self, config: Config, folder: Path) -> dict:
        from cogvx.runs import comparison, record, report, sweep

        place = Path(self.run)
        if (place / sweep.SWEEP).is_file():
            comparison.conclude(sweep.Sweep.read(place))
        elif (place / record.CONFIG).is_file():
            print(f"report  {record.shown(report.write(place))}")
        else:
            raise UserError(
                f"task.run={place}: neither a run's folder, with {record.CONFIG}, nor a sweep's, with {sweep.SWEEP}"
            )
        return {}


@dataclass
class Compare(Task):
    runs: list[str]
    page: str
    makes_a_run: ClassVar[bool] = False

    def problems(self) -> list[str]:
        return [] if len(self.runs) > 1 else [f"task.runs={self.runs}: give two runs or more, as [outputs/A,outputs/B]"]

    def start(self, config: Config, folder: Path) -> dict:
        from cogvx.runs import comparison, leaderboard, record, sweep

        places = [Path(run) for run in self.runs]
        for place in places:
            if not (place / record.CONFIG).is_file():
                raise UserError(f"task.runs: {place} is not a run's folder: it has no {record.CONFIG}")
        runs = dict(zip(sweep.told_apart(places), places, strict=True))
        rows = sweep.rows_of(runs, {}, [])
        leaderboard.show(rows)
        leaderboard.show_surroundings(rows, runs)
        page = Path(self.page)
        page.parent.mkdir(parents=True, exist_ok=True)
        print(f"report  {record.shown(comparison.write(page, 'Comparison of runs', runs, rows))}")
        return {}
