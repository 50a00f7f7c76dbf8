"""The settings of each task: one YAML in conf/task/ and one class here. start.py runs them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

from cogvx.errors import did_you_mean, lacking
from cogvx.files import absolute, is_hub_id
from cogvx.hub_upload import repo_id_problems
from cogvx.options.cards import CARDS
from cogvx.options.train import Precision


@dataclass
class Task:
    makes_a_run: ClassVar[bool] = True  # False: launch.py opens no folder for it
    needs_data: ClassVar[bool] = True  # False: it never looks at the clips
    trains: ClassVar[bool] = True  # False: no backward pass, no optimizer


@dataclass
class TrainTask(Task):
    pass


class Planned(Enum):
    """What task=plan plans."""

    train = "train"
    generate = "generate"


@dataclass
class PlanTask(Task):
    of: Planned
    run: Path | None  # a run or a checkpoint, whose record has the other settings
    card: str
    measure: bool
    needs_data: ClassVar[bool] = False

    @property
    def trains(self) -> bool:
        return self.of is Planned.train

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


class Overwrite(Enum):
    """Which captions task=caption writes anew, besides those that are missing."""

    none = "none"
    models = "models"  # those that a model wrote and nobody changed
    all = "all"


class ModelStorage(Enum):
    """How the weights of a language model are stored."""

    own = "own"
    int8 = "int8"
    nf4 = "nf4"


@dataclass
class InspectTask(Task):
    trains: ClassVar[bool] = False


@dataclass
class CaptionTask(Task):
    captioner: str  # a hub id or a folder, or a name on the server of captioner_url
    captioner_url: str | None
    frames: int
    instructions: str
    style: str | None
    examples_file: Path | None
    expander: str | None  # as captioner
    expander_url: str | None
    expander_instructions: str
    most_words: int
    overwrite: Overwrite
    batch_size: int  # clips
    storage: ModelStorage
    makes_a_run: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def make_paths_absolute(self) -> None:
        for name in ("captioner", "expander"):
            place = getattr(self, name)
            if place is not None and Path(place).expanduser().exists():
                setattr(self, name, str(absolute(Path(place))))

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.frames <= 64:
            found.append(f"task.frames={self.frames}: must be from 1 to 64")
        for name in ("most_words", "batch_size"):
            if getattr(self, name) < 1:
                found.append(f"task.{name}={getattr(self, name)}: must be 1 or more")
        for name in ("instructions", "expander_instructions"):
            if not getattr(self, name).strip():
                found.append(f"task.{name} is blank: say what the model should write")
        found += model_problems("captioner", self.captioner, self.captioner_url)
        found += model_problems("expander", self.expander, self.expander_url)
        if self.storage is not ModelStorage.own:
            found += lacking("bitsandbytes", f"task.storage={self.storage.name}")
        return found


def model_problems(name: str, model: str | None, url: str | None) -> list[str]:
    """What is wrong with task.NAME and task.NAME_url, which say where a language model is."""
    if url is not None and not url.startswith(("http://", "https://")):
        return [f"task.{name}_url={url}: must begin with http:// or https://"]
    if url is not None and model is None:
        return [f"task.{name}_url without task.{name}: give the model's name on that server"]
    if url is not None or model is None or is_hub_id(model) or Path(model).expanduser().is_dir():
        return []
    return [
        f"task.{name}={model} is no folder and no hub id (name/repo). A model behind a server, for "
        f"example Ollama: task.{name}_url=http://localhost:11434/v1"
    ]


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
    trains: ClassVar[bool] = False

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


def places_made_absolute(places: list[str]) -> list[str]:
    """Of LoRAs: a hub id stays as it is."""
    return [each if is_hub_id(each) else str(absolute(Path(each))) for each in places]


def strengths_to_add_problems(add: list[str], strengths: list[float]) -> list[str]:
    if not strengths or len(strengths) == len(add):
        return []
    return [
        f"task.add_strengths has {len(strengths)} numbers and task.add has "
        f"{len(add)} LoRAs: give one number for each; []: 1.0 for all"
    ]


@dataclass
class GenerateTask(Task):
    run: Path | None  # the folder of a run, or a checkpoint; None: the base model
    add: list[str]  # LoRAs: files, folders, runs or hub ids
    add_strengths: list[float]
    prompt: str | None
    prompt_separator: str
    prompts_file: Path | None
    held_out_clips: int
    image: Path | None  # image-to-video: the first frame, where the file of prompts names none
    video: Path | None  # video-to-video: the clip, where the file of prompts names none
    video_strength: float
    enhancer: str | None  # a hub id or a folder, or a name on the server of enhancer_url
    enhancer_url: str | None
    enhancer_instructions: str
    seeds: list[int]
    strengths: list[float]
    checkpoints: bool
    base: bool
    needs_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def make_paths_absolute(self) -> None:
        self.add = places_made_absolute(self.add)
        if self.enhancer is not None and self.enhancer_url is None:
            [self.enhancer] = places_made_absolute([self.enhancer])

    def problems(self) -> list[str]:
        found = strengths_to_add_problems(self.add, self.add_strengths)
        sources = {
            "task.prompt": self.prompt is not None,
            "task.prompts_file": self.prompts_file is not None,
            "task.held_out_clips": self.held_out_clips > 0,
        }
        given = [name for name, is_given in sources.items() if is_given]
        if len(given) > 1:
            found.append(f"{' and '.join(given)} are set together: give one of them")
        if self.held_out_clips < 0:
            found.append(f"task.held_out_clips={self.held_out_clips}: must be 0 (none) or more")
        if self.held_out_clips > 0 and self.run is None:
            found.append("task.held_out_clips is of a run: task.run=outputs/RUN")
        if not 0 < self.video_strength <= 1:
            found.append(
                f"task.video_strength={self.video_strength}: must be above 0 (the clip itself) "
                f"and at most 1 (nothing of it is left)"
            )
        found += model_problems("enhancer", self.enhancer, self.enhancer_url)
        if self.run is None and not given:
            found.append(
                "task.prompt must be given, or task.prompts_file, or task.run, whose validation "
                'prompts are then used: task.prompt="a cat on a beach"'
            )
        if not self.prompt_separator:
            found.append("task.prompt_separator is empty: the usual one is :::")
        if not self.seeds or min(self.seeds) < 0:
            found.append(f"task.seeds={self.seeds}: must be whole numbers, 0 or more: [0,1,2]")
        if any(strength < 0 for strength in self.strengths) or not self.strengths:
            found.append(
                f"task.strengths={self.strengths}: must be numbers of 0 (the base model) or more, "
                f"such as [0,0.5,1,1.5]"
            )
        return found


class Format(Enum):
    """What task=export writes. Each is explained in conf/task/export.yaml."""

    diffusers = "diffusers"
    folded = "folded"
    comfyui = "comfyui"
    comfyui_wrapper = "comfyui_wrapper"
    merged = "merged"


@dataclass
class ExportTask(Task):
    run: Path  # the folder of a run, or a checkpoint of one
    format: Format
    strength: float
    rank: int | None
    add: list[str]  # more LoRAs: runs, checkpoints, files or hub ids
    add_strengths: list[float]
    dtype: Precision | None
    to: Path | None
    hub_repo_id: str | None
    hub_private: bool
    hub_checkpoints: bool
    makes_a_run: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    def make_paths_absolute(self) -> None:
        self.add = places_made_absolute(self.add)

    def problems(self) -> list[str]:
        found = []
        if self.rank is not None and self.rank < 1:
            found.append(f"task.rank={self.rank}: must be 1 or more; null: the LoRA's own")
        if self.strength == 0:
            found.append("task.strength=0: nothing of the LoRA would be left; 1.0: as trained")
        found += repo_id_problems("task.hub_repo_id", self.hub_repo_id)
        found += strengths_to_add_problems(self.add, self.add_strengths)
        if self.rank is not None and self.format is Format.merged:
            found.append("task.rank is for a LoRA, and task.format=merged writes a whole model")
        return found

    @property
    def changes_the_lora(self) -> bool:
        """Whether the exported LoRA is another one than the one that was trained."""
        return self.strength != 1 or self.rank is not None or bool(self.add)


@dataclass
class ImportTask(Task):
    file: str  # a file, a folder or a hub id
    alpha: float | None
    makes_a_run: ClassVar[bool] = False  # it makes its folder when it knows what the file holds
    needs_data: ClassVar[bool] = False

    def make_paths_absolute(self) -> None:
        self.file = places_made_absolute([self.file])[0]

    def problems(self) -> list[str]:
        if self.alpha is None or self.alpha > 0:
            return []
        return [f"task.alpha={self.alpha:g}: must be above 0; the rank means strength 1"]


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


@dataclass
class DoctorTask(Task):
    run: Path | None  # the folder of a run, of a sweep, or one that holds runs
    runs: list[Path]
    makes_a_run: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    def problems(self) -> list[str]:
        if (self.run is None) is bool(self.runs):
            return []
        if self.runs:
            return ["task.run and task.runs are set together: give one of them"]
        return ["task.run must be given: task.run=outputs/RUN, or task.run=outputs for all runs"]


class CacheWork(Enum):
    """What task=cache does. Each is explained in conf/task/cache.yaml."""

    stats = "stats"
    verify = "verify"
    gc = "gc"


@dataclass
class CacheTask(Task):
    do: CacheWork
    folder: Path
    older_than: float | None  # days
    keep_gb: float | None
    used: bool
    yes: bool
    makes_a_run: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    def problems(self) -> list[str]:
        found = [
            f"task.{name}={value:g}: must be 0 or more"
            for name, value in (("older_than", self.older_than), ("keep_gb", self.keep_gb))
            if value is not None and value < 0
        ]
        limited = self.older_than is not None or self.keep_gb is not None
        if self.do is not CacheWork.gc and (limited or self.used or self.yes):
            found.append(
                "task.older_than, task.keep_gb, task.used and task.yes are for task.do=gc, and "
                f"this is task.do={self.do.name}"
            )
        if self.used and not limited:
            found.append(
                "task.used=true alone would remove everything: "
                "give task.older_than=DAYS or task.keep_gb=GB too"
            )
        return found
