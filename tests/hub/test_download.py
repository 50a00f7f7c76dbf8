"""Models, adapters and data sets come from the hub as they are there, or one line says why not."""

import errno
import json
import re
from pathlib import Path

import pytest
from stand_in import OWNER, READER, Fault, sha256

from cogvx import config as configuration
from cogvx import hub_client, hub_digests
from cogvx.errors import UserError
from cogvx.model.hub import local_adapter
from cogvx.model.weight_files import weight_files
from cogvx.records import record

WEIGHTS = "pytorch_lora_weights.safetensors"
LORA = {WEIGHTS: bytes(range(256)) * 1000, "inference.json": b"{}", "README.md": b"a card\n"}


def refused(place: str) -> str:
    """The one line that says why it did not come."""
    with pytest.raises(UserError) as raised:
        local_adapter(place)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_an_adapter_comes_with_its_settings_and_nothing_else(hub):
    others = {"step_000004/" + WEIGHTS: b"another", "sample.mp4": b"a video"}
    repo = hub.add("me/lora", LORA | others)
    folder = local_adapter("me/lora")
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, "inference.json"}
    assert (folder / WEIGHTS).read_bytes() == LORA[WEIGHTS]
    assert folder.name == repo.names["main"]
    hub.requests.clear()
    assert local_adapter("me/lora") == folder
    assert hub.count("GET /storage|HEAD") == 0, "it is in the cache"


def test_an_older_adapter_has_its_revision_after_an_at(hub):
    repo = hub.add("me/versions", LORA)
    first = repo.names["main"]
    repo.commit(LORA | {WEIGHTS: b"newer" * 1000})
    repo.names["v2"] = repo.names["main"]
    assert (local_adapter("me/versions@v2") / WEIGHTS).read_bytes() == b"newer" * 1000
    assert (local_adapter(f"me/versions@{first}") / WEIGHTS).read_bytes() == LORA[WEIGHTS]
    said = refused("me/versions@v3")
    assert said == (
        "task.add=me/versions is on the hub, but the revision v3 is no branch, tag or commit of it"
    )


def test_what_is_here_is_not_looked_for_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("me/here").mkdir(parents=True)
    Path("lora.safetensors").touch()
    assert local_adapter("me/here") == tmp_path / "me" / "here"
    assert local_adapter("lora.safetensors") == tmp_path / "lora.safetensors"
    assert refused("loras/lost.safetensors").startswith(
        "task.add=loras/lost.safetensors does not exist here, and is not a hub id"
    )
    assert hub.requests == []


@pytest.mark.parametrize("after", [0, 1000, 200_000])
def test_a_connection_that_is_cut_goes_on_where_it_stopped(hub, waited, after, monkeypatch):
    from huggingface_hub import constants

    # What is not a whole chunk is lost; a real one has 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add("me/cut", LORA)
    hub.faults.append(Fault("GET", "/storage/", after=after))
    folder = local_adapter("me/cut")
    assert sha256((folder / WEIGHTS).read_bytes()) == sha256(LORA[WEIGHTS])
    assert hub.ranges == ([f"bytes={after}-"] if after else [])


def test_what_comes_with_a_wrong_byte_is_fetched_again(hub, waited, capsys):
    hub.add("me/wrong", LORA)
    hub.faults.append(Fault("GET", "/storage/", damaged=True))
    folder = local_adapter("me/wrong")
    assert (folder / WEIGHTS).read_bytes() == LORA[WEIGHTS]
    assert f"me/wrong: damaged, so fetched again: {WEIGHTS}\n" in capsys.readouterr().out
    hub.add("me/small", LORA | {"inference.json": b'{"card": 1}'})
    hub.faults.append(Fault("GET", "/resolve/.*inference.json", damaged=True))
    folder = local_adapter("me/small")
    assert (folder / "inference.json").read_bytes() == b'{"card": 1}'
    assert "me/small: damaged, so fetched again: inference.json\n" in capsys.readouterr().out


def test_what_comes_damaged_twice_is_refused(hub, waited):
    hub.add("me/always", LORA)
    hub.faults.append(Fault("GET", "/storage/", damaged=True, times=2))
    assert refused("me/always").startswith("task.add=me/always came damaged twice. Look at this")
    assert (local_adapter("me/always") / WEIGHTS).read_bytes() == LORA[WEIGHTS]


