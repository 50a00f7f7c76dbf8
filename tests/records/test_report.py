"""The page of one run, on folders that are made up: what it leads with, and what it never shows."""

import json
import re

import pytest

from cogvx.records import pages, record, report

MP4 = b"\x00\x00\x00\x18ftypisom"  # enough to be embedded
PROMPT = "a <script>cat</script> & dog"


@pytest.fixture
def folder(tmp_path, compose):
    """A run that is done: two held-out clips, both better, videos with a real clip, scores."""
    run = record.open_folder(compose(f"output_dir='{tmp_path / 'run'}'", "lora.rank=16"))
    record.note(run, steps=20, device="cpu, 2 threads", packages={"torch": "2.13.0"}, python="3.11")
    lines = [judged(0, [0.20, 0.10]), judged(10, [0.15, 0.08]), judged(20, [0.11, 0.0106])]
    lines += [
        {"step": step, "loss": 0.1, "seconds": 0.5, "data_seconds": 0.1, "lr": 1e-3, "grad_norm": 1}
        for step in (10, 20)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for part in ("base", "clips", "step_000020"):
        (run / "validation" / part).mkdir(parents=True)
        (run / "validation" / part / "01_seed42.mp4").write_bytes(MP4)
    (run / "validation" / "step_000020" / "01_seed42_before_after.mp4").write_bytes(MP4)
    (run / "validation" / "prompts.json").write_text(json.dumps({"01_seed42": PROMPT}))
    (run / "validation" / "clips.json").write_text(json.dumps({"01_seed42": "held-out clip"}))
    scores = {"kind": "taught", "base": 0.25, "tuned": 1.0, "difference": 0.75, "videos": 8}
    scores |= {"low": 0.5, "high": 1.0}
    found = [scores | {"measure": "colour"}, scores | {"measure": "motion"}]
    (run / "evaluation.json").write_text(json.dumps({"comparisons": {"result": found}}))
    summary = {"status": "done", "step": 20, "objective": 0.06, "heldout_standard_error": 0.01}
    phases = {"train": {"reserved_gib": 0.5, "allocated_gib": 0.375}}
    record.finish(
        run, summary | {"seconds": 75.0, "peak_memory_gib": 0.5, "memory_by_phase": phases}
    )
    return run


def judged(step: int, clips: list[float]) -> dict:
    return {"step": step, "heldout_loss": sum(clips) / 2, "heldout_by_clip": clips}


def read_page(folder) -> str:
    return report.write_page(folder).read_text(encoding="utf-8")


def test_the_page_opens_with_the_videos_and_says_who_made_each(folder):
    text = read_page(folder)
    labels = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert labels == ["base model", "tuned", "held-out clip"]
    assert text.index("<figcaption>") < text.index("The held-out loss fell") < text.index("Numbers")
    assert "a &lt;script&gt;cat&lt;/script&gt; &amp; dog" in text and "<script>cat" not in text


def test_the_page_loads_nothing_from_elsewhere(folder):
    text = read_page(folder)
    assert re.findall(r"""(?:src|href)=['"](?!data:|#)([^'"]+)""", text) == []
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text) and "@import" not in text


def test_numbers_are_in_words_with_units_and_no_key_of_the_record(folder):
    text = read_page(folder).partition("<details>")[0]
    visible = re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]+>", " ", text, flags=re.DOTALL)
    assert "0.50 GiB reserved and 0.38 GiB allocated" in visible
    for key in ("heldout_standard_error", "peak_memory_gib", "objective", "git_commit"):
        assert key not in visible
    assert "0.5 s" in visible and "0.50 GiB" in visible and "1 min 15 s" in visible
    assert "+75 %" in visible and "+50 % to +100 %" in visible, "a share, with its interval"
    assert 'class="mean"' in text and "cpu, 2 threads" in visible


def test_only_settings_that_were_changed_come_first(folder):
    first, details = read_page(folder).split("<details>")
    assert "lora.rank<td>16<td>64" in first.replace("</td>", "")
    assert "lora.lora_alpha" not in first, "it follows the rank by default"
    assert "lora_alpha: 16" in details


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ([0.11, 0.0106], "The held-out loss fell by 60%, from 0.1500 to 0.0603"),
        ([0.21, 0.11], "The interval excludes 0: the tuned model is worse."),
        ([0.10, 0.11], "The interval includes 0: on 2 held-out clips this may be chance."),
        ([0.2, 0.1], "The held-out loss did not change: 0.1500."),
    ],
)
def test_the_verdict_says_what_the_interval_says(folder, after, said):
    lines = [judged(0, [0.20, 0.10]), judged(20, after)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert said in read_page(folder)


def test_the_interval_is_students_for_paired_differences():
    found = pages.difference_interval([1.0, 2.0, 3.0], [2.0, 2.5, 3.9])
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, 0.14276, 1.45724), abs=1e-4)
    assert pages.difference_interval([1.0], [2.0]) is None
    assert pages.difference_interval([1.0, 2.0], [2.0]) is None


def test_a_run_that_is_done_writes_its_own_page_while_it_holds_its_lock(folder):
    with record.locked(folder):
        assert "still running" not in read_page(folder)
        record.finish(folder, {"status": "interrupted"})
        assert "still running" in read_page(folder)


def test_a_run_that_failed_says_why_and_one_that_never_started_has_a_page(
    folder, compose, tmp_path
):
    record.finish(folder, {"status": "failed", "reason": "the clip <b>3.mp4</b> is broken"})
    assert "ended early (failed): the clip &lt;b&gt;3.mp4&lt;/b&gt; is broken" in read_page(folder)
    new = record.open_folder(compose(f"output_dir='{tmp_path / 'new'}'"))
    assert "has not been started" in read_page(new)


def test_a_column_has_the_digits_that_tell_its_values_apart():
    assert pages.column([0.07031, 0.07032, None], 4) == ["0.07031", "0.07032", ""]
    assert pages.column([0.5, 0.25], 4) == ["0.5000", "0.2500"]
    assert pages.column([12.2, 12.4]) == ["12.2", "12.4"] and pages.column([3, "x"]) == ["3", "x"]
    texts = [pages.setting_text(value) for value in (1e-3, 0.12345678, None, True)]
    assert texts == ["0.001", "0.12345678", "null", "true"]
