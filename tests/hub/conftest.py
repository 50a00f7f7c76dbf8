"""A stand-in for the hub, and this process pointed at it."""

import os
import shutil

import pytest
from stand_in import StandIn, reread_environment

from cogvx.hub_client import COMMITS


@pytest.fixture(scope="module")
def server():
    """The stand-in of a file. Its tests give their repositories names of their own."""
    found = StandIn()
    yield found
    found.stop()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The stand-in, without faults. This process uses it, with an empty cache and no token."""
    server.requests.clear()
    server.ranges.clear()
    server.faults.clear()
    COMMITS.clear()
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    for name, text in server.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, text)
    reread_environment()
    yield server
    monkeypatch.undo()
    reread_environment()


@pytest.fixture
def set_up(monkeypatch):
    """set_up(HF_TOKEN="..."): as if this process had started with it."""

    def change(**variables: str) -> None:
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        reread_environment()

    return change


@pytest.fixture
def waited(monkeypatch):
    """Nobody waits. The seconds that would have been waited."""
    import time

    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture(scope="session")
def checkpoint(family_folder, tmp_path_factory):
    """A tiny model in the form of the released 5B: transformer and T5 in two files each."""
    from diffusers import CogVideoXTransformer3DModel
    from transformers import T5EncoderModel

    folder = shutil.copytree(family_folder("5b"), tmp_path_factory.mktemp("model") / "tiny")
    for part, model_class in (
        ("transformer", CogVideoXTransformer3DModel),
        ("text_encoder", T5EncoderModel),
    ):
        model = model_class.from_pretrained(folder, subfolder=part)
        size = sum(path.stat().st_size for path in (folder / part).glob("*.safetensors"))
        shutil.rmtree(folder / part)
        model.save_pretrained(folder / part, max_shard_size=int(0.7 * size))
        assert len([*(folder / part).glob("*.safetensors")]) == 2
    (folder / "README.md").write_text("a card of the model\n")
    (folder / "assets").mkdir()
    (folder / "assets" / "film.mp4").write_bytes(b"of the model's card")
    return folder