def test_what_is_damaged_in_the_cache_later_is_found(hub, set_up, capsys, monkeypatch):
    hub.add("me/rots", LORA)
    weights = local_adapter("me/rots") / WEIGHTS
    with monkeypatch.context() as changed:
        changed.setattr(hub_digests, "hash_of_blob", lambda *_: pytest.fail("nothing has changed"))
        assert local_adapter("me/rots") == weights.parent
    weights.resolve().write_bytes(b"zeros" * 99)
    set_up(HF_HUB_OFFLINE="1")
    assert re.search(rf"me/rots: damaged in the cache .*: {WEIGHTS}. HF_HUB_", refused("me/rots"))
    set_up(HF_HUB_OFFLINE="0")
    assert (local_adapter("me/rots") / WEIGHTS).read_bytes() == LORA[WEIGHTS]
    assert f"damaged, so fetched again: {WEIGHTS}" in capsys.readouterr().out


def test_a_hub_that_fails_for_a_moment_is_asked_again(hub, waited, capsys):
    hub.add("me/moment", LORA)
    hub.faults.append(Fault("HEAD", "/resolve/", status=503, times=1))
    hub.faults.append(Fault("GET", "/api/models", status=429, headers={"Retry-After": "33"}))
    folder = local_adapter("me/moment")
    assert (folder / WEIGHTS).read_bytes() == LORA[WEIGHTS]
    assert max(waited) == 33 and "trying again in 33 s" in capsys.readouterr().out


def test_a_hub_that_goes_on_failing_is_named(hub, waited):
    hub.add("me/broken", LORA)
    hub.faults.append(Fault("GET", "/api/models", status=500, times=99))
    said = refused("me/broken")
    assert "the hub has a fault of its own (500). Files that are whole are kept. Try again" in said
    assert waited == [*hub_client.PAUSES]


def test_no_network(hub, waited, set_up):
    set_up(HF_ENDPOINT="http://127.0.0.1:9")
    said = refused("me/lora")
    assert "could not be fetched from the hub: this machine has no network, or the hub" in said
    assert waited == [], "nobody waits for a network that is not there"


def test_an_unknown_name_with_and_without_a_token(hub, set_up):
    nothing = "task.add=me/nothing is no folder here, and there is no public model of that name"
    said = refused("me/nothing")
    assert said.startswith(nothing) and "a private model needs a login: hf auth login" in said
    set_up(HF_TOKEN=OWNER)
    said = refused("me/nothing")
    assert said.startswith(nothing) and "an account that may read it: hf auth whoami" in said


def test_a_private_one_comes_with_the_owners_token(hub, set_up):
    hub.add("lab/secret", LORA, private=True)
    assert "hf auth login" in refused("lab/secret")
    set_up(HF_TOKEN=READER)
    assert "an account that may read it" in refused("lab/secret")
    set_up(HF_TOKEN=OWNER)
    assert (local_adapter("lab/secret") / WEIGHTS).is_file()


def test_a_token_that_the_hub_does_not_know(hub, set_up):
    hub.add("me/open", LORA)
    set_up(HF_TOKEN="hf_of_last_year")
    assert refused("me/open") == (
        "task.add=me/open could not be fetched: the hub refuses your token. Log in again: "
        "hf auth login (a token in HF_TOKEN comes first)"
    )


def test_a_gated_one_says_where_to_accept(hub, set_up):
    hub.add("zai/gated", LORA, accepted={"lab"})
    asks = "task.add=zai/gated is on the hub, and its authors ask you to accept its licence. Do so"
    assert refused("zai/gated") == f"{asks} on its page, then log in here: hf auth login"
    set_up(HF_TOKEN=READER)
    assert refused("zai/gated").startswith(f"{asks} on its page, with the account that is logged")
    set_up(HF_TOKEN=OWNER)
    assert (local_adapter("zai/gated") / WEIGHTS).is_file()


def test_offline_what_was_downloaded_is_there(hub, set_up):
    hub.add("me/kept", LORA)
    folder = local_adapter("me/kept")
    hub.requests.clear()
    set_up(HF_HUB_OFFLINE="1")
    assert local_adapter("me/kept") == folder
    said = refused("me/other")
    assert "me/other is no folder here and not whole in the cache (" in said
    assert "HF_HUB_OFFLINE is set: unset it for the first download" in said
    assert hub.requests == []


def test_a_full_disk(hub, monkeypatch):
    from huggingface_hub import file_download

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add("me/large", LORA)
    monkeypatch.setattr(file_download, "http_get", full)
    said = refused("me/large")
    assert re.search(r"the disk of the cache \(.*hub\) is full. Free some, or .* HF_HOME=", said)


