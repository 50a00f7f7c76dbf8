"""The hub's own client: downloads with patience, and its errors in words.   [no torch]

A hub id has the form name/repo. name/repo@revision names a branch, a tag or a commit of it.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cogvx.errors import UserError, first_line
from cogvx.hub_digests import damaged_files, remove_download

T = TypeVar("T")

# Seconds between two attempts, when the hub or the way to it fails for a moment. The client itself
# tries a request again for up to half a minute.
PAUSES = (2, 10, 60)
# The longest pause that the hub may ask for.
LONGEST_PAUSE = 600
# What this process has used of the hub, by its place as it was asked for (name/repo or
# name/repo@revision): the commit. Asked for again, it is the same one.
COMMITS: dict[str, str] = {}


def split_revision(place: str) -> tuple[str, str | None]:
    """name/repo@revision -> name/repo and the revision; None for the newest."""
    repo, _, revision = place.partition("@")
    return repo, revision or None


def pinned(place: str, commits: dict[str, str]) -> str:
    """name/repo@commit for what came from the hub; everything else stays as it is."""
    return f"{split_revision(place)[0]}@{commits[place]}" if place in commits else place


@dataclass(frozen=True)
class OnTheHub:
    """A repository on the hub, as the user asked for it."""

    repo: str
    revision: str | None  # None: the newest
    setting: str  # where it was given: "model.path"
    instead: str  # what to type for a local one: "model.path=/models/CogVideoX-2b"
    revision_setting: str | None = None  # None: the revision stands in `setting` after an @
    kind: str = "model"  # or "dataset"

    def download(self, files: tuple[str, ...], ignored: tuple[str, ...] = ()) -> Path:
        """Its files that match a pattern, from the hub or its cache. UserError in one line."""
        from huggingface_hub import snapshot_download

        def fetch() -> Path:
            return Path(
                snapshot_download(
                    self.repo,
                    revision=self.revision,
                    repo_type=self.kind,
                    allow_patterns=list(files),
                    ignore_patterns=list(ignored) or None,
                )
            )

        try:
            folder = patiently(fetch, f"the download of {self.repo}")
            if not self.removed_damaged(folder):
                return folder
            folder = patiently(fetch, f"the download of {self.repo}")
            if not self.removed_damaged(folder):
                return folder
        except UserError:
            raise
        except Exception as error:
            raise UserError(self.why_not(error)) from error
        raise UserError(
            f"{self.setting}={self.repo} came damaged twice. Look at this machine's disk "
            f"({cache_folder()}), memory and network, then start again: what is whole is kept"
        )

    def removed_damaged(self, folder: Path) -> bool:
        """Removes and names the files whose bytes are others than the hub's. Whether there were."""
        damaged = damaged_files(folder)
        if not damaged:
            return False
        names = ", ".join(path.relative_to(folder).as_posix() for path in damaged)
        if offline():
            raise UserError(
                f"{self.setting}={self.repo}: damaged in the cache ({folder}): {names}. "
                f"HF_HUB_OFFLINE is set: unset it once, and the files are fetched again"
            )
        for path in damaged:
            remove_download(path)
        print(f"hub     {self.repo}: damaged, so fetched again: {names}", flush=True)
        return True

    def commit(self) -> str | None:
        """The newest commit of the revision. None if the hub cannot be asked now."""
        from huggingface_hub import HfApi

        if offline():
            return None

        def ask() -> str:
            return HfApi().repo_info(self.repo, revision=self.revision, repo_type=self.kind).sha

        try:
            return patiently(ask, f"a question about {self.repo}")
        except Exception as error:
            if Causes(error).never_arrived():
                return None
            raise UserError(self.why_not(error)) from error

    def require_access(self) -> None:
        """UserError if it is not there, or if this user may not read it."""
        from huggingface_hub import HfApi

        def ask() -> None:
            HfApi().repo_info(self.repo, revision=self.revision, repo_type=self.kind)
            HfApi().auth_check(self.repo, repo_type=self.kind)

        try:
            patiently(ask, f"a question about {self.repo}")
        except Exception as error:
            raise UserError(self.why_not(error)) from error

    def why_not(self, error: Exception) -> str:
        """Why it was not fetched, and what to do, in one line."""
        return f"{self.setting}={self.repo} {self.reason(error)}"

    def reason(self, error: Exception) -> str:
        from huggingface_hub import errors

        found = Causes(error)
        local = f"or give a local folder: {self.instead}"
        if found.of(errors.HFValidationError):
            return (
                f"is no folder here and no hub id: a hub id is name/repo, of letters, digits, "
                f"- _ and . ({local.removeprefix('or ')})"
            )
        if found.of(errors.RevisionNotFoundError):
            where = self.revision_setting
            given = f"{where}={self.revision}" if where else f"the revision {self.revision}"
            return f"is on the hub, but {given} is no branch, tag or commit of it"
        if found.of(errors.GatedRepoError):
            return (
                f"is on the hub, and its authors ask you to accept its licence. {how_to_accept()}"
            )
        if found.status() == 401 and token_is_refused(found):
            return (
                "could not be fetched: the hub refuses your token. Log in again: hf auth login "
                "(a token in HF_TOKEN comes first)"
            )
        if found.of(errors.RepositoryNotFoundError):
            return (
                f"is no folder here, and there is no public {self.kind} of that name on the hub. "
                f"Check the name; {what_of_private(self.kind)}; {local}"
            )
        if offline():
            return (
                f"is no folder here and not whole in the cache ({cache_folder()}), and "
                f"HF_HUB_OFFLINE is set: unset it for the first download, {local}"
            )
        if found.is_full_disk():
            return (
                f"could not be fetched: the disk of the cache ({cache_folder()}) is full. Free "
                f"some, or put the cache on another disk: HF_HOME=/another/disk. Files "
                f"that are whole are kept"
            )
        return (
            f"is no folder here and could not be fetched from the hub: {found.in_words()}. "
            f"Files that are whole are kept. Try again, {local}"
        )


