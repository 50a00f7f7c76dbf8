"""A run's folder and its records: config.yaml, environment.json, summary.json.   [no torch]

A folder holds one configuration for good. Whatever runs in it, runs from its config.yaml.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import os
import platform
import re
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cogvx import config as configuration
from cogvx.config import Config
from cogvx.errors import UserError, listed
from cogvx.files import read_json, shown, write_json, write_text
from cogvx.hub_client import COMMITS
from cogvx.records.holders import wait_for_orphans

CONFIG, ENVIRONMENT, SUMMARY, LOCK = "config.yaml", "environment.json", "summary.json", ".lock"
# In environment.json: the commits of data sets and LoRAs, by their places as they were asked for.
PINNED = "hub_commits"
# What environment.json keeps of a run's earlier starts.
KEPT_OF_A_START = ("command", "started", "git_commit", "git_dirty", "python", "device")
# What a result may depend on besides the settings, and how it is called to a user.
COMPARED = {
    "git_commit": "code",
    "uncommitted": "uncommitted changes",
    "python": "Python",
    "platform": "system",
    "device": "device",
    "processes": "processes",
    "model_commit": "the model's revision",
    "model_fingerprint": "the model's files",
    "data_fingerprint": "clips and captions",
}
# An import brings no optimizer state.
HOW_TO_TRAIN_ON = (
    "lora.init_from=RUN, with a new optimizer; of a whole transformer: docs/other_trainers.md"
)
# Seconds between tries: a process that only looks whether a run is in use holds its lock too,
# for a moment.
LOCK_TRIES = (0.1, 0.2, 0.4)
CPU_DEVICE = re.compile(r"cpu, (\d+) threads?")  # how a CPU is written as a device


def open_folder(config: Config) -> Path:
    """The run's folder with its config.yaml.

    UserError if it holds another configuration, or if it cannot be written.
    """
    folder = make_folder(config)
    settle_configuration(folder, config)
    return folder


def make_folder(config: Config) -> Path:
    """The folder that the configuration names, or a new one. UserError if it cannot be made."""
    folder = Path.cwd() / "outputs" if config.output_dir is None else config.output_dir
    with said_of_folder(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return new_folder(folder) if config.output_dir is None else folder


def settle_configuration(folder: Path, config: Config) -> None:
    """Writes config.yaml, or compares it with the one that is there. The folder should be locked.

    UserError if it is another configuration, or if the folder cannot be written.
    """
    if not (folder / CONFIG).is_file():
        with said_of_folder(folder):
            write_config(folder, config)
        return
    require_same_configuration(folder, config)
    recorded = configuration.read(folder / CONFIG)
    # A set with links out of its folder may need this to go on.
    if config.data.allow_outside_root and not recorded.data.allow_outside_root:
        recorded.data.allow_outside_root = True
        write_config(folder, recorded)


@contextlib.contextmanager
def said_of_folder(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the run's folder {folder} cannot be written: {error.strerror or error}. "
            f"Choose another: output_dir=/disk/with/space"
        ) from error


def write_config(folder: Path, config: Config) -> None:
    again = f"python launch.py --config-dir {shown(folder)} --config-name config"
    header = f"# Every value of this run. The same again:  {again}\n"
    write_text(folder / CONFIG, header + configuration.to_yaml(config), durable=True)


def pin_revision(folder: Path, commit: str | None) -> None:
    """Records the commit of what came from the hub: the model, the data set, LoRAs.

    The newest revision may be another one tomorrow. What starts from this record uses the same.
    commit: the model's; it counts where no revision was asked for.
    """
    config = configuration.read(folder / CONFIG)
    before = configuration.as_dict(config)
    if commit is not None and config.model.revision is None:
        config.model.revision = commit
        note(folder, model_commit=commit)
    configuration.pin_places(config, COMMITS)
    if configuration.as_dict(config) != before:
        known = read_json(folder / ENVIRONMENT).get(PINNED, {})
        note(folder, **{PINNED: {**known, **COMMITS}})
        write_config(folder, config)


def require_same_configuration(folder: Path, config: Config) -> None:
    recorded, facts = configuration.read(folder / CONFIG), read_json(folder / ENVIRONMENT)
    pinned = recorded.model.revision == facts.get("model_commit")
    if config.model.revision is None and pinned:
        recorded.model.revision = None
    config = copy.deepcopy(config)
    configuration.pin_places(config, facts.get(PINNED, {}))
    differing = configuration.differences(config, recorded)
    if differing:
        headline = (
            f"{folder} holds a run with another configuration (recorded -> asked for). "
            f"Choose another output_dir, or give the recorded values:"
        )
        raise UserError(listed(headline, differing))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keeps other processes from running in the folder; gives the lock's file descriptor.

    The lock ends when this process and all that inherited the descriptor have ended, however
    they end. If only the latter are left, they are waited for. UserError if another process
    holds it.
    """
    with said_of_folder(folder):
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    with lock as file:
        if not take_lock(file):
            wait_for_orphans(folder / LOCK)
            if not take_lock(file):
                raise UserError(
                    f"{folder} is in use by another process ({user_of(folder)}): "
                    f"wait for it, or stop it"
                )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield file.fileno()