@pytest.mark.parametrize("place", ["me/white space", "me/.", "-me/lora", "me/a--b"])
def test_what_cannot_be_a_hub_id(hub, place):
    assert f"task.add={place} is no folder here and no hub id" in refused(place)
    assert hub.requests == []


def test_a_file_of_another_name_is_found_if_it_is_the_only_one(hub):
    hub.add("me/comfy", {"comfy.safetensors": b"1", "README.md": b"a card"})
    hub.add("me/several", {"one.safetensors": b"1", "two.safetensors": b"2"})
    [found] = weight_files(local_adapter("me/comfy"))
    assert found.name == "comfy.safetensors"
    with pytest.raises(UserError, match=r"holds 2 files of weights \(one.safetensors, two"):
        weight_files(local_adapter("me/several"))


def test_a_repository_without_a_lora(hub):
    hub.add("me/model", {"transformer/model.safetensors": b"1", "README.md": b"a model"})
    assert refused("me/model").startswith("task.add=me/model holds no LoRA")


# -- the commits in a run's record -----------------------------------------------------------------


def recorded(compose, folder, *overrides):
    """The configuration in the folder, after a start with these settings."""
    record.open_folder(compose(f"output_dir='{folder}'", *overrides))
    return configuration.read(folder / "config.yaml")


@pytest.mark.parametrize("asked", ["me/pinned", "me/pinned@main"])
def test_the_commit_of_a_lora_stands_in_the_record_and_is_used_from_then_on(
    hub, compose, tmp_path, asked
):
    repo = hub.add("me/pinned", LORA)
    commit, run = repo.names["main"], tmp_path / "run"
    recorded(compose, run, f"lora.init_from={asked}")
    config = configuration.read(run / "config.yaml")
    folder = config.lora.start_file()
    record.pin_revision(run, None)
    repo.commit(LORA | {WEIGHTS: b"newer" * 1000})
    # What was used once is used again by this process, and by what starts from the record.
    assert config.lora.start_file() == folder
    hub_client.COMMITS.clear()
    [again] = {
        configuration.read(run / "config.yaml").lora.init_from,
        recorded(compose, run, f"lora.init_from={asked}").lora.init_from,
    }
    assert again == f"me/pinned@{commit}" and local_adapter(again) == folder
    assert json.loads((run / "environment.json").read_text())["hub_commits"] == {asked: commit}
    with pytest.raises(UserError, match=r"lora.init_from: me/pinned@\w+ -> me/other"):
        recorded(compose, run, "lora.init_from=me/other")


def test_commits_of_added_loras_and_of_data_sets(hub, compose, tmp_path):
    hub_client.COMMITS.update({"me/a": "1" * 40, "me/rows": "2" * 40, "me/mixed@v1": "3" * 40})
    run = tmp_path / "run"
    adds = ["task=generate", "task.prompt=x", "task.add=[me/a,/loras/b.safetensors]"]
    recorded(compose, run, *adds)
    record.pin_revision(run, "4" * 40)
    config = recorded(compose, run, *adds)
    assert config.task.add == ["me/a@" + "1" * 40, "/loras/b.safetensors"]
    assert config.model.revision == "4" * 40
    pytest.importorskip("datasets")
    rows = ["data=dataset", "data.dataset_name=me/rows"]
    recorded(compose, tmp_path / "rows", *rows)
    record.pin_revision(tmp_path / "rows", None)
    assert recorded(compose, tmp_path / "rows", *rows).data.dataset_name == "me/rows@" + "2" * 40
    mixed = [
        *("data=mix", "data.sources.one.format=dataset"),
        *("data.sources.one.dataset_name=me/mixed@v1", "data.sources.two.format=demo"),
    ]
    recorded(compose, tmp_path / "mixed", *mixed)
    record.pin_revision(tmp_path / "mixed", None)
    config = recorded(compose, tmp_path / "mixed", *mixed)
    assert config.data.by_name["one"].dataset_name == "me/mixed@" + "3" * 40


def test_a_record_without_commits_still_starts(compose, tmp_path):
    """As earlier versions wrote it."""
    config = recorded(compose, tmp_path / "run", "lora.init_from=me/lora")
    assert config.lora.init_from == "me/lora"
    assert recorded(compose, tmp_path / "run", "lora.init_from=me/lora") == config
