"""data=mix: several sources, each with its own format, word and share; a record holds them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cogvx import compose as composing
from cogvx import config as configuration
from cogvx.errors import UserError
from cogvx.runs import translate
from cogvx.training.heldout import HeldOutLoss


@pytest.fixture
def mixed(tmp_path):
    """mixed("new.share=0.7", ...): the configuration of what a user types; two sources are there.

    new: a folder of 3 clips. old: a table of 2.
    """
    for name, count in (("new", 3), ("old", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.mp4").touch()
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number}")
    rows = [{"text": f"old {n}", "video": f"{n}.mp4"} for n in range(2)]
    (tmp_path / "old/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def compose(*settings: str, old: str = "table") -> configuration.Config:
        typed = [
            f"new.instance_data_root={tmp_path}/new",
            f"old.instance_data_root={tmp_path}/old",
            f"old.format={old}",
            *settings,
        ]
        typed = ["data=mix", *(f"data.sources.{each}" for each in typed)]
        command = translate.translated(typed, Path(tmp_path))
        return composing.checked(command.composer.compose(command.overrides()))

    return compose


def test_each_source_has_its_format_and_its_word(mixed):
    data = mixed("new.id_token=[V] ${x}", "new.id_token_share=0.5").data
    examples = data.read()
    assert [(e.prompt, e.source) for e in examples] == [
        *((f"[V] ${{x}} new {n}", "new") for n in range(3)),
        *((f"old {n}", "old") for n in range(2)),
    ]
    assert examples[3].origin == "old metadata.jsonl:1" and data.id_tokens() == ["[V] ${x}"]
    assert [e.plain_share for e in examples] == [0.5] * 3 + [0] * 2
    assert data.own_part(examples) == examples
    assert data.said == ("list    metadata.jsonl: captions from text, clips from video (old)",)


@pytest.mark.slow
def test_shares_are_those_that_are_given_and_the_last_one_takes_the_rest(mixed):
    assert mixed().data.shares() == {}
    assert mixed("old.share=0.25").data.shares() == {"new": 0.75, "old": 0.25}
    assert mixed("old.share=0.25", "new.share=0.5").data.shares() == {"new": 0.5, "old": 0.25}


def test_the_record_holds_every_setting_of_every_source(mixed, tmp_path):
    config = mixed("new.id_token=[V] ${x}", "old.share=0.3")
    path = tmp_path / "config.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    again = configuration.read(path)
    assert configuration.differences(config, again) == []
    assert again.data.read() == config.data.read() and again.data.shares() == config.data.shares()
    other = mixed("new.id_token=[W]", "old.share=0.3")
    assert configuration.differences(other, config) == [
        "data.sources.new.id_token: [V] ${x} -> [W]"
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["new.id_tokn=x"], "unknown setting data.sources.new.id_tokn; did you mean data.sources"),
        (["new.format=foldr"], "data.sources.new.format=foldr: must be one of demo"),
        (["new.format=mix"], "data.sources.new.format=mix: must be one of demo"),
        (["new.height=64"], "data.sources.new.height=64: all sources share it: data.height"),
        (["new.share=2"], "data.sources.new.share=2: must be above 0, at most 1, or null"),
        (["new.share=1"], "the shares add up to 1, so none is left for old"),
        (["new.share=0.2", "third.format=demo"], "old and third have no share, and others have"),
        (["new.id_token_share=7"], "data.sources.new.id_token_share=7.0: must be above 0"),
        (["new.video_column=mp4"], "data.sources.new.video_column=mp4: with data=folder it is"),
        (["third.format=dataset"], "data.sources.third.dataset_name must be given"),
        (["third=7"], "data.sources.third=7: a source is data.sources.NAME.KEY=VALUE"),
    ],
)
def test_what_is_wrong_with_a_source_is_said_under_its_name(mixed, settings, said):
    with pytest.raises(configuration.Wrong) as raised:
        mixed(*settings)
    assert said in str(raised.value)


def test_a_mix_without_sources_and_a_word_for_all_are_refused(compose):
    with pytest.raises(UserError, match=r"data=mix needs sources, each under a name"):
        compose("data=mix")
    with pytest.raises(UserError, match=r"each source has its own: data.sources.NAME.id_token"):
        compose("data=mix", "data.id_token=x", "++data.sources.a.instance_data_root=/x")


def test_an_error_of_a_source_says_which(mixed, tmp_path):
    (tmp_path / "old/0.mp4").unlink()
    with pytest.raises(UserError, match=r"data.sources.old: 1 of 2 clips cannot be used as listed"):
        mixed().data.read()


def test_the_held_out_loss_of_each_source_is_its_clips():
    loss = HeldOutLoss(2.0, None, None, {}, by_clip=[1.0, 2.0, 3.0])
    apart = loss.apart(["new", "old", "new"])
    assert apart.by_source == {"new": 2.0, "old": 2.0}
    assert apart.for_metrics()["heldout_by_source"] == {"new": 2.0, "old": 2.0}
    assert "heldout_by_source" not in loss.apart(["", "", ""]).for_metrics()
    assert replace(apart, by_source={}) == loss