# -- errors of the client ------------------------------------------------------------------------


class Causes:
    """An error of the hub's client, with the errors that led to it."""

    def __init__(self, error: BaseException):
        self.all = list(chain_of(error))

    def of(self, *kinds: type) -> bool:
        return any(isinstance(each, kinds) for each in self.all)

    def response(self):
        """The hub's answer; None if there was none."""
        answers = [getattr(each, "response", None) for each in self.all]
        return next((answer for answer in answers if answer is not None), None)

    def status(self) -> int | None:
        """The status code of the hub's answer."""
        response = self.response()
        return None if response is None else response.status_code

    def is_full_disk(self) -> bool:
        return any(
            isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT)
            for each in self.all
        )

    def never_arrived(self) -> bool:
        """Whether the hub was never reached."""
        return any(type(each).__name__ in ("ConnectError", "ConnectTimeout") for each in self.all)

    def may_pass(self) -> bool:
        """Whether it may be otherwise in a minute: the hub or the network failed for a moment."""
        status = self.status()
        if status is not None:
            return status in (408, 429) or status >= 500
        return self.never_arrived() or self.was_cut()

    def was_cut(self) -> bool:
        """Whether the connection ended in the middle."""
        # The client uses httpx or httpx2, as its version wants: both have these names.
        cut = ("RemoteProtocolError", "ReadError", "WriteError", "ReadTimeout", "WriteTimeout")
        return any(
            type(each).__name__ in cut or "Consistency check failed" in str(each)
            for each in self.all
        )

    def pause(self) -> float | None:
        """The seconds that the hub asks to wait; None if it does not say."""
        response = self.response()
        asked = "" if response is None else response.headers.get("Retry-After", "")
        return min(float(asked), LONGEST_PAUSE) if asked.isdigit() else None

    def in_words(self) -> str:
        status = self.status()
        if status == 429:
            return "the hub takes no more requests from here for a while (429)"
        if status is not None and status >= 500:
            return f"the hub has a fault of its own ({status})"
        if self.never_arrived():
            return "this machine has no network, or the hub does not answer"
        if self.was_cut():
            return "the connection was cut"
        return f"the hub's client says: {first_line(self.all[0])}"


def chain_of(error: BaseException) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def patiently(do: Callable[[], T], what: str, *, unreachable: bool = False) -> T:
    """do(), again after growing pauses while the hub or the network fails for a moment.

    `unreachable`: also while the hub cannot be reached at all.
    """
    for pause in (*PAUSES, None):
        try:
            return do()
        except Exception as error:
            found = Causes(error)
            hopeless = found.never_arrived() and not unreachable
            if pause is None or hopeless or not found.may_pass():
                raise
            pause = max(pause, found.pause() or 0)
            print(
                f"hub     {what}: {found.in_words()}; trying again in {pause:.0f} s",
                flush=True,
            )
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def token_is_refused(found: Causes) -> bool:
    return any("Invalid credentials" in str(each) for each in found.all)


def offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def cache_folder() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def how_to_accept() -> str:
    from huggingface_hub import get_token

    if get_token() is None:
        return "Do so on its page, then log in here: hf auth login"
    return (
        "Do so on its page, with the account that is logged in here (hf auth whoami; another "
        "one: hf auth login)"
    )


def what_of_private(kind: str) -> str:
    from huggingface_hub import get_token

    if get_token() is None:
        return f"a private {kind} needs a login: hf auth login"
    return f"a private {kind} needs an account that may read it: hf auth whoami"
