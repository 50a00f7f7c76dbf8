"""From a task's settings to the code that runs it: the only place that knows all tasks.

Each function imports its own code, so that a task never waits for the imports of another.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.errors import UserError
from cogvx.options import tasks

if TYPE_CHECKING:
    from cogvx.config import Config


def start(config: Config, folder: Path) -> dict:
    """Runs config.task in the run's folder and returns the run's summary."""
    return STARTS[type(config.task)](config, folder)


def train(config: Config, folder: Path) -> dict:
    from cogvx.plan.clock import Expectation, present_card
    from cogvx.training.trainer import train

    is_main = os.environ.get("RANK", "0") == "0"
    with Expectation(folder, present_card() if is_main else None) as expected:
        return train(config, folder, expected)


def plan(config: Config, folder: Path) -> dict:
    from cogvx.plan.planner import plan

    return plan(config, folder)


def encode(config: Config, folder: Path) -> dict:
    from cogvx.training.trainer import encode

    return encode(config, folder)


def nano_vae(config: Config, folder: Path) -> dict:
    from cogvx.training.autoencoder import train

    return train(config, config.task, folder)


def evaluate(config: Config, folder: Path) -> dict:
    from cogvx.evaluation.evaluate import evaluate

    return evaluate(config, config.task, folder)


def report(config: Config, folder: Path) -> dict:
    from cogvx.files import shown
    from cogvx.records import comparison, record, report, sweep

    place = config.task.run
    if (place / sweep.SWEEP).is_file():
        comparison.conclude(sweep.Sweep.read(place))
    elif (place / record.CONFIG).is_file():
        print(f"report  {shown(report.write(place))}")
    else:
        raise UserError(
            f"task.run={place} is not the folder of a run (it has no {record.CONFIG}) "
            f"and not the folder of a sweep (it has no {sweep.SWEEP})"
        )
    return {}


def compare(config: Config, folder: Path) -> dict:
    from cogvx.files import shown
    from cogvx.records import comparison, leaderboard, record, sweep

    places = config.task.runs
    for place in places:
        if not (place / record.CONFIG).is_file():
            raise UserError(
                f"task.runs: {place} is not the folder of a run: it has no {record.CONFIG}"
            )
    runs = dict(zip(sweep.told_apart(places), places, strict=True))
    rows = sweep.rows_of(runs, {}, [])
    leaderboard.show(rows)
    leaderboard.show_surroundings(rows, runs)
    page = config.task.page
    page.parent.mkdir(parents=True, exist_ok=True)
    print(f"report  {shown(comparison.write(page, 'Comparison of runs', runs, rows))}")
    return {}


STARTS: dict[type[tasks.Task], Callable[[Config, Path], dict]] = {
    tasks.TrainTask: train,
    tasks.PlanTask: plan,
    tasks.EncodeTask: encode,
    tasks.NanoVaeTask: nano_vae,
    tasks.EvaluateTask: evaluate,
    tasks.ReportTask: report,
    tasks.CompareTask: compare,
}
