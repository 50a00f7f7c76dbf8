"""Traces that were made before: what they found is kept in the cache.   [no torch]

A trace depends on the settings, the model's configurations, this code and the libraries it runs.
All of these are in the name of its file. It does not depend on the card.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

from cogvx.config import PROJECT, Config, as_dict, flat
from cogvx.data.cache import content_key
from cogvx.files import read_json, write_json
from cogvx.plan.configs import configs_of
from cogvx.plan.found import Outcome

LIBRARIES_TRACED = ("torch", "diffusers", "transformers", "peft", "accelerate")
# Settings that no trace depends on: places, numbers of steps, and rates. The model's configurations
# stand for its path.
NOT_TRACED = (
    *("task", "tracking", "scheduler", "seed", "output_dir", "optimizer.learning_rate"),
    *("data.cache_dir", "data.instance_data_root", "model.path", "model.revision"),
    *("train.max_train_steps", "train.num_train_epochs", "train.profile_steps"),
    "train.deterministic",
    *("train.checkpointing_steps", "train.checkpoints_total_limit", "train.logging_steps"),
)


def place(config: Config, phases: list[str], layers: int | None) -> Path:
    """The file that holds, or will hold, what tracing these phases finds."""
    settings = {
        name: value
        for name, value in flat(as_dict(config)).items()
        if name not in NOT_TRACED and name.partition(".")[0] not in NOT_TRACED
    }
    classes = {name: type(value).__name__ for name, value in vars(config).items()}
    del classes["task"], classes["tracking"], classes["scheduler"], classes["output_dir"]
    key = content_key(settings, classes, configs_of(config), phases, layers, versions())
    return config.data.cache_dir / "traces" / f"{key}.json"


@functools.cache
def versions() -> list[str]:
    """Of Python, the libraries and our own code."""
    code = hashlib.sha256()
    for path in sorted((PROJECT / "cogvx").rglob("*.py")):
        code.update(f"{path.relative_to(PROJECT)}\0".encode() + path.read_bytes())
    libraries = [metadata.version(name) for name in LIBRARIES_TRACED]
    return [platform.python_version(), *libraries, code.hexdigest()]


def recall(path: Path) -> Outcome | None:
    """None if there is no such file, or if it is damaged."""
    try:
        kept = read_json(path)
        found = kept["found"]
        return Outcome.from_json(found) if kept["check"] == content_key(found) else None
    except (OSError, KeyError, TypeError):
        return None


def keep(path: Path, outcome: Outcome) -> None:
    """Without a word if it cannot be written: then it is traced again."""
    found = outcome.to_json()
    with contextlib.suppress(OSError):
        write_json(path, {"check": content_key(found), "found": found})
