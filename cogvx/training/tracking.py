"""metrics.jsonl is the record of a run; a tracker mirrors it."""

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


class Metrics:
    """Appends to metrics.jsonl and to the tracker. On a resume, lines after the resumed step are taken out first."""

    def __init__(self, folder: Path, tracking: Tracking, config: dict, *, resumed_at: int):
        self.path = folder / "metrics.jsonl"
        self.tracking = tracking
        kept = [line for line in read_metrics(self.path) if line["step"] <= resumed_at] if resumed_at else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        tracking.start(folder, config)

    def log(self, step: int, **values: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.tracking.log({name: value for name, value in values.items() if isinstance(value, int | float)}, step)


def read_metrics(path: Path) -> list[dict]:
    """Its whole lines; a run that was killed may have left half of one at the end."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
