"""Sweeps: which jobs a command line makes, where they lie, how far they are, which is best.

Without torch, and without running any job.
"""

import csv
import io
import json
import multiprocessing
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from cogvx import config as configuration
from cogvx.errors import UserError
from cogvx.records import comparison, record
from cogvx.records.sweep import Progress, State, Sweep, progress_of, seconds_left
from cogvx.records.table import Table
from cogvx.runs import grid, jobs, pool

PROJECT = Path(__file__).parent.parent.parent
SWEEPS = sorted((PROJECT / "sweeps").glob("*.yaml"))
FROM_CONF, BY_NAME = grid.Composer(), grid.Composer(searchpath=(str(PROJECT),))


def sweep(*overrides: str, place: grid.Composer = FROM_CONF):
    made, jobs, _ = grid.sweep_of(list(overrides), place)
    return made, {job.name: config for job, config in jobs}


def test_every_combination_is_a_job_named_by_its_values():
    made, jobs = sweep("lora.rank=4,16", "optimizer.learning_rate=1e-3,1e-4")
    assert {(c.lora.rank, c.optimizer.learning_rate) for c in jobs.values()} == {
        (4, 1e-3),
        (4, 1e-4),
        (16, 1e-3),
        (16, 1e-4),
    }
    assert "rank-4_learning_rate-0.001" in jobs
    assert made.swept == ["lora.rank", "optimizer.learning_rate"]


@pytest.mark.slow
def test_a_tie_binds_to_each_jobs_own_value():
    _, jobs = sweep("lora.rank=4,16", "lora.lora_alpha=${lora.rank}")
    assert [(c.lora.rank, c.lora.lora_alpha) for c in jobs.values()] == [(4, 4), (16, 16)]
    _, jobs = sweep("lora.rank=4,16", "lora.lora_alpha=${half:lora.rank}")
    assert [(c.lora.rank, c.lora.lora_alpha) for c in jobs.values()] == [(4, 2), (16, 8)]
    _, jobs = sweep("+sweeps=rank_lr", place=BY_NAME)
    assert len(jobs) == 9 and all(c.lora.rank == c.lora.lora_alpha for c in jobs.values())


def test_the_same_command_finds_the_same_folder_and_another_base_another():
    same = [sweep("lora.rank=4,16")[0].folder, sweep("lora.rank=4,16,64")[0].folder]
    assert same[0] == same[1], "more values complete the sweep that is there"
    assert sweep("lora.rank=4,16", "seed=7")[0].folder != same[0]
    assert (
        sweep("lora.rank=4,16", "model=2b", "data.instance_data_root=/clips")[0].folder != same[0]
    )


def test_a_version_with_more_settings_finds_the_same_folder():
    values = {"train": {"max_train_steps": 5}, "hydra": {"runtime": {"choices": {}}}}
    before, base = grid.mark(OmegaConf.create(values), []), OmegaConf.create(values)
    base.train.deterministic = False
    assert grid.mark(base, []) == before
    base.train.deterministic = True
    assert grid.mark(base, []) != before


def test_two_spellings_of_a_value_are_one_job():
    assert list(sweep("optimizer.learning_rate=1e-3,0.001,1e-4")[1]) == [
        "learning_rate-0.001",
        "learning_rate-0.0001",
    ]


@pytest.mark.slow
def test_odd_values_are_taken_as_typed_and_none_shares_a_folder():
    prompts = [
        "ein Häschen, läuft",
        "«兎» in\nsnow",
        '"red", it\'s',
        "..",
        "",
        "a" * 300 + "1",
        "a" * 300 + "2",
    ]
    typed = ",".join("'" + prompt.replace("'", "\\'") + "'" for prompt in prompts)
    _, jobs = sweep(f"validation.validation_prompt={typed}")
    assert [config.validation.validation_prompt for config in jobs.values()] == prompts
    assert all(len(name.encode()) < 250 and not {"/", "\n", "'", '"'} & {*name} for name in jobs)
    assert len(sweep("optimizer.learning_rate=0.12345678,0.12345679")[1]) == 2


def test_many_swept_keys_leave_a_name_that_file_systems_take():
    one, other = ({f"key_{number}": f"{end}{'ä' * 60}" for number in range(12)} for end in "ab")
    names = [grid.folder_name(one), grid.folder_name(other), grid.short_enough("-".join(one) * 9)]
    assert len({*names}) == 3 and max(len(name.encode()) for name in names) < 250


