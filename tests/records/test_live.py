"""The page of a run that goes on: what it shows, who writes it, and how a browser follows it."""

import functools
import http.server
import json
import os
import signal
import threading
import time

import pytest
from browser import CHROMIUM, Browser

from cogvx.data.mp4 import write_video
from cogvx.records import comparison, live, pages, present, record, report
from cogvx.records.sweep import Sweep
from cogvx.runs import grid

PHASES = {"train": {"reserved_gib": 9.5, "allocated_gib": 9.25}}


@pytest.fixture
def folder(tmp_path, compose):
    """A run that was started, with a base model's video, a held-out clip and two lines."""
    import numpy

    run = record.open_folder(compose(f"output_dir='{tmp_path / 'run'}'"))
    record.note(run, steps=960, planned_seconds_per_step=2.0)
    log(run, {"step": 0, "heldout_loss": 0.2}, {"step": 10, "loss": 0.1, "seconds": 2.5})
    frames = numpy.zeros((3, 16, 16, 3), numpy.uint8)
    write_video(run / "validation" / "base" / "01_seed42.mp4", frames, fps=8)
    (run / "held_out").mkdir()
    (run / "held_out" / "01.png").write_bytes(b"png")
    (run / "dataset_report.csv").write_text("use,prompt\ntrain,a cat\nheld out,a <b>dog</b>\n")
    (run / "plan.json").write_text(json.dumps({"phases": {"train": {"reserved_gib": 9.25}}}))
    return run


def log(run, *lines: dict) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def tell(run, **facts) -> None:
    (run / present.PROGRESS).write_text(json.dumps(facts))


def page_of(run) -> str:
    return report.write_page(run).read_text(encoding="utf-8")


def test_the_page_of_a_run_that_goes_on_says_how_far_it_is(folder):
    told = {"phases": ["train"], "step": 312, "steps": 960, "seconds_left": 250.0}
    with record.locked(folder):
        tell(folder, **told, memory_by_phase=PHASES)
        text = page_of(folder)
    assert "Step 312 of 960: training." in text and "About 4 min 10 s left, until <time" in text
    assert "2.5 s (planned: 2 s)" in text and "0.1000 (steps up to 10)" in text
    assert "9.50 GiB reserved and 9.25 GiB allocated (planned: 9.25 GiB reserved)" in text
    assert "a &lt;b&gt;dog&lt;/b&gt;" in text and "1 clip, never trained on" in text
    assert '<video src="validation/base/01_seed42.mp4"' in text, "not copied into every writing"
    assert "followRun();" in text


def test_a_run_that_is_done_has_all_in_one_file_again(folder):
    with record.locked(folder):
        page_of(folder)
        assert not pages.is_final(folder / pages.PAGE)
        record.finish(folder, {"status": "done", "step": 960})
        text = page_of(folder)
    assert pages.is_final(folder / pages.PAGE)
    assert (
        '<video src="data:' in text and "followRun();" not in text and "still running" not in text
    )


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"phases": ["encode clips"], "counted": [3, 27]}, "Encoding clips: 3 of 27"),
        ({"phases": ["held-out loss"]}, "Computing the held-out loss, of the base model"),
        ({"phases": ["train", "video"], "step": 5, "steps": 9}, "Step 5 of 9: making videos"),
        ({"phases": ["video"], "trained": True}, "All steps are done: making videos"),
        ({"phases": [], "sign": "hash    still reading a.bin"}, "Still reading a.bin"),
        ({"phases": []}, "Preparing"),
        ({}, ""),
    ],
)
def test_what_a_run_does_is_said_in_words(facts, words):
    assert present.in_words(facts) == words


def test_the_time_left_counts_pauses_and_the_videos_at_the_end(folder, monkeypatch):
    from cogvx.progress import bar

    now, phases = [100.0], ["video"]
    monkeypatch.setattr(present.time, "monotonic", lambda: now[0])
    teller = present.Teller(folder, lambda: (phases, {}))
    for now[0] in (100.0, 110.0, 130.0):
        assert "step" not in teller.facts()
    phases[:] = ["train"]
    with bar(total=100, desc="train ") as progress:
        assert teller.facts()["seconds_left"] is None
        progress.update(10)
        phases[:], now[0] = ["train", "video"], 150.0
        assert teller.facts()["seconds_left"] == pytest.approx(90 * 20 / 10 + 30)
    assert teller.facts()["trained"]


def test_a_run_tells_what_it_does_until_its_end(folder):
    with present.telling(folder, lambda: (["load"], PHASES)):
        for _ in range(100):
            if (folder / present.PROGRESS).is_file():
                break
            time.sleep(0.05)
        assert present.Doing.read(folder).words == "Loading the model"
    assert not (folder / present.PROGRESS).exists()


def test_writing_stays_within_its_share_of_the_time(folder):
    follower = live.Follower(folder, started=0.0)
    assert follower.is_due(0.0)
    follower.written, follower.seen = 0.0, follower.state()
    assert not follower.is_due(live.WRITE_EVERY - 1) and follower.is_due(live.WRITE_EVERY)
    (folder / "checkpoints" / "step_000010").mkdir(parents=True)
    assert follower.is_due(live.SOON), "there is something new to see"
    follower.spent, follower.longest = 4.0, 1.0
    assert not follower.is_due(199.0) and follower.is_due(201.0), "5 s are 3 s and 1 % of 200 s"


