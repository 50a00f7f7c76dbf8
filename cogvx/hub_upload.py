"""Uploads to the hub, by its own client: who may write, one commit, patience.   [no torch]"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cogvx.errors import UserError
from cogvx.hub_client import Causes, offline, patiently
from cogvx.progress import counted, heartbeat

# Videos and checkpoints. The user's own files are left alone.
OF_AN_UPLOAD = re.compile(r"videos/\d+_seed\d+|step_\d{6}/")
LOG_IN = "log in with a token that may write: hf auth login"


@dataclass(frozen=True)
class Upload:
    """Where a result goes."""

    repo_id: str
    private: bool
    checkpoints: bool  # their weights too, in folders step_...
    setting: str  # where repo_id was given: "train.hub_repo_id"

    def require_writer(self) -> None:
        """UserError if nobody is logged in, or if this user may not write there.

        It asks the hub. Nothing is changed there.
        """
        from huggingface_hub import HfApi, get_token

        if offline():
            raise UserError(
                f"{self.asked} uploads, and HF_HUB_OFFLINE is set: unset it, or leave "
                f"{self.setting} null and upload later with task=export"
            )
        if get_token() is None:
            raise UserError(f"{self.asked} and nobody is logged in: {LOG_IN}")
        try:
            user = patiently(HfApi().whoami, "a question about your account")
            self.require_rights(user)
            self.require_as_private()
        except UserError:
            raise
        except Exception as error:
            raise UserError(self.why_not(error)) from error

    @property
    def asked(self) -> str:
        return f"{self.setting}={self.repo_id}"

    def require_rights(self, user: dict) -> None:
        """user: as the hub describes the account and its token."""
        owner = self.repo_id.partition("/")[0]
        names = [user["name"], *(group["name"] for group in user.get("orgs", []))]
        if owner.lower() not in [name.lower() for name in names]:
            raise UserError(
                f"{self.asked}: your account {user['name']} may not write there, only to "
                f"{', '.join(f'{name}/...' for name in names)}"
            )
        token = user.get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise UserError(f"{self.asked}: your token may only read; {LOG_IN}")

    def require_as_private(self) -> bool:
        """Whether the repository is there. UserError if it is public and must not be."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            found = patiently(lambda: HfApi().repo_info(self.repo_id), "a question about it")
        except RepositoryNotFoundError:
            return False
        if self.private and not found.private:
            raise UserError(
                f"{self.asked} is there already and is public, and {self.setting_of('private')}="
                f"true: make it private on its page, choose another name, or set "
                f"{self.setting_of('private')}=false"
            )
        return True

    def setting_of(self, name: str) -> str:
        return f"{self.setting.partition('.')[0]}.hub_{name}"

    def send(self, files: dict[str, Path | bytes], message: str) -> str:
        """Uploads the files, by their names there, in one commit; returns the commit.

        What is there already is not sent again, so a second try goes on where the first one
        stopped. UserError if it fails for good.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        size = sum(operation.upload_info.size for operation in operations)
        shown = f"{counted(len(files), 'file')}, {size / 1e6:,.1f} MB"
        print(f"upload  {shown} to {self.repo_id} on the hub", flush=True)
        api = HfApi()

        def attempt() -> str:
            if not self.require_as_private():
                api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            gone = deletions(api.list_repo_files(self.repo_id), files)
            api.preupload_lfs_files(self.repo_id, operations)
            return api.create_commit(self.repo_id, [*operations, *gone], commit_message=message).oid

        try:
            with heartbeat("upload  still sending"):
                return patiently(attempt, "the upload", unreachable=True)
        except UserError:
            raise
        except Exception as error:
            raise UserError(self.why_not(error)) from error

    def why_not(self, error: Exception) -> str:
        found = Causes(error)
        if found.status() == 401:
            first = "a token in HF_TOKEN comes first"
            return f"{self.asked}: the hub refuses your token ({first}); {LOG_IN}"
        if found.status() == 403:
            return f"{self.asked}: your account may not write there (403); {LOG_IN}"
        return f"{self.asked}: {found.in_words()}"


def deletions(there: Iterable[str], files: dict[str, Path | bytes]) -> list:
    """The videos and checkpoints of an earlier upload that this one lacks."""
    from huggingface_hub import CommitOperationDelete

    ours = [name for name in there if OF_AN_UPLOAD.match(name)]
    return [CommitOperationDelete(name) for name in ours if name not in files]


def repo_id_problems(setting: str, repo_id: str | None) -> list[str]:
    """What is wrong with the name of a repository."""
    if repo_id is None:
        return []
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        known = repo_id.count("/") == 1
    except HFValidationError:
        known = False
    if known:
        return []
    return [
        f"{setting}={repo_id}: must be name/repo, your name or your organisation's on the hub and "
        f"a name for the result, of letters, digits, - _ and ."
    ]
