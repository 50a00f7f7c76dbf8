"""The settings of each task: one YAML in conf/task/ and one class here. start.py runs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cogvx.errors import did_you_mean
from cogvx.files import absolute
from cogvx.options.cards import CARDS


@dataclass
class Task:
    makes_a_run: ClassVar[bool] = True  # False: it reads finished runs and makes no folder
    needs_data: ClassVar[bool] = True  # False: it never looks at the clips


@dataclass
class TrainTask(Task):
    pass


@dataclass
class PlanTask(Task):
    card: str
    measure: bool
    needs_data: ClassVar[bool] = False

    def problems(self) -> list[str]:
        if self.card in CARDS:
            return []
        return [
            f"task.card={self.card} is not known{did_you_mean(self.card, CARDS)} "
            f"Known cards: {', '.join(CARDS)}"
        ]


@dataclass
class EncodeTask(Task):
    pass


@dataclass
class NanoVaeTask(Task):
    steps: int
    batch: int
    crop: int
    share_of_whole_frames: float
    learning_rate: float
    max_grad_norm: float
    kl_weight: float
    bf16: bool

    def problems(self) -> list[str]:
        found = [
            f"task.{name}={getattr(self, name)}: must be 1 or more"
            for name in ("steps", "batch")
            if getattr(self, name) < 1
        ]
        if self.crop not in range(16, 65, 16):
            found.append(f"task.crop={self.crop}: must be 16, 32, 48 or 64 pixels")
        if not 0 <= self.share_of_whole_frames <= 1:
            share = self.share_of_whole_frames
            found.append(f"task.share_of_whole_frames={share}: must be from 0 to 1")
        return found


@dataclass
class EvaluateTask(Task):
    run: Path
    strengths: list[float]
    checkpoints: bool
    count: int
    prompts_file: Path | None
    other_prompts_file: Path | None
    seed: int
    clip_path: str | None  # a hub id or a folder
    vbench: list[str]

    def make_paths_absolute(self) -> None:
        if self.clip_path is not None and Path(self.clip_path).expanduser().exists():
            self.clip_path = str(absolute(Path(self.clip_path)))

    def problems(self) -> list[str]:
        found = [] if self.count >= 1 else [f"task.count={self.count}: must be 1 or more"]
        if not self.strengths or any(strength <= 0 for strength in self.strengths):
            found.append(
                f"task.strengths={self.strengths}: must be numbers above 0. "
                f"The base model (strength 0) is always judged too"
            )
        return found


@dataclass
class ReportTask(Task):
    run: Path  # the folder of a run or of a sweep
    makes_a_run: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False


@dataclass
class CompareTask(Task):
    runs: list[Path]
    page: Path | None
    makes_a_run: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    def problems(self) -> list[str]:
        if len(self.runs) > 1:
            return []
        return [f"task.runs={[*map(str, self.runs)]}: give two runs or more: [outputs/A,outputs/B]"]


@dataclass
class ListTask(Task):
    folder: Path  # whose runs and sweeps are listed
    makes_a_run: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False


@dataclass
class CleanTask(Task):
    folder: Path
    yes: bool  # removes without asking
    makes_a_run: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