def test_lists_of_layers_are_values_like_any_other(tmp_path):
    given = ["lora.target_modules=[to_q],[to_q,to_k]", f"output_dir={tmp_path / 'sweep'}"]
    made, jobs, _ = grid.sweep_of(given, FROM_CONF)
    made.freeze(jobs, ["launch.py"])
    assert [job.values["target_modules"] for job in made.jobs()] == [["to_q"], ["to_q", "to_k"]]
    assert comparison.setting_text(["to_q", "to_k"]) == "[to_q,to_k]"
    comparison.conclude(made)


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_named_sweep_composes_and_opens_with_its_command(path):
    assert f"python launch.py sweep={path.stem}" in path.read_text(encoding="utf-8")
    made, jobs = sweep(f"+sweeps={path.stem}", place=BY_NAME)
    assert len(jobs) > 1 and made.folder.name.startswith(path.stem)


@pytest.mark.slow
def test_the_command_line_narrows_a_named_sweep():
    assert len(SWEEPS) >= 1
    made, whole = sweep("+sweeps=rank_alpha_lr", place=BY_NAME)
    part, narrow = sweep("+sweeps=rank_alpha_lr", "lora.rank=64", place=BY_NAME)
    assert (len(whole), len(narrow)) == (12, 6) and {c.lora.rank for c in narrow.values()} == {64}
    assert part.folder == made.folder and set(narrow) < set(whole), "a part of the same sweep"


@pytest.mark.slow
def test_each_optimizer_is_tried_at_its_own_rates():
    made, jobs = sweep("+sweeps=optimizers", place=BY_NAME)
    rates = {}
    for config in jobs.values():
        rates.setdefault(config.choices["optimizer"], []).append(config.optimizer.learning_rate)
    assert (
        len(jobs) == 12 and rates["prodigy"] == [0.5, 1.0] and rates["adamw"] == [1e-4, 5e-4, 1e-3]
    )
    part, prodigys = sweep("+sweeps=optimizers", "optimizer=prodigy", place=BY_NAME)
    assert part.folder == made.folder and len(prodigys) == 2 and set(prodigys) < set(jobs)
    _, two = sweep(
        "+sweeps=optimizers",
        "optimizer=prodigy,muon",
        "optimizer.learning_rate=0.001,1.0",
        place=BY_NAME,
    )
    assert sorted(c.choices["optimizer"] for c in two.values()) == ["muon", "prodigy"]
    with pytest.raises(UserError, match=r"none of the sweep's grids has optimizer=adam:"):
        sweep("+sweeps=optimizers", "optimizer=adam", place=BY_NAME)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "lora.rank=4,0"], "lora.rank=0: must be 1 or more"),
        (["-m", "lora.rank=4,x"], "lora.rank=x: must be a whole number"),
        (["-m", "seed=1"], "nothing is swept"),
        (
            ["-m", "lora.rank=1,2", "hydra.launcher.jobs=0"],
            "hydra.launcher.jobs=0: must be 1 or more",
        ),
        (["-m", "lora.rank=1,2", "hydra.launcher.on_fail=carry_on"], "expected one of go_on, stop"),
        (["-m", "lora.rank=1,2", "hydra.sweep.dir=x"], "output_dir=... is the folder of a sweep"),
        (["-m", "output_dir=a,b"], "output_dir says how a sweep runs, not what its jobs are"),
        (
            ["-m", "seed=1,2", "validation.validation_prompt=ein Hase,größer"],
            "one text with a comma, or several values?",
        ),
        (["sweep=rank_alpha_lt"], "did you mean rank_alpha_lr"),
        (
            ["-m", "optimizer.lr=1e-3,1e-4"],
            "optimizer.lr is optimizer.learning_rate here: type optimizer.learning_rate=0.001",
        ),
        (["sweep=rank_alpha_lr", "train.resume=x"], "Give one of them"),
        (["-m", "optimizer.learning_rate=interval(1e-5,1e-3)"], "hydra/sweeper=optuna"),
        (
            ["-m", "hydra/sweeper=optuna", "lora.rank=choice(0,4)", "seed=range(1,3)"],
            "lora.rank=0: must be 1 or more",
        ),
        (
            ["-m", "hydra/sweeper=optuna", "optimizer.learning_rate=interval(0,1)"],
            "on a log scale from above 0",
        ),
        (
            ["-m", "hydra/sweeper=optuna", "lora.rank=1,2", "hydra.sweeper.keep=2"],
            "hydra.sweeper.keep=2: must be",
        ),
        (
            ["-m", "hydra/sweeper=optuna", "lora.rank=1,2", "hydra.sweeper.n_trails=2"],
            "did you mean hydra.sweeper.n_trials",
        ),
    ],
)
def test_a_mistake_anywhere_stops_a_sweep_before_it_has_a_folder(launch, tmp_path, arguments, said):
    ran = launch(*arguments, cwd=tmp_path)
    assert ran.returncode == 2 and said in ran.stderr and "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def frozen(tmp_path):
    """A sweep of three ranks, frozen and not started."""
    made, frozen_jobs, _ = grid.sweep_of(
        ["lora.rank=4,8,16", f"output_dir={tmp_path / 'sweep'}"], grid.Composer()
    )
    made.freeze(frozen_jobs, ["launch.py"])
    return made


