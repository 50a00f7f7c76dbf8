"""Trackers: one YAML under conf/tracking/ and one class here each. They mirror metrics.jsonl, which is the record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cogvx.errors import UserError


@dataclass
class Tracking:
    """No tracker."""

    def start(self, folder: Path, config: dict) -> None:
        """Called once, before the first log()."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers of one step."""

    def videos(self, paths: list[Path], step: int) -> None:
        """Validation videos, as encoded files."""

    def finish(self) -> None:
        """Called once, also after an error."""


@dataclass
class TensorBoard(Tracking):
    def start(self, folder: Path, config: dict) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard")
        self.writer.add_text("config", "```\n" + json.dumps(config, indent=2, default=str) + "\n```")

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


@dataclass
class Wandb(Tracking):
    project: str
    mode: str

    def problems(self) -> list[str]:
        return [] if self.mode in ("online", "offline") else [f"tracking.mode={self.mode}: must be online or offline"]

    def start(self, folder: Path, config: dict) -> None:
        import wandb

        try:
            self.run = wandb.init(project=self.project, name=folder.name, dir=folder, config=config, mode=self.mode)
        except (wandb.errors.Error, OSError) as error:
            raise UserError(
                f"tracking=wandb could not start: {error}. Log in with `wandb login`, or use tracking.mode=offline or tracking=none"
            ) from error

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def videos(self, paths: list[Path], step: int) -> None:
        import wandb

        self.run.log({path.stem: wandb.Video(str(path), format="mp4") for path in paths}, step=step)

    def finish(self) -> None:
        self.run.finish()
