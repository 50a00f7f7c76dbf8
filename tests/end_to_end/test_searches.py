"""A search with jobs that train, on nano. tests/runs/test_search.py has made-up losses."""

import pytest

from cogvx.records import record
from cogvx.records.sweep import State, Sweep

SHORT = [
    "train.max_train_steps=12",
    "train.checkpointing_steps=4",
    "train.logging_steps=3",
    "scheduler=constant",
    "validation.heldout_steps=3",
    "validation.heldout_draws=2",
    "validation.heldout_timesteps=2",
    "validation.num_validation_videos=0",
    "validation.scored_prompts=0",
]


@pytest.mark.slow
def test_a_search_trains_pauses_and_ends_and_the_same_command_finds_nothing_to_do(
    launch, nano_folder, tmp_path
):
    command = [
        "-m",
        "hydra/sweeper=optuna",
        "lora.rank=choice(1,4)",
        "optimizer.learning_rate=interval(1e-6,1e-1)",
        "hydra.sweeper.n_trials=5",
        "hydra.sweeper.n_startup_trials=3",
        "hydra.sweeper.at_least=2",
        *SHORT,
        f"output_dir={tmp_path / 'search'}",
        f"data.cache_dir={nano_folder.parent.parent}",
    ]
    ran = launch(*command, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    sweep = Sweep.read(tmp_path / "search")
    found = {job.name: sweep.progress(job) for job in sweep.jobs()}
    assert len(found) == 5 and {p.state for p in found.values()} <= {State.done, State.paused}
    best = sweep.leaderboard()[0]
    assert best["state"] == "done" and best["objective"] < best["heldout_loss_before"]
    for progress in found.values():
        if progress.state is State.paused:
            assert progress.step < 12 and "not among the best" in progress.reason
    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "search").glob("*/" + record.SUMMARY)
    }
    again = launch(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}
