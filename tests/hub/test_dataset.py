"""data.dataset_name comes from the hub."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from settings import QUICK
from stand_in import OWNER, Fault

from cogvx import config as configuration
from cogvx.data import world
from cogvx.data.mp4 import write_video
from cogvx.errors import UserError
from cogvx.hub_client import COMMITS

WEIGHTS = "pytorch_lora_weights.safetensors"
TABLE = b"text,video\na cat,videos/0.mp4\na dog,videos/1.mp4\n"


@pytest.fixture
def read(compose):
    pytest.importorskip("datasets")

    def start(name, *overrides):
        data = compose("data=dataset", f"data.dataset_name={name}", *overrides).data
        return data.read()

    return start


@pytest.fixture
def film(make_clip, tmp_path):
    return make_clip(tmp_path / "film.mp4").read_bytes()


def folder_of(film: bytes) -> dict[str, bytes]:
    rows = b"file_name,text\nvideos/0.mp4,a cat\nvideos/1.mp4,a dog\n"
    return {"metadata.csv": rows, "videos/0.mp4": film, "videos/1.mp4": film + b"\0"}


@pytest.mark.slow
def test_a_table_on_the_hub_and_clips_here(hub, read, clips):
    hub.add("me/table", {"train.csv": TABLE}, kind="dataset")
    found = read("me/table", f"data.instance_data_root='{clips}'")
    assert [(each.prompt, each.video) for each in found] == [
        ("a cat", clips / "videos" / "0.mp4"),
        ("a dog", clips / "videos" / "1.mp4"),
    ]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_clips_on_the_hub(hub, read, film, streaming):
    hub.add("me/films" + streaming, folder_of(film), kind="dataset")
    found = read("me/films" + streaming, f"data.streaming={streaming}")
    assert [each.prompt for each in found] == ["a cat", "a dog"]
    assert [each.video.read_bytes() for each in found] == [film, film + b"\0"]


@pytest.mark.slow
def test_an_older_revision(hub, read, clips):
    repo = hub.add("me/rows", {"train.csv": TABLE}, kind="dataset")
    first = repo.names["main"]
    repo.commit({"train.csv": TABLE + b"a bird,videos/2.mp4\n"})
    root = f"data.instance_data_root='{clips}'"
    assert len(read("me/rows", root)) == 3
    assert len(read(f"me/rows@{first}", root)) == 2


def refused(read, name: str) -> str:
    with pytest.raises(UserError) as raised:
        read(name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.slow
def test_what_is_not_there_or_not_open(hub, read, set_up, waited):
    hub.add("me/closed", {"train.csv": TABLE}, kind="dataset", accepted=set())
    hub.add("lab/private", {"train.csv": TABLE}, kind="dataset", private=True)
    hub.add("me/odd", {"train.bin": b"\0"}, kind="dataset")
    assert "its authors ask you to accept its licence" in refused(read, "me/closed")
    assert "there is no public dataset of that name on the hub" in refused(read, "lab/private")
    assert "the revision v9 is no branch" in refused(read, "me/closed@v9")
    assert "it is on the hub, but not in a form that datasets reads" in refused(read, "me/odd")
    set_up(HF_TOKEN=OWNER)
    assert "a private dataset needs an account that may read it" in refused(read, "me/nothing")
    hub.faults.append(Fault("GET", "/api/datasets/me/closed", status=500, times=99))
    hub.faults.append(Fault("HEAD", "/datasets/me/closed", status=500, times=99))
    assert "the hub has a fault of its own (500)" in refused(read, "me/closed")


@pytest.mark.slow
def test_offline_what_was_read_once_is_there(hub, read, clips, set_up):
    hub.add("me/once", {"train.csv": TABLE}, kind="dataset")
    root = f"data.instance_data_root='{clips}'"
    before = read("me/once", root)
    hub.requests.clear()
    set_up(HF_HUB_OFFLINE="1")
    assert read("me/once", root) == before
    assert "HF_HUB_OFFLINE is set" in refused(read, "me/never")
    assert hub.requests == []


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_the_commit_that_was_read_is_known_and_read_again(hub, read, clips, streaming, set_up):
    name = "me/pinned" + streaming
    repo = hub.add(name, {"train.csv": TABLE}, kind="dataset")
    first, more = repo.names["main"], f"data.streaming={streaming}"
    root = f"data.instance_data_root='{clips}'"
    assert len(read(name, root, more)) == 2
    assert {name: first} == COMMITS
    repo.commit({"train.csv": TABLE + b"a bird,videos/2.mp4\n"})
    # In this process, from the record, and from the record without a network.
    assert len(read(name, root, more)) == 2
    COMMITS.clear()
    assert len(read(f"{name}@{first}", root, more)) == 2
    set_up(HF_HUB_OFFLINE="1")
    COMMITS.clear()
    assert len(read(f"{name}@{first}", root, more)) == 2


def test_a_set_on_the_hub_cannot_name_files_of_this_machine(hub, read, clips, tmp_path):
    row = f"text,video\na cat,{clips}/videos/0.mp4\n".encode()
    hub.add("me/spy", {"train.csv": row}, kind="dataset")
    with pytest.raises(UserError, match="names files of this machine") as raised:
        read("me/spy")
    assert "data.instance_data_root=THEIR_FOLDER" in str(raised.value)
    assert len(read("me/spy", "data.allow_outside_root=true")) == 1


def same(one: Path, other: Path) -> bool:
    first, second = (load_file(run / WEIGHTS) for run in (one, other))
    return first.keys() == second.keys() and all((first[k] == second[k]).all() for k in first)


@pytest.mark.slow
def test_a_run_from_clips_and_a_lora_of_the_hub_is_the_same_again(
    hub, trained, launch, cache, tmp_path
):
    """Their commits are in its record. Their authors change both, and the network is gone."""
    start = trained("train.max_train_steps=3")
    lora = {WEIGHTS: (start / WEIGHTS).read_bytes()}
    scenes = world.scenes(6, seed=0)
    clips = {}
    for number, scene in enumerate(scenes):
        write_video(tmp_path / "clip.mp4", world.draw_clip(scene), fps=8)
        clips[f"videos/{number}.mp4"] = (tmp_path / "clip.mp4").read_bytes()
    rows = "".join(f"videos/{number}.mp4,a clip {number}\n" for number in range(6))
    clips["metadata.csv"] = f"file_name,text\n{rows}".encode()
    films = hub.add("me/six", clips, kind="dataset")
    start_from = hub.add("me/start", lora)
    commits = {"me/six": films.names["main"], "me/start": start_from.names["main"]}

    def run(name, *arguments, **variables):
        more = [f"output_dir='{tmp_path / name}'", f"data.cache_dir='{tmp_path / 'cache'}'"]
        said = launch(*arguments, *more, env=hub.environment(tmp_path / "home", **variables))
        assert said.returncode == 0, said.stdout + said.stderr
        return tmp_path / name

    asked = ["data=dataset", "data.dataset_name=me/six", "lora.init_from=me/start"]
    first = run("first", *QUICK, *asked, "train.max_train_steps=3")
    config = configuration.read(first / "config.yaml")
    pinned = {config.data.dataset_name, config.lora.init_from}
    assert pinned == {f"{place}@{commit}" for place, commit in commits.items()}
    assert json.loads((first / "environment.json").read_text())["hub_commits"] == commits
    assert "me/start@" in (first / "report.html").read_text()

    films.commit({**clips, "videos/0.mp4": clips["videos/1.mp4"]})
    start_from.commit({WEIGHTS: lora[WEIGHTS][:-4] + b"\0\0\0\0"})
    recorded = ["--config-dir", first, "--config-name", "config"]
    again = run("again", *recorded, HF_HUB_OFFLINE="1")
    assert same(again, first)
    # And with a network, where the newest are others.
    third = run("third", *recorded)
    assert same(third, first)


def test_a_row_of_one_set_fetches_nothing_of_another(hub, compose, set_up):
    hub.add("me/private", {"a.mp4": b"mine"}, kind="dataset", private=True)
    set_up(HF_TOKEN=OWNER)
    data = compose("data=dataset", "data.dataset_name=them/set").data
    with pytest.raises(UserError, match="names a file of another one"):
        data.path_of({"bytes": None, "path": "hf://datasets/me/private/a.mp4"})
    assert hub.count("GET /datasets") == 0
