"""The page of several runs, task=report, task=compare, and what differs from a recorded run.

On folders that are made up.
"""

import json
import re

import pytest

from cogvx.files import read_json
from cogvx.records import comparison, record
from cogvx.runs import grid

MP4 = b"\x00\x00\x00\x18ftypisom"  # enough to be embedded


def made_up(folder, *overrides: str):
    """A sweep with a done, a running-over, a failed and a pending job."""
    sweep, jobs, _ = grid.sweep_of([*overrides, f"output_dir={folder}"], grid.Composer())
    sweep.freeze(jobs, ["launch.py", "-m", *overrides])
    for number, (job, _) in enumerate(jobs):
        place = sweep.folder / job.name
        if number == len(jobs) - 1:
            continue
        record.note(place, steps=20, git_commit=f"{number % 2}" * 40, packages={"torch": "2.13.0"})
        if number == len(jobs) - 2:
            record.finish(place, {"status": "failed", "reason": "the clip <b>3.mp4</b> is broken"})
            continue
        loss = 0.08 + 0.001 * number
        lines = [
            {
                "step": step,
                "heldout_loss": loss + 1 / (10 + step) if step else 0.18,
                "heldout_standard_error": 0.01,
                "heldout_noise_floor": 0.0015,
            }
            for step in (0, 10, 20)
        ]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for part in ("base", "step_000020"):
            (place / "validation" / part).mkdir(parents=True)
            (place / "validation" / part / "01_seed42.mp4").write_bytes(MP4)
        (place / "validation" / "prompts.json").write_text(
            json.dumps({"01_seed42": "a <script>cat</script> & dog"})
        )
        record.finish(
            place,
            {
                "status": "done",
                "objective": loss,
                "heldout_noise_floor": 0.0015,
                "seconds": 10.0,
                "step": 20,
            },
        )
    return sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return made_up(
        tmp_path_factory.mktemp("sweep") / "s",
        "lora.rank=4,8,16,32",
        "optimizer.learning_rate=1e-3,1e-4",
        "seed=1,2",
    )


@pytest.mark.slow
def test_the_page_has_every_job_and_needs_nothing_else(sweep):
    page = comparison.write_comparison(
        sweep.folder / "report.html", "a title", sweep.runs(), sweep.leaderboard(), sweep.command()
    )
    text = page.read_text(encoding="utf-8")
    assert text.count("<tr class=") == len(sweep.jobs()) == 16
    assert "14 done, 1 failed, 1 pending" in text
    assert text.count("<svg") >= 4, "curves, heat maps, parallel coordinates"
    assert text.count("<video") == 1 + 14, "the base model's once, then each job's"
    loaded = re.findall(r"""(?:src|href)=['"](?!data:|#)([^'"]+)""", text)
    assert all(name.endswith("report.html") for name in loaded), (
        "links to the jobs' own pages alone"
    )
    assert not re.search(r"""(src|href)=['"]https?:""", text)
    assert "python launch.py -m lora.rank=4,8,16,32" in text and "--config-dir" in text
    assert "Best is rank 4, learning_rate 0.001, seed 1: held-out loss 0.0800" in text


@pytest.mark.slow
def test_captions_and_reasons_cannot_write_into_the_page(sweep):
    text = comparison.write_comparison(
        sweep.folder / "report.html", "<i>", sweep.runs(), sweep.leaderboard()
    ).read_text()
    assert "<script>cat" not in text and "&lt;script&gt;cat&lt;/script&gt; &amp; dog" in text
    assert "<b>3.mp4" not in text and "<h1>&lt;i&gt;</h1>" in text


def test_what_is_within_the_noise_is_marked_as_a_tie(sweep):
    rows = sweep.leaderboard()
    assert [row["tie"] for row in rows[:3]] == [None, True, False]
    text = comparison.write_comparison(
        sweep.folder / "report.html", "t", sweep.runs(), rows
    ).read_text()
    assert text.count('<tr class="tie">') == 1 and text.count('<tr class="best">') == 1


def test_a_sweep_without_any_result_has_a_page_too(tmp_path):
    empty, jobs, _ = grid.sweep_of(
        ["lora.rank=4,8", f"output_dir={tmp_path / 's'}"], grid.Composer()
    )
    empty.freeze(jobs, ["launch.py"])
    comparison.conclude(empty)
    assert "2 pending" in (empty.folder / "report.html").read_text()


@pytest.mark.slow
def test_a_job_killed_before_its_own_page_was_written_gets_it_with_the_sweeps(tmp_path):
    small = made_up(tmp_path / "s", "lora.rank=2,4,8,16")
    kept = small.folder / "rank-2" / "report.html"
    kept.write_text("its own")
    comparison.conclude(small)
    assert [path.parent.name for path in sorted(small.folder.glob("*/report.html"))] == [
        "rank-2",
        "rank-4",
    ], "done ones"
    assert kept.read_text() == "its own"


@pytest.mark.slow
def test_report_and_compare_on_the_command_line(sweep, launch, tmp_path):
    ran = launch("task=report", f"task.run={sweep.folder}", cwd=tmp_path)
    assert ran.returncode == 0 and "best " in ran.stdout and "report " in ran.stdout, ran.stderr
    first, second = (sweep.folder / job.name for job in sweep.jobs()[:2])
    ran = launch(
        "task=compare",
        f"task.runs=[{first},{second}]",
        f"task.page={tmp_path / 'new' / 'page.html'}",
        cwd=tmp_path,
    )
    assert ran.returncode == 0 and "code: 00000000 -> 11111111" in ran.stdout, (
        ran.stdout + ran.stderr
    )
    assert (tmp_path / "new" / "page.html").is_file() and not (tmp_path / "outputs").exists(), (
        "they read runs and make none"
    )
    for arguments, said in (
        (
            ["task=report", f"task.run={tmp_path}"],
            "is not the folder of a run (it has no config.yaml) and not",
        ),
        (["task=compare", f"task.runs=[{first}]"], "give two runs or more"),
        (["task=compare", f"task.runs=[{first},{tmp_path}]"], "is not the folder of a run"),
        (
            ["-m", "task=report", f"task.run={first},{second}"],
            "task=report makes no run of a sweep: leave out -m",
        ),
    ):
        ran = launch(*arguments, cwd=tmp_path)
        assert ran.returncode == 2 and said in ran.stderr and "Traceback" not in ran.stderr


def test_what_drifted_since_the_record_is_named(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    record.environment(old, ["launch.py"])
    record.note(old, data_fingerprint="a" * 40, git_commit="1" * 40)
    packages = read_json(old / record.ENVIRONMENT)["packages"]
    record.note(old, packages=packages | {"torch": "1.0"})
    record.environment(new, ["launch.py"], rerun_of=old)
    record.note(new, data_fingerprint="b" * 40)
    said = record.drift(new)
    assert (
        said.startswith("this start differs from the recorded run (")
        and "torch: 1.0 -> " in said
        and "clips and captions: aaaaaaaa -> bbbbbbbb" in said
    )
    assert "code: 11111111 -> " in said
    record.environment(new, ["launch.py"], rerun_of=old)
    record.note(new, data_fingerprint="b" * 40)
    assert record.drift(new) is None, "the second start in a folder is compared with the first"


def test_runs_of_one_name_are_told_apart():
    from pathlib import Path

    from cogvx.records.sweep import told_apart

    assert told_apart([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a/x", "b/x", "y"]
