"""The search: which jobs it proposes, pauses and goes on with.

The losses are made up; nothing is trained.
"""

import json
import math
import statistics
from pathlib import Path

import pytest

from cogvx.errors import UserError
from cogvx.files import read_json_lines
from cogvx.records import record
from cogvx.records.sweep import State
from cogvx.runs import grid
from cogvx.runs.pool import OnFail, Pool

PROJECT = Path(__file__).parent.parent.parent
STEPS, POOL = 100, Pool(jobs=1, gpus_per_job=1, on_fail=OnFail.go_on, retry_failed=False)
SPACE = ["lora.rank=choice(4,16,64)", "optimizer.learning_rate=interval(1e-5,1e-1)"]


def loss_of(values: dict, step: int) -> float:
    """Lowest at rank 16 and a rate of 1e-3; early losses tell."""
    distance = abs(math.log10(values["learning_rate"] / 1e-3)) + (values["rank"] != 16)
    return 0.05 + 0.02 * distance + 0.05 * math.exp(-step / 20)


class Play:
    """Stands for run_pool(): one job at a time, with ten held-out losses each."""

    space = ("hydra/sweeper=optuna", *SPACE)
    composer = grid.Composer()

    def __init__(self, tmp_path, *overrides):
        given = [*self.space, f"output_dir={tmp_path / 'search'}", *overrides]
        self.sweep, _, base = grid.sweep_of(given, self.composer)
        self.sweep.freeze([], ["launch.py"])
        self.search = grid.search_of(given, self.composer, self.sweep, base, POOL, ["launch.py"])

    def loss_of(self, values: dict, step: int) -> float:
        return loss_of(values, step)

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
                        {"step": step, "loss": 1.0, "heldout_loss": self.loss_of(job.values, step)}
                    )
                    + "\n"
                )
            if step < STEPS and self.search.to_pause():
                return record.finish(folder, {"status": "interrupted", "step": step})
        record.finish(
            folder, {"status": "done", "step": STEPS, "objective": self.loss_of(job.values, STEPS)}
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


@pytest.mark.slow
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
    job, config = play.search.branches[0].make(
        {"lora.rank": str(rank), "optimizer.learning_rate": "0.001"}
    )
    play.sweep.freeze([(job, config)], ["launch.py"])
    return job


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_stopped_and_a_higher_n_trials_adds_jobs(tmp_path):
    first = Play(tmp_path, "hydra.sweeper.n_trials=6", "hydra.sweeper.rungs=[]").run(most=4)
    again = Play(tmp_path, "hydra.sweeper.n_trials=6", "hydra.sweeper.rungs=[]").run()
    more = Play(tmp_path, "hydra.sweeper.n_trials=8", "hydra.sweeper.rungs=[]").run()
    assert (len(first), len(again), len(more)) == (4, 2, 2) and len({*first, *again, *more}) == 8


@pytest.mark.slow
def test_a_killed_job_of_a_search_goes_on_before_new_ones(tmp_path):
    play = Play(tmp_path, "hydra.sweeper.n_trials=4", "hydra.sweeper.rungs=[]")
    job = play.search.take()
    record.note(play.sweep.folder / job.name, steps=STEPS)
    assert Play(tmp_path, "hydra.sweeper.n_trials=4", "hydra.sweeper.rungs=[]").search.take() == job


@pytest.mark.slow
def test_a_space_that_is_used_up_ends_the_search(tmp_path, capsys):
    play = Play(
        tmp_path, "hydra.sweeper.n_trials=9", "optimizer.learning_rate=1e-3,1e-4", "lora.rank=4,16"
    )
    assert len(play.run()) == 4
    assert "all that came up have been tried" in capsys.readouterr().out


@pytest.mark.slow
def test_each_branch_of_a_search_keeps_to_its_own_range_and_the_command_line_narrows_them(tmp_path):
    given = ["+sweeps=optimizers_search", "hydra.sweeper.n_startup_trials=4"]
    given += ["hydra.sweeper.rungs=[]", "hydra.sweeper.n_trials=12"]
    play = Branches(tmp_path / "all", *given)
    assert len(play.run()) == 12
    ranges = {"adamw": (5e-5, 3e-3), "schedule_free": (5e-5, 3e-3), "muon": (1e-4, 1e-2)}
    ranges |= {"prodigy": (0.25, 2.0)}
    found = [(job.values["optimizer"], job.values["learning_rate"]) for job in play.sweep.jobs()]
    assert len({optimizer for optimizer, _ in found}) >= 3
    for optimizer, rate in found:
        low, high = ranges[optimizer]
        assert low <= rate <= high, (optimizer, rate)
    later = [optimizer for optimizer, _ in found[6:]]
    assert later.count("prodigy") >= 3, "which has the lowest losses: TPE keeps to it"
    one = Branches(tmp_path / "one", *given, "optimizer=prodigy", "hydra.sweeper.n_trials=2")
    one.run()
    assert {job.values["optimizer"] for job in one.sweep.jobs()} == {"prodigy"}
    again = Branches(tmp_path / "all", *given, "hydra.sweeper.n_trials=14")
    assert len(again.run()) == 2, "the jobs of the first start are known"


class Branches(Play):
    """A search with branches, whose losses are lowest for Prodigy."""

    space = ()
    composer = grid.Composer(searchpath=(str(PROJECT),))

    def loss_of(self, values: dict, step: int) -> float:
        return 0.05 if values["optimizer"] == "prodigy" else 0.08


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (["data.fps=4,8", "lora.rank=4"], "data.fps"),
        (["validation.heldout_timesteps=range(2,8)", "data.id_token=CAT"], "validation.heldout_"),
        (["model=nano,2b", "data.instance_data_root=/clips"], "model"),
        (["memory=fast,low"], "memory.vae_tiling"),
    ],
)
def test_a_search_over_what_changes_the_judge_is_refused(tmp_path, given, key):
    with pytest.raises(UserError, match=rf"and {key}\w* changes what that loss measures"):
        grid.sweep_of(["hydra/sweeper=optuna", *given], grid.Composer())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_search_over_what_is_trained_is_none_of_these():
    given = ["hydra/sweeper=optuna", "data.max_train_clips=4,8", "train.mixed_precision=no,bf16"]
    given += ["memory.base_storage=own,fp8", "memory.gradient_checkpointing=true"]
    assert len(grid.sweep_of(given, grid.Composer())[1]) >= 4
