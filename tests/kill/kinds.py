"""The kinds of run that are killed: each as small as it can be, with a checkpoint every 2 steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

INTERVAL = 2  # steps between checkpoints

DATA = ["data=world", "data.clips=4", "data.height=32", "data.width=32", "data.max_num_frames=5"]
TRAIN = [
    "train.max_train_steps=6",
    f"train.checkpointing_steps={INTERVAL}",
    "train.checkpoints_total_limit=2",
    "train.logging_steps=1",
    "lora.rank=4",
    "lora.lora_alpha=2",
    "scheduler.lr_warmup_steps=2",
    "validation.heldout_steps=2",
    "validation.heldout_timesteps=2",
    "validation.num_validation_videos=0",
    "validation.scored_prompts=0",
]
FULL = ["lora=null", "optimizer.learning_rate=1e-4"]
VIDEOS = [
    "validation.num_validation_videos=1",
    "validation.num_inference_steps=2",
    "validation.validation_steps=4",
    "validation.preview=latents",
    "validation.preview_steps=3",
]
# The demo's own prompts, whose videos are scored.
SCORES = ["data=demo", "validation.scored_prompts=1", "validation.num_inference_steps=2"]


@dataclass(frozen=True)
class Kind:
    """overrides: of the command. RUN stands for a finished run, TRIAL for the trial's folder."""

    overrides: list[str]
    output: str = "run"  # the folder that the command writes, in the trial's
    more: list[str] = field(default_factory=list)  # processes that may be killed beside the first
    # The kind whose undisturbed run has the same jobs, if how this one ends depends on its speed.
    like: str | None = None
    # Whether rows of metrics.jsonl are of one step each, so that steps can be counted.
    counts_steps: bool = True

    def arguments(self, trial: Path, finished: Path) -> list[str]:
        places = [f"output_dir='{trial / self.output}'", f"data.cache_dir='{trial / 'cache'}'"]
        named = {"RUN": str(finished), "TRIAL": str(trial)}
        found = []
        for override in self.overrides:
            for word, place in named.items():
                override = override.replace(f"={word}", f"={place}")
            found.append(override)
        return [*places, *found]


RUNS = {
    "LoRA": Kind([*DATA, *TRAIN]),
    "LoRA, videos": Kind([*DATA, *TRAIN, *VIDEOS]),
    "full": Kind([*DATA, *TRAIN, *FULL]),
    "image-to-video": Kind(["model=nano_i2v", *DATA, *TRAIN, "data.image_noise_variants=2"]),
    "prodigy, average": Kind([*DATA, *TRAIN, "optimizer=prodigy", "train.ema_decay=0.9"]),
    "8-bit": Kind([*DATA, *TRAIN, "optimizer=adamw8bit", "optimizer.min_8bit_size=256"]),
    "accumulation": Kind(
        [*DATA, *TRAIN, "train.gradient_accumulation_steps=2", "train.logging_steps=3"],
        counts_steps=False,
    ),
    "memory=low": Kind([*DATA, *TRAIN, "memory=low"]),
    "memory=low_full": Kind([*DATA, *TRAIN, *FULL, "memory=low_full"]),
    "schedule-free": Kind([*DATA, *TRAIN, "optimizer=schedule_free"]),
}
TASKS = {
    "task=encode": Kind(["task=encode", *DATA]),
    "task=evaluate": Kind(
        [
            "task=evaluate",
            "task.run=RUN",
            "task.count=1",
            "validation.num_inference_steps=2",
        ],
    ),
    "task=export": Kind(
        ["task=export", "task.run=RUN", "task.format=merged", "task.to=TRIAL/export"],
        output="export",
    ),
}
SEVERAL = {
    "grid sweep": Kind(
        ["-m", *DATA, *TRAIN, "lora.rank=4,8", "hydra.launcher.jobs=2"],
        more=["job"],
    ),
    "search": Kind(
        [
            "-m",
            *DATA,
            *TRAIN,
            "hydra/sweeper=optuna",
            "lora.rank=choice(2,4,8,16)",
            "hydra.sweeper.n_trials=4",
            "hydra.sweeper.n_startup_trials=2",
            "hydra.sweeper.at_least=2",
            "hydra.sweeper.rungs=[0.3]",
            "hydra.launcher.jobs=2",
        ],
        more=["job"],
        like="grid of the search",
    ),
    "two processes": Kind(
        [*DATA, *TRAIN, "parallel=ddp", "parallel.num_processes=2"],
        more=["rank 0", "rank 1"],
    ),
}
KINDS: dict[str, Kind] = {**RUNS, **TASKS, **SEVERAL}
# Only made, to compare with.
LIKE = {"grid of the search": Kind(["-m", *DATA, *TRAIN, "lora.rank=2,4,8,16"])}
