"""The search: which jobs it proposes, pauses and goes on with.

The losses are made up; nothing is trained.
"""

import json
import math
import statistics

import pytest

from cogvx.files import read_json_lines
from cogvx.records import record
from cogvx.records.sweep import State
from cogvx.runs import grid
from cogvx.runs.pool import OnFail, Pool

STEPS, POOL = 100, Pool(jobs=1, gpus_per_job=1, on_fail=OnFail.go_on, retry_failed=False)
SPACE = ["lora.rank=choice(4,16,64)", "optimizer.learning_rate=interval(1e-5,1e-1)"]


def loss_of(values: dict, step: int) -> float:
    """Lowest at rank 16 and a rate of 1e-3; early losses tell."""
    distance = abs(math.log10(values["learning_rate"] / 1e-3)) + (values["rank"] != 16)
    return 0.05 + 0.02 * distance + 0.05 * math.exp(-step / 20)


class Play:
    """Stands for run_pool(): one job at a time, with ten held-out losses each."""

    def __init__(self, tmp_path, *overrides):
        given = ["hydra/sweeper=optuna", *SPACE, f"output_dir={tmp_path / 'search'}", *overrides]
        self.sweep, _, base = grid.sweep_of(given, grid.Composer())
        self.sweep.freeze([], ["launch.py"])
        self.search = grid.search_of(given, grid.Composer(), self.sweep, base, POOL, ["launch.py"])

    def run(self, most: int = 1000) -> list[str]:
        """Names of the jobs started, in order."""
        started = []
        while len(started) < most and (job := self.search.take()) is not None:
            started.append(job.name)
            self.train(job)
            self.search.ended(job)
        return started

    def train(self, job) -> None:
        folder = self.sweep.folder / job.name
        record.note(folder, steps=STEPS)
        (folder / record.SUMMARY).unlink(missing_ok=True)
        lines = read_json_lines(folder / "metrics.jsonl")
        for step in range(lines[-1]["step"] + 10 if lines else 10, STEPS + 1, 10):
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(
                    json.dumps(
                        {"step": step, "loss": 1.0, "heldout_loss": loss_of(job.values, step)}
                    )
                    + "\n"
                )
            if step < STEPS and self.search.to_pause():
                return record.finish(folder, {"status": "interrupted", "step": step})
        record.finish(
            folder, {"status": "done", "step": STEPS, "objective": loss_of(job.values, STEPS)}
        )

    def states(self) -> dict[str, State]:
        return {job.name: self.sweep.progress(job).state for job in self.sweep.jobs()}

    def steps(self) -> int:
        return sum(self.sweep.progress(job).step for job in self.sweep.jobs())


@pytest.mark.slow
def test_a_search_finds_what_is_best_and_ends_at_n_trials(tmp_path):
    play = Play(tmp_path, "hydra.sweeper.n_trials=24", "hydra.sweeper.rungs=[]")
    started = play.run()
    assert len(set(started)) == len(started) == 24 and set(play.states().values()) == {State.done}
    best = play.sweep.leaderboard()[0]
    assert best["rank"] == 16 and 3e-4 < best["learning_rate"] < 3e-3
    proposed = [job.values for job in play.sweep.jobs()[8:]]
    rates = [10 ** (-5 + 4 * i / 99) for i in range(100)]
    chance = statistics.median(
        loss_of({"rank": r, "learning_rate": lr}, STEPS) for r in (4, 16, 64) for lr in rates
    )
    assert statistics.median(loss_of(values, STEPS) for values in proposed) < chance - 0.01, (
        "it keeps to what is good"
    )
    assert sum(values["rank"] == 16 for values in proposed) > len(proposed) / 2


@pytest.mark.slow
def test_jobs_that_fall_behind_are_paused_and_the_best_is_still_found(tmp_path):
    whole = Play(tmp_path / "whole", "hydra.sweeper.n_trials=16", "hydra.sweeper.rungs=[]")
    whole.run()
    play = Play(tmp_path / "rungs", "hydra.sweeper.n_trials=16")
    play.run()
    states = list(play.states().values())
    assert states.count(State.paused) >= 5 and play.steps() < 0.75 * whole.steps()
    best = play.sweep.leaderboard()[0]
    assert best["state"] == "done" and best["rank"] == 16 and 3e-4 < best["learning_rate"] < 3e-3
    reasons = [row["reason"] for row in play.sweep.leaderboard() if row["state"] == "paused"]
    assert all("not among the best" in reason for reason in reasons)


def test_a_paused_job_goes_on_when_later_results_put_it_among_the_best(tmp_path):
    play = Play(
        tmp_path,
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.at_least=2",
        "hydra.sweeper.rungs=[0.5]",
    )
    for rank, state in ((16, State.done), (4, State.paused)):
        job = frozen(play, rank)
        play.search.unfinished.append(job)
        play.run(most=1)
        assert play.states()[job.name] is state
    paused = job
    for number in range(
        4
    ):  # worse ones reach the rung: the share that goes on has room for the paused one now
        worse = play.sweep.folder / frozen(play, 32 + number).name
        record.note(worse, steps=STEPS)
        (worse / "metrics.jsonl").write_text(
            json.dumps({"step": 50, "heldout_loss": 1.0 + number}) + "\n"
        )
        record.finish(worse, {"status": "paused"})
    assert play.run() == [paused.name], (
        "nothing else is promoted, and there are more jobs than n_trials"
    )
    assert play.states()[paused.name] is State.done
    steps = [
        line["step"] for line in read_json_lines(play.sweep.folder / paused.name / "metrics.jsonl")
    ]
    assert steps == list(range(10, STEPS + 1, 10)), "from where it was paused"


def frozen(play, rank: int):
    job, config = play.search.make({"lora.rank": str(rank), "optimizer.learning_rate": "0.001"})
    play.sweep.freeze([(job, config)], ["launch.py"])
    return job


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_stopped_and_a_higher_n_trials_adds_jobs(tmp_path):
    first = Play(tmp_path, "hydra.sweeper.n_trials=6", "hydra.sweeper.rungs=[]").run(most=4)
    again = Play(tmp_path, "hydra.sweeper.n_trials=6", "hydra.sweeper.rungs=[]").run()
    more = Play(tmp_path, "hydra.sweeper.n_trials=8", "hydra.sweeper.rungs=[]").run()
    assert (len(first), len(again), len(more)) == (4, 2, 2) and len({*first, *again, *more}) == 8


def test_a_killed_job_of_a_search_goes_on_before_new_ones(tmp_path):
    play = Play(tmp_path, "hydra.sweeper.n_trials=4", "hydra.sweeper.rungs=[]")
    job = play.search.take()
    record.note(play.sweep.folder / job.name, steps=STEPS)
    assert Play(tmp_path, "hydra.sweeper.n_trials=4", "hydra.sweeper.rungs=[]").search.take() == job


def test_a_space_that_is_used_up_ends_the_search(tmp_path, capsys):
    play = Play(
        tmp_path, "hydra.sweeper.n_trials=9", "optimizer.learning_rate=1e-3,1e-4", "lora.rank=4,16"
    )
    assert len(play.run()) == 4
    assert "all that came up have been tried" in capsys.readouterr().out
