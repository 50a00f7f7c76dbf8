"""task=list and task=clean, on folders that are made up. Nothing is trained."""

import os
import time

import pytest

from cogvx.errors import UserError
from cogvx.files import this_machine, unfinished
from cogvx.records import folders, record
from cogvx.runs import grid

LONG_AGO = time.time() - 3 * 86400


@pytest.fixture
def outputs(tmp_path, compose):
    """A run that is done, one that was killed after a checkpoint, one that never started, one
    that failed at once, and a sweep of which one job is done."""
    root = tmp_path / "outputs"

    def run(name: str, **summary) -> None:
        folder = record.open_folder(compose(f"output_dir='{root / name}'"))
        if name != "never":
            record.note(folder, steps=9)
            (folder / record.LOCK).write_text("process 1 on host")
        if summary:
            record.finish(folder, summary)

    run("done", status="done", objective=0.0703, step=9)
    base = root / "done" / "validation" / "base"
    base.mkdir(parents=True)
    (base / "01_seed42.npz").write_bytes(b"0" * 5000)
    (base / "01_seed42.mp4").write_bytes(b"0" * 100)
    run("killed")
    (root / "killed" / "checkpoints" / "step_000004").mkdir(parents=True)
    (root / "killed" / "checkpoints" / "step_000004" / "manifest.json").write_text("{}")
    (root / "killed" / "checkpoints" / "step_000008.99999999.partial").mkdir()
    (root / "killed" / "checkpoints" / "step_000008.99999999.partial" / "weights").write_bytes(
        b"0" * 9000
    )
    (root / "killed" / "metrics.jsonl.99999999.partial").write_text("half")
    (root / "killed" / "profile").mkdir()
    run("never")
    run("failed", status="failed", reason="a clip is broken")
    made, jobs, _ = grid.sweep_of(["lora.rank=4,8", f"output_dir='{root / 's'}'"], grid.Composer())
    made.freeze(jobs, ["launch.py"])
    record.note(root / "s" / "rank-4", steps=9)
    record.finish(root / "s" / "rank-4", {"status": "done", "objective": 0.08, "step": 9})
    make_old(root)
    return root


def make_old(root) -> None:
    for path in [*root.rglob("*"), root]:
        os.utime(path, (LONG_AGO, LONG_AGO))


def names(root, found) -> set[str]:
    return {str(each.path.relative_to(root)) for each in found}


@pytest.mark.slow
def test_the_list_has_every_run_and_each_sweep_once(outputs, capsys):
    folders.list_folders(outputs)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 5 + 1 and "5 runs and sweeps" in lines[-1]
    found = {line.split()[0]: line for line in lines[1:-1]}
    assert set(found) == {"done", "killed", "never", "failed", "s"}
    assert "0.0703" in found["done"] and "LoRA, rank 64" in found["done"]
    assert "nano" in found["done"] and "3 days" in found["done"]
    assert "killed" in found["killed"] and "pending" in found["never"]
    assert "2 jobs: 1 pending, 1 done" in found["s"] and "0.0800" in found["s"]


@pytest.mark.slow
def test_clean_takes_what_nothing_needs_and_leaves_runs_with_a_result_or_a_checkpoint(outputs):
    found = names(outputs, folders.useless(outputs))
    assert found == {
        "never",
        "failed",
        "killed/checkpoints/step_000008.99999999.partial",
        "killed/metrics.jsonl.99999999.partial",
        "killed/profile",
        "killed/.lock",
        "done/.lock",
        "done/validation/base/01_seed42.npz",
    }
    removed = folders.clean_folders(outputs, yes=True)
    assert len(removed) == len(found) and folders.useless(outputs) == []
    assert (outputs / "killed" / "checkpoints" / "step_000004" / "manifest.json").is_file()
    assert (outputs / "done" / "validation" / "base" / "01_seed42.mp4").is_file()
    assert (outputs / "s" / "rank-8" / "config.yaml").is_file(), "a pending job of a sweep"


@pytest.mark.slow
def test_clean_leaves_what_is_in_use_or_may_just_be_starting(outputs):
    os.utime(outputs / "never" / "config.yaml")
    with record.locked(outputs / "killed"), record.locked(outputs / "failed"):
        found = names(outputs, folders.useless(outputs))
    assert found == {"done/.lock", "done/validation/base/01_seed42.npz"}


@pytest.mark.slow
def test_clean_leaves_a_file_that_a_living_process_is_writing(outputs):
    writing = unfinished(outputs / "clip")
    left, elsewhere = (
        outputs
        / writing.name.replace(f".{os.getpid()}.", f".{number}.").replace(this_machine(), machine)
        for number, machine in ((99999999, this_machine()), (os.getpid(), "0a1b2c3d"))
    )
    for path in (writing, left, elsewhere):
        path.write_text("half")
    os.utime(elsewhere, (time.time() - 7200,) * 2)
    os.utime(left, (time.time() - 7200,) * 2)
    found = names(outputs, folders.useless(outputs))
    assert left.name in found and not {writing.name, elsewhere.name} & found
    make_old(outputs)
    found = names(outputs, folders.useless(outputs))
    assert elsewhere.name in found, "for a day nobody has written to it"
    assert writing.name not in found


@pytest.mark.slow
def test_without_a_terminal_clean_only_says_what_to_type(outputs, capsys):
    assert folders.clean_folders(outputs, yes=False) == []
    said = capsys.readouterr().out
    assert "never started: 1" in said and "python launch.py task=clean task.yes=true" in said
    assert (outputs / "never").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "gone"), [("y", True), ("", False)])
def test_on_a_terminal_clean_asks(outputs, monkeypatch, answer, gone):
    monkeypatch.setattr(folders.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    folders.clean_folders(outputs, yes=False)
    assert (outputs / "never").is_dir() is not gone


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    for act in (folders.list_folders, lambda root: folders.clean_folders(root, yes=True)):
        with pytest.raises(UserError, match=r"task\.folder=.* does not exist"):
            act(tmp_path / "no")
    folders.list_folders(tmp_path)
    assert "no run under" in capsys.readouterr().out


@pytest.mark.slow
def test_both_on_the_command_line_make_no_run(launch, outputs):
    ran = launch("task=list", f"task.folder={outputs}", cwd=outputs.parent)
    assert ran.returncode == 0 and "5 runs and sweeps" in ran.stdout, ran.stderr
    ran = launch("task=clean", f"task.folder={outputs}", "task.yes=true", cwd=outputs.parent)
    assert ran.returncode == 0 and "removed 8 files and folders" in ran.stdout, ran.stderr
    assert [path.name for path in outputs.parent.iterdir()] == ["outputs"]