def take_lock(file: TextIO) -> bool:
    """False if another process has it."""
    import fcntl

    for patience in (*LOCK_TRIES, None):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if patience is not None:
                time.sleep(patience)
    return False


def user_of(folder: Path) -> str:
    """The process that locked the folder last."""
    return (folder / LOCK).read_text(encoding="utf-8").strip() or "unknown"


def is_gone(folder: Path) -> bool:
    """Whether a run's folder was removed, or moved, or its disk is gone."""
    return not (folder / CONFIG).is_file()


def require_there(folder: Path) -> None:
    """UserError if the folder of a run that goes on is gone."""
    if is_gone(folder):
        raise UserError(said_of_gone(folder))


def said_of_gone(folder: Path) -> str:
    return (
        f"the run's folder {folder} is gone: it was removed or moved while the run worked in it, "
        f"or its disk is gone. If it was moved: python launch.py train.resume=NEW_PLACE. "
        f"Otherwise type the command again, and the run starts anew: the cache is kept"
    )


def new_folder(parent: Path) -> Path:
    """A folder that no other start has."""
    while True:
        folder = parent / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(2)}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def finished(folder: Path) -> dict | None:
    """The summary of a run that is done, else None."""
    summary = read_json(folder / SUMMARY)
    return summary if summary.get("status") == "done" else None


def is_imported(folder: Path) -> bool:
    """Whether task=import made the folder: it has weights and was never trained here."""
    return "imported_form" in read_json(folder / SUMMARY)


def finish(folder: Path, summary: dict) -> None:
    write_json(folder / SUMMARY, summary, durable=True)


# -- what a result may depend on besides the settings --------------------------------------------


def environment(folder: Path, command: list[str], rerun_of: Path | None = None) -> None:
    """Records what the result may depend on besides the settings; the code's changes as a patch.

    It keeps what that was before, for drift(): when this run was last started, or in the run
    that it repeats.
    """
    patch = git("diff", "HEAD", "--binary")
    if patch:
        write_text(folder / "uncommitted.patch", patch)
    earlier = read_json(folder / ENVIRONMENT)
    before = earlier or ({} if rerun_of is None else read_json(rerun_of / ENVIRONMENT))
    starts = list(earlier.get("earlier_starts", []))
    if earlier:
        starts.append({name: earlier[name] for name in KEPT_OF_A_START if name in earlier})
    note(
        folder,
        rerun_of=None if rerun_of is None else str(rerun_of),
        before={name: before[name] for name in (*COMPARED, "packages") if name in before},
        earlier_starts=starts,
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
    """What differs from the run that this one repeats or goes on with; None if nothing does."""
    facts = read_json(folder / ENVIRONMENT)
    before = facts.get("before", {})
    found = changes(before, facts)
    if not found:
        return None
    machine_only = found == changes(only_machine(before), only_machine(facts))
    what, how = ("this machine", " slightly") if machine_only else ("this start", "")
    return f"{what} differs from the recorded run ({'; '.join(found)}); results may differ{how}"


def only_machine(facts: dict) -> dict:
    return {name: facts[name] for name in ("python", "platform", "device") if name in facts}


def changes(earlier: dict, now: dict) -> list[str]:
    """What differs in two environment.json, each as `what: earlier -> now`."""
    found = []
    for name, said in COMPARED.items():
        if name in earlier and name in now and earlier[name] != now[name]:
            found.append(change_in_words(said, earlier[name], now[name]))
    before, after = earlier.get("packages"), now.get("packages")
    if before and after:
        names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
        found += [f"{n}: {before.get(n, 'none')} -> {after.get(n, 'none')}" for n in names]
    return found


def change_in_words(name: str, earlier: object, now: object) -> str:
    cpus = [CPU_DEVICE.fullmatch(str(value)) for value in (earlier, now)]
    if name == "device" and all(cpus):
        return f"{cpus[0][1]} -> {cpus[1][1]} CPU threads"
    return f"{name}: {short_hash(earlier)} -> {short_hash(now)}"


def short_hash(value: object) -> str:
    """A commit's or fingerprint's first characters."""
    return value[:8] if isinstance(value, str) and len(value) == 40 else str(value)


def note(folder: Path, **facts: object) -> None:
    """Adds facts to environment.json."""
    write_json(folder / ENVIRONMENT, {**read_json(folder / ENVIRONMENT), **facts})


def git(*arguments: str) -> str | None:
    """What git prints about this code; None if it is not a git checkout or there is no git."""
    command = ["git", "-C", str(configuration.PROJECT), *arguments]
    settings = {"capture_output": True, "text": True, "timeout": 20, "errors": "replace"}
    try:
        ran = subprocess.run(command, **settings)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout if ran.returncode == 0 else None
