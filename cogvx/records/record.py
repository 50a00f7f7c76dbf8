"""A run's folder and its records: config.yaml, environment.json, summary.json.   [no torch]

The folder holds one configuration for good. Whatever runs, runs from its config.yaml.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from cogvx import config as configuration
from cogvx.config import Config
from cogvx.errors import UserError, listed
from cogvx.files import read_json, shown, write_json, write_text

CONFIG, ENVIRONMENT, SUMMARY, LOCK = "config.yaml", "environment.json", "summary.json", ".lock"
STARTS = (
    "command",
    "started",
    "git_commit",
    "git_dirty",
    "python",
    "device",
)  # what is kept of a start when the run is resumed
COMPARED = (
    "git_commit", "uncommitted", "python", "platform", "device", "processes", "model_commit", "model_fingerprint", "data_fingerprint",
)  # fmt: skip
NAMED = {"git_commit": "code", "uncommitted": "uncommitted changes", "model_commit": "the model's revision", "model_fingerprint": "the model's files", "data_fingerprint": "clips and captions"}  # fmt: skip
LOCK_TRIES = (
    0.1,
    0.2,
    0.4,
)  # seconds to wait: who only looks whether a run is in use holds its lock for a moment too


def open_folder(config: Config) -> Path:
    """The run's folder with its config.yaml in it, new or holding the same configuration. UserError otherwise."""
    folder = Path.cwd() / "outputs" if config.output_dir is None else config.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder = new_folder(folder) if config.output_dir is None else folder
        recorded = folder / CONFIG
        if recorded.is_file():
            differing = configuration.differences(config, configuration.read(recorded))
            if differing:
                headline = f"{folder} holds a run with another configuration (recorded -> asked for). Choose another output_dir, or give the recorded values:"
                raise UserError(listed(headline, differing))
        else:
            header = f"# Every value of this run. The same again:  python launch.py --config-dir {shown(folder)} --config-name config\n"
            write_text(recorded, header + configuration.to_yaml(config))
    except OSError as error:
        raise UserError(
            f"the run's folder {folder} cannot be written: {error.strerror or error}. Choose another: output_dir=/disk/with/space"
        ) from error
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keeps other processes from running in the folder at the same time. The lock ends with this process, however it ends, and
    with those that are given its descriptor."""
    import fcntl

    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        for patience in (*LOCK_TRIES, None):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if patience is None:
                    raise UserError(
                        f"{folder} is in use by another process ({user_of(folder)}): wait for it, or stop it"
                    ) from error
                time.sleep(patience)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield file.fileno()


def user_of(folder: Path) -> str:
    """Who locked it last."""
    return (folder / LOCK).read_text(encoding="utf-8").strip() or "unknown"


def new_folder(place: Path) -> Path:
    """Made here, so that no other start has it."""
    while True:
        folder = place / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(2)}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def finished(folder: Path) -> dict | None:
    """The summary of a run that is done, else None."""
    summary = read_json(folder / SUMMARY)
    return summary if summary.get("status") == "done" else None


def finish(folder: Path, summary: dict) -> None:
    write_json(folder / SUMMARY, summary)


def environment(folder: Path, command: list[str], rerun_of: Path | None = None) -> None:
    """Records what the result may depend on besides the configuration, and the code's uncommitted changes as a patch; and what that
    was when the run was started before, or in the run that it repeats, for drift()."""
    patch = git("diff", "HEAD", "--binary")
    if patch:
        write_text(folder / "uncommitted.patch", patch)
    earlier = read_json(folder / ENVIRONMENT)
    before = earlier or ({} if rerun_of is None else read_json(rerun_of / ENVIRONMENT))
    note(
        folder,
        rerun_of=None if rerun_of is None else str(rerun_of),
        before={name: before[name] for name in (*COMPARED, "packages") if name in before},
        earlier_starts=[
            *earlier.get("earlier_starts", []),
            {n: earlier[n] for n in STARTS if n in earlier},
        ]
        if earlier
        else [],
        command=command,
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        git_commit=(git("rev-parse", "HEAD") or "").strip() or None,
        git_dirty=bool(git("status", "--porcelain")),
        uncommitted=hashlib.sha1(patch.encode(errors="replace")).hexdigest() if patch else None,
        python=platform.python_version(),
        platform=platform.platform(),
        cpus=os.cpu_count(),
        packages=dict(sorted((d.name, d.version) for d in importlib.metadata.distributions())),
    )


def drift(folder: Path) -> str | None:
    """What is not as it was when this run, or the one that it repeats, was started before."""
    facts = read_json(folder / ENVIRONMENT)
    found = changes(facts.get("before", {}), facts)
    before = (
        "when this run was last started"
        if facts.get("rerun_of") is None
        else f"in {facts['rerun_of']}"
    )
    return f"not as it was {before}: {'; '.join(found)}" if found else None


def changes(earlier: dict, now: dict) -> list[str]:
    """What a result may depend on and is not the same in two environment.json, as `what: earlier -> now`."""
    found = [
        f"{NAMED.get(name, name)}: {brief(earlier[name])} -> {brief(now[name])}"
        for name in COMPARED
        if name in earlier and name in now and earlier[name] != now[name]
    ]
    before, after = earlier.get("packages"), now.get("packages")
    if before and after:
        packages = [
            name for name in sorted({*before, *after}) if before.get(name) != after.get(name)
        ]
        found += [
            f"{name}: {before.get(name, 'none')} -> {after.get(name, 'none')}" for name in packages
        ]
    return found


def brief(value: object) -> str:
    """A commit's or fingerprint's first characters."""
    return value[:8] if isinstance(value, str) and len(value) == 40 else str(value)


def note(folder: Path, **facts: object) -> None:
    """Adds facts to environment.json."""
    write_json(folder / ENVIRONMENT, {**read_json(folder / ENVIRONMENT), **facts})


def git(*arguments: str) -> str | None:
    """What git says of this code; None when it is not a git checkout or there is no git."""
    try:
        ran = subprocess.run(
            ["git", "-C", str(configuration.PROJECT), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout if ran.returncode == 0 else None
