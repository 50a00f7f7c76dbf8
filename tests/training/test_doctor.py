"""task=doctor: what is whole, what is damaged, what goes on. Nothing is changed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launch
from cogvx.compose import compose_config
from cogvx.files import write_json, write_text
from cogvx.records import heartbeats, record
from cogvx.records.sweep import SWEEP
from cogvx.training import checkpoint as checkpoints
from cogvx.training import doctor

PROJECT = Path(__file__).parent.parent.parent
RESULT = "pytorch_lora_weights.safetensors"


def write_weights(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")


def write_checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step_{step:06}"
    write_weights(folder / RESULT)
    files = {RESULT: checkpoints.facts_of_file(folder / RESULT)}
    write_json(folder / checkpoints.MANIFEST, {"step": step, "heldout_loss": None, "files": files})


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run that was killed after step 5 of 6, with checkpoints at 2 and 4."""
    monkeypatch.chdir(tmp_path)
    settings = ["train.logging_steps=1", f"data.cache_dir={tmp_path}/cache"]
    folder = record.open_folder(compose_config([f"output_dir={tmp_path}/outputs/RUN", *settings]))
    record.note(folder, command=["launch.py", "lora.rank=4"], steps=6)
    lines = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(1, 6)]
    write_text(folder / "metrics.jsonl", "".join(lines))
    for step in (2, 4):
        write_checkpoint(folder, step)
    return folder


@pytest.fixture
def done(run) -> Path:
    """The same run, to its end."""
    write_checkpoint(run, 6)
    write_weights(run / RESULT)
    facts = checkpoints.facts_of_file(run / RESULT)
    record.finish(run, {"status": "done", "step": 6, "result_files": {RESULT: facts}})
    write_text(run / "report.html", "a page")
    return run


@pytest.fixture
def examine(capsys):
    """examine("task.run=...", ...): the exit code and the lines. It fails if a file changes."""

    def start(*arguments: str) -> tuple[int, list[str]]:
        before = contents(Path.cwd())
        code = launch.entry(["task=doctor", *arguments])
        assert contents(Path.cwd()) == before
        said = capsys.readouterr()
        return code, (said.out + said.err).splitlines()

    return start


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_run_that_is_done_and_whole(done, examine):
    code, lines = examine("task.run=outputs/RUN")
    assert code == 0 and lines[-1] == "done    nothing to do: all is whole"
    assert lines[0] == "run     outputs/RUN: done, at step 6 of 6"
    assert (
        "checkpoints/step_000006, the result" in lines[1] and "metrics.jsonl (5 lines)" in lines[1]
    )