def finish(frozen: Sweep, name: str, **summary) -> None:
    record.note(frozen.folder / name, steps=9)
    record.finish(frozen.folder / name, summary)


@pytest.mark.slow
def test_a_frozen_job_keeps_its_configuration_and_refuses_another(frozen):
    recorded = configuration.read(frozen.folder / "rank-8" / "config.yaml")
    assert (recorded.lora.rank, recorded.lora.lora_alpha) == (8, 8)
    _, others, _ = grid.sweep_of(
        ["lora.rank=4,8,16", "seed=7", f"output_dir={frozen.folder}"], grid.Composer()
    )
    with pytest.raises(UserError, match="seed: 42 -> 7"):
        frozen.freeze(others, ["launch.py"])


@pytest.mark.slow
def test_the_leaderboard_has_every_job_the_lowest_loss_first_and_says_what_is_a_tie(frozen, capsys):
    finish(frozen, "rank-4", status="done", objective=0.0710, heldout_noise_floor=0.001)
    finish(frozen, "rank-8", status="done", objective=0.0703, heldout_noise_floor=0.001)
    finish(frozen, "rank-16", status="out_of_memory", reason="too large")
    comparison.conclude(Sweep.read(frozen.folder))
    with (frozen.folder / "leaderboard.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [(row["place"], row["tie"], row["rank"], row["state"]) for row in rows]
    assert found == [
        ("1", "", "8", "done"),
        ("2", "True", "4", "done"),
        ("", "", "16", "out of memory"),
    ]
    assert [float(r["lora.lora_alpha"]) for r in rows] == [8, 4, 16], (
        "what follows from a swept key varies too"
    )
    said = capsys.readouterr().out
    assert (
        "1 more within the noise of the measurement" in said
        and "out of memory rank-16: too large" in said
    )


def test_the_state_of_a_job_is_read_from_its_folder(frozen):
    folder = frozen.folder / "rank-4"
    assert progress_of(folder).state is State.pending
    record.note(folder, steps=9)
    assert progress_of(folder).state is State.killed, "started, gone, and no word of how"
    with record.locked(folder):
        assert progress_of(folder).state is State.running
    ends = {
        -signal.SIGTERM: State.interrupted,
        -signal.SIGKILL: State.killed,
        -signal.SIGSEGV: State.failed,
        1: State.failed,
    }
    for code, state in ends.items():
        (folder / record.SUMMARY).unlink(missing_ok=True)
        jobs.record_end(folder, code)
        assert progress_of(folder).state is state
    assert "exit code 1" in json.loads((folder / record.SUMMARY).read_text())["reason"]


@pytest.mark.parametrize(
    ("retry", "again"), [(False, {"rank-8", "rank-16"}), (True, {"rank-4", "rank-8", "rank-16"})]
)
def test_killed_jobs_go_on_and_failed_ones_when_asked(frozen, retry, again):
    finish(frozen, "rank-4", status="failed", reason="a mistake")
    finish(frozen, "rank-8", status="killed", reason="kill -9")
    assert {
        job.name for job in frozen.jobs() if jobs.is_to_run(frozen, job, retry_failed=retry)
    } == again


def test_a_job_that_an_earlier_start_still_runs_is_waited_for(frozen, monkeypatch, capsys):
    held = record.locked(frozen.folder / "rank-8")
    held.__enter__()
    monkeypatch.setattr(pool.time, "sleep", lambda seconds: held.__exit__(None, None, None))
    pool.wait_for_earlier(frozen)
    assert "waits for jobs of an earlier start to stop: rank-8 (process" in capsys.readouterr().out
    assert progress_of(frozen.folder / "rank-8").state is State.pending


def test_a_sweep_that_runs_already_is_named(launch, tmp_path):
    with record.locked(tmp_path):
        ran = launch("-m", "lora.rank=1,2", f"output_dir='{tmp_path}'")
    assert ran.returncode == 2 and f"{tmp_path} is in use by another process" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == [record.LOCK]


def test_a_place_that_cannot_be_written_is_named(launch, tmp_path):
    (tmp_path / "file").touch()
    ran = launch("-m", "lora.rank=1,2", f"output_dir='{tmp_path / 'file' / 'sweep'}'")
    assert (
        ran.returncode == 2 and "cannot be written" in ran.stderr and "Traceback" not in ran.stderr
    )


def test_starts_of_the_same_moment_have_folders_of_their_own(monkeypatch, tmp_path, compose):
    drawn = iter(["aaaa", "aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr(record.secrets, "token_hex", lambda size: next(drawn))
    monkeypatch.setattr(record.time, "strftime", lambda form: "now")
    monkeypatch.chdir(tmp_path)
    assert [record.open_folder(compose()).name for _ in range(2)] == ["now_aaaa", "now_bbbb"]


def test_jobs_share_out_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    settings = pool.Pool(jobs=None, gpus_per_job=2, on_fail=pool.OnFail.go_on, retry_failed=False)
    assert [slot.gpus for slot in settings.slots()] == [["0", "1"], ["2", "3"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="gpus_per_job=2, and there is 1"):
        settings.slots()


def test_the_time_left_counts_what_runs_and_what_waits():
    def job(state: State, **given) -> Progress:
        usual = {"reason": None, "step": 0, "steps": 100, "loss": None, "judged": []}
        return Progress(state, **(usual | {"step_seconds": None, "summary": {}} | given))

    done = job(State.done, summary={"seconds": 60.0})
    running = job(State.running, step=50, step_seconds=1.0)
    assert seconds_left([done, running, job(State.pending)]) == 50 + 60
    assert seconds_left([done, running, running, job(State.pending)]) == (50 + 50 + 60) / 2
    assert seconds_left([done, running], to_come=2) == 50 + 2 * 60
    assert seconds_left([running, job(State.pending)]) == 50 + 100, "no job is done yet"
    assert seconds_left([done, job(State.pending)]) is None, "nothing runs"


def write_leaderboards(folder: Path, times: int) -> None:
    for _ in range(times):
        Sweep.read(folder).write_leaderboard()


@pytest.mark.slow
def test_a_report_beside_a_sweeps_end_never_breaks_the_leaderboard(frozen):
    """task=report and the sweep itself write leaderboard.csv at the same time."""
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_leaderboards, args=(frozen.folder, 15)) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if (frozen.folder / "leaderboard.csv").is_file():
            with (frozen.folder / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
                assert len(list(csv.DictReader(file))) == 3
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert not list(frozen.folder.glob("*.partial"))


def test_a_narrow_live_table_drops_columns_and_no_digit(tmp_path):
    rates = ["0.0001234567", "0.0001234568"]
    given = [f"optimizer.learning_rate={','.join(rates)}", f"output_dir={tmp_path / 'sweep'}"]
    made, frozen_jobs, _ = grid.sweep_of(given, grid.Composer())
    made.freeze(frozen_jobs, ["launch.py"])
    table = Table(made)
    for width, headings in ((100, ("loss", "left")), (34, ("held-out",))):
        table.console = Console(width=width, record=True, file=io.StringIO())
        table.console.print(table.grid())
        lines = table.console.export_text().splitlines()
        assert [line.split()[0] for line in lines[1:]] == rates
        assert all(heading in lines[0] for heading in headings)
    assert "left" not in lines[0]
