"""Adapters from the hub."""

from __future__ import annotations

from pathlib import Path

from cogvx.errors import UserError
from cogvx.files import absolute, is_hub_id
from cogvx.hub_client import COMMITS, OnTheHub, split_revision

# Of a LoRA's repository. What lies in its folders is another thing: checkpoints, or a whole model.
ADAPTER_FILES, NOT_ADAPTERS = ("*.safetensors", "*.json"), ("*/*",)


def local_adapter(place: str, setting: str = "task.add") -> Path:
    """The local path of a LoRA that is a folder, a file, or on the hub as a hub id.

    A hub id is downloaded, once, and its commit is noted in COMMITS. `setting`: where the user gave
    it, for messages. UserError if there is no such thing.
    """
    place = str(place)
    if not is_hub_id(place):
        path = absolute(Path(place))
        if not path.exists():
            raise UserError(
                f"{setting}={place} does not exist here, and is not a hub id: give a LoRA file, "
                f"the folder of one, or name/repo (name/repo@revision) on the hub"
            )
        return path
    repo, revision = split_revision(place)
    revision = COMMITS.get(place, revision)
    asked = OnTheHub(repo, revision, setting, f"{setting}=/loras/{repo.rpartition('/')[2]}")
    folder = asked.download(ADAPTER_FILES, NOT_ADAPTERS)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{setting}={place} holds no LoRA: its repository on the hub has no *.safetensors "
            f"file beside its README"
        )
    # A snapshot is a folder with the name of its commit.
    COMMITS[place] = folder.name
    return folder