def test_a_run_that_was_killed_ends_early_on_its_page(folder):
    tell(folder, phases=["train"], step=20, steps=960)
    run = os.fork()
    if run == 0:
        try:
            with record.locked(folder), live.following(folder):
                time.sleep(60)
        finally:
            os._exit(0)
    try:
        wait_for((folder / "report_stamp.js").is_file)
        assert "Step 20 of 960: training." in (folder / pages.PAGE).read_text()
    finally:
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
    wait_for(lambda: pages.is_final(folder / pages.PAGE))
    assert "This run ended early (killed)" in (folder / pages.PAGE).read_text()


@pytest.mark.slow
def test_a_run_that_ends_does_not_wait_for_its_last_page(folder):
    """Its folder is still locked then."""
    with record.locked(folder):
        with live.following(folder):
            wait_for((folder / "report_stamp.js").is_file)
            record.finish(folder, {"status": "failed", "reason": "no <b>clips</b>"})
            began = time.monotonic()
        assert time.monotonic() - began < 10
        text = (folder / pages.PAGE).read_text()
    assert "ended early (failed): no &lt;b&gt;clips" in text
    assert pages.is_final(folder / pages.PAGE)


def wait_for(done, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_sweep_that_is_killed_has_a_last_page_also_of_its_jobs(tmp_path):
    follower = live.Follower(tmp_path / "s")
    (tmp_path / "s").mkdir()
    with record.locked(tmp_path / "s"):
        assert follower.runs() == [], "its jobs are not checked yet"
        sweep, jobs, _ = grid.sweep_of(
            ["lora.rank=4,8", f"output_dir={tmp_path / 's'}"], grid.Composer()
        )
        sweep.freeze(jobs, ["launch.py", "-m", "lora.rank=4,8"])
        first, _ = sweep.runs().values()
        record.note(first, steps=100)
        with record.locked(first):
            follower.write()
            assert "still running" in (first / pages.PAGE).read_text(encoding="utf-8")
    follower.write_last()
    assert "ended early (killed)" in (first / pages.PAGE).read_text(encoding="utf-8")
    text = (sweep.folder / pages.PAGE).read_text(encoding="utf-8")
    assert "1 killed, 1 pending" in text and "still runs" not in text


@pytest.mark.slow
def test_the_page_of_a_sweep_says_how_far_each_job_is(tmp_path):
    sweep, jobs, _ = grid.sweep_of(
        ["lora.rank=4,8,16", f"output_dir={tmp_path / 's'}"], grid.Composer()
    )
    sweep.freeze(jobs, ["launch.py", "-m", "lora.rank=4,8,16"])
    first, second, _ = sweep.runs().values()
    record.finish(first, {"status": "done", "objective": 0.1, "seconds": 60.0})
    record.note(second, steps=100)
    log(second, {"step": 50, "loss": 0.1, "seconds": 0.5})
    tell(second, phases=["train"], step=50, steps=100, seconds_left=25.0)
    with record.locked(sweep.folder), record.locked(second):
        text = comparison.write_sweep(sweep).read_text(encoding="utf-8")
    assert "The sweep still runs. 1 of 3 jobs are over." in text and "followRun();" in text
    assert "About 1 min 25 s left" in text, "25 s of the running job and a job like the first"
    assert "running: step 50 of 100: training, 25 s left" in text and '<td class="key">pending'
    text = comparison.write_sweep(Sweep.read(sweep.folder)).read_text(encoding="utf-8")
    assert "still runs" not in text and pages.is_final(sweep.folder / pages.PAGE)


# -- in a browser --------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path):
    """The address of the folder by `python -m http.server`."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *given: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("way", ["file", "server"])
def test_an_open_page_follows_the_run_and_keeps_its_place(folder, way, served, tmp_path):
    start = tmp_path.as_uri() if way == "file" else served
    look = "document.dispatchEvent(new Event('visibilitychange'))"
    shows = "document.getElementById('state')?.innerText.includes('Step {} of 960')"
    with Browser(tmp_path / "profile") as browser:
        with record.locked(folder):
            tell(folder, phases=["train"], step=10, steps=960)
            page_of(folder)
            browser.open(f"{start}/run/report.html")
            assert browser.ask(shows.format(10))
            browser.ask("video = document.querySelector('video'); scrollTo(0, 300)")
            browser.ask("document.querySelector('#settings details').open = true")
            tell(folder, phases=["train"], step=20, steps=960, seconds_left=9.0)
            log(folder, {"step": 20, "loss": 0.1, "seconds": 2.5})
            page_of(folder)
            browser.ask(look)
            browser.until(shows.format(20))
            assert browser.ask("document.querySelectorAll('#curves svg').length") == 1, "new"
            assert browser.ask("video === document.querySelector('video')"), "it plays on"
            assert browser.ask("[scrollY, document.querySelector('#settings details').open]") == [
                300,
                True,
            ]
            assert browser.ask("document.getElementById('silence').hidden")
        page_of(folder)
        browser.ask(look)
        browser.until("document.querySelector('.state').innerText.includes('ended early')")
        assert browser.ask("String(window.pageStamp)") == "() => {}", "it looks no more"
        assert browser.ask("document.querySelectorAll('iframe').length") == 0
        assert browser.errors == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_an_open_page_says_when_nothing_comes_any_more(folder, tmp_path):
    with record.locked(folder), Browser(tmp_path / "profile") as browser:
        page_of(folder)
        browser.open((folder / "report.html").as_uri())
        look = "for (let i = 0; i < 180; i++) document.dispatchEvent(new Event('visibilitychange'))"
        browser.ask(look)
        assert browser.ask("document.getElementById('silence').hidden")
        browser.ask(look)
        assert not browser.ask("document.getElementById('silence').hidden")