def test_a_killed_run_its_processes_its_end_and_the_command(run, examine):
    dead = subprocess.Popen(["true"])
    dead.wait()
    now = time.time()
    facts = {"host": "box", "machine": heartbeats.this_machine(), "phase": "train", "step": 5}
    facts |= {"steps": 6, "waits": False, "moved": now, "seen": now, "pid": dead.pid}
    for rank in (0, 1):
        write_json(heartbeats.file_of(run, rank), {"rank": rank, **facts})
    write_text(run / "rank_1.log", "encode\nRuntimeError: no more\n")
    (run / "checkpoints" / "step_000006.partial").mkdir()
    code, lines = examine("task.run=outputs/RUN")
    assert code == 0 and lines[-1] == "go on   python launch.py train.resume=outputs/RUN"
    assert (
        "ended   killed, without a summary: its process was killed, or its machine stopped" in lines
    )
    assert f"last    rank 1: train, step 5 of 6; process {dead.pid} has ended" in lines
    assert "log     rank_1.log: RuntimeError: no more" in lines
    assert "process none works here" in lines
    assert any(line.startswith("left    checkpoints/step_000006.partial: ") for line in lines)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "config.yaml": lambda run: (
        write_text(run / "config.yaml", "defaults: [") or "damaged config.yaml: "
    ),
    "summary.json": lambda run: (
        write_text(run / "summary.json", '{"status": "do')
        or "damaged summary.json: it cannot be read"
    ),
    "metrics": lambda run: (
        write_text(run / "metrics.jsonl", '{"step": 1}\nnoise\n{"step": 2}\n')
        or "damaged metrics.jsonl: 1 line cannot be read"
    ),
    "a gap": lambda run: (
        write_text(run / "metrics.jsonl", '{"step": 1, "loss": 1}\n{"step": 3, "loss": 1}\n')
        or "damaged metrics.jsonl: the line of step 2 is missing"
    ),
    "a checkpoint": lambda run: (
        flip(run / "checkpoints/step_000006" / RESULT)
        or f"damaged checkpoints/step_000006: the bytes of {RESULT} are not those that were written"
    ),
    "the result": lambda run: (
        flip(run / RESULT) or f"damaged {RESULT}: its bytes are not those that were written"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named(done, examine, damage):
    said = DAMAGES[damage](done)
    code, lines = examine("task.run=outputs/RUN")
    assert code == 1 and any(line.startswith(said) for line in lines), lines


@pytest.mark.slow
@pytest.mark.parametrize(
    "garbage", [b"", b"[]", b"{}", b"null", b'{"files": [1]}', b"\xff\x00" * 40]
)
def test_no_file_that_holds_anything_ends_the_doctor(done, garbage):
    write_text(done / "rank_0.log", "error: no\n")
    write_text(heartbeats.file_of(done, 0), "{}")
    files = [path for path in done.rglob("*") if path.is_file()]
    assert len(files) >= 14
    for path in files:
        kept = path.read_bytes()
        path.write_bytes(garbage)
        report = doctor.Report.of(done)
        assert [*report.lines(short=False)][-1][:8] in ("go on   ", "done    "), path
        path.unlink()
        path.mkdir()
        assert [*doctor.Report.of(done).lines(short=False)]
        path.rmdir()
        path.write_bytes(kept)


def test_the_command_that_goes_on_fits_what_is_left(done):
    def last() -> str:
        return doctor.Report.of(done).last_line().removeprefix("go on   python launch.py ")

    (done / "report.html").unlink()
    assert last() == "task=report task.run=outputs/RUN"
    flip(done / RESULT)
    again = "python launch.py train.resume=outputs/RUN"
    assert last() == f"go on   rm outputs/RUN/summary.json && {again}"
    (done / "summary.json").unlink()
    assert last() == "train.resume=outputs/RUN"
    for path in (done / "checkpoints").glob(f"*/{RESULT}"):
        flip(path)
    here = "--config-dir outputs/RUN --config-name config"
    assert last() == f"{here} output_dir=outputs/RUN"
    (done / "config.yaml").unlink()
    assert last() == "lora.rank=4"


def test_a_run_that_goes_on_is_left_alone_and_one_that_hangs_is_named(run, examine):
    with record.locked(run):
        code, lines = examine("task.run=outputs/RUN")
        assert code == 0 and lines[-1].endswith("with a checkpoint:  touch outputs/RUN/stop")
        assert any("works here; process" in line for line in lines)
        past = time.time() - heartbeats.SILENT_AFTER - 60
        facts = {"rank": 0, "host": "box", "machine": heartbeats.this_machine(), "phase": "train"}
        facts |= {"step": 5, "steps": 6, "waits": False, "moved": past, "pid": 1}
        write_json(heartbeats.file_of(run, 0), {**facts, "seen": time.time()})
        code, lines = examine("task.run=outputs/RUN")
        assert lines[-1] == "go on   kill -9 1 && python launch.py train.resume=outputs/RUN"
        assert any("no work for 11 min: hung" in line for line in lines)


def test_a_sweep_and_several_runs_have_a_line_each(run, done, examine):
    sweep = run.parent / "sweep"
    settings = compose_config([f"output_dir={sweep}/rank-1"])
    record.open_folder(settings)
    known = {"name": None, "swept": ["lora.rank"], "command": ["launch.py", "-m", "lora.rank=1,2"]}
    write_json(sweep / SWEEP, {**known, "jobs": {"rank-1": {}, "rank-2": {}}})
    _, lines = examine("task.run=outputs/sweep")
    assert lines[-1] == "go on   python launch.py -m lora.rank=1,2"
    code, lines = examine("task.run=outputs")
    assert code == 0 and "2 runs: 0 damaged, 1 with nothing to do, 1 to go on with" in lines
    code, lines = examine("task.runs=[outputs/RUN,outputs/sweep]")
    assert code == 0 and lines[:2] == [
        "run     outputs/RUN: done, at step 6 of 6",
        "run     outputs/sweep/rank-1: pending",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "task.run must be given: task.run=outputs/RUN"),
        (["task.run=nowhere"], "nowhere does not exist: give the folder of a run"),
        (["task.run=outputs/empty"], "outputs/empty holds no run: give the folder of a run"),
        (["task.run=a", "task.runs=[b]"], "are set together: give one of them"),
    ],
)
def test_bad_input_is_said_in_words(run, examine, arguments, said):
    (run.parent / "empty").mkdir()
    code, lines = examine(*arguments)
    assert code == 2 and said in "\n".join(lines) and "Traceback" not in "\n".join(lines)


def test_it_needs_no_torch(done):
    code = (
        "import sys, launch; code = launch.entry(sys.argv[1:]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "task=doctor", f"task.run={done}"]
    assert subprocess.run(command, cwd=PROJECT, stdout=subprocess.DEVNULL).returncode == 0
