"""What a run does: one YAML under conf/task/ and one class here each. run() returns the run's summary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cogvx.config import Config


@dataclass
class Task:
    def run(self, config: Config, folder: Path) -> dict:
        raise TypeError(f"{type(self).__name__} has no run()")


@dataclass
class Train(Task):
    def run(self, config: Config, folder: Path) -> dict:
        from cogvx.training.trainer import train

        return train(config, folder)


@dataclass
class Plan(Task):
    def run(self, config: Config, folder: Path) -> dict:
        from cogvx.plan.planner import plan

        return plan(config, folder)


@dataclass
class Encode(Task):
    def run(self, config: Config, folder: Path) -> dict:
        from cogvx.training.trainer import encode

        return encode(config, folder)
