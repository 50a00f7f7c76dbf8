"""Which runs can be compared: those whose held-out losses measure the same.   [no torch]

A run records what it is judged on (training/judging.py). Runs that are judged on unlike things form
groups, and places count within a group.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cogvx import config as configuration
from cogvx.config import Config
from cogvx.files import read_json
from cogvx.options.tasks import EvaluateTask, TrainTask
from cogvx.records import record

# What environment.json has under "judged", and how it is said that two runs differ in it.
JUDGED_PARTS = {
    "clips": "other held-out clips, or other frames or sizes of them",
    "captions": "other captions of held-out clips",
    "noise": "other timesteps, or another number of noises",
    "model": "another base model",
}
OTHER_BASE_LOSS = "another held-out loss before training, as memory.vae_tiling can give"
# Precision and storage of the weights change nano's loss before training by at most 0.6 %, the
# tiles of its VAE by 9 %.
SAME_BASE_LOSS = 0.02
# Settings that change what is judged. Others change what is trained, or how fast.
JUDGED = re.compile(
    r"data|data\..*|model|model\.(path|revision|blank)|memory\.vae_tiling|"
    r"validation\.heldout_(timesteps|draws)"
)
# Of the settings of data, those that change no held-out clip.
NOT_JUDGED = {
    *("data.cache_dir", "data.max_train_clips", "data.max_bad_fraction"),
    *("data.image_noise_variants", "data.allow_outside_root", "data.shard"),
    *("data.decode_seconds", "data.decode_gigabytes"),
    # A held-out clip has its first caption as it is written, with the id_token. Of its windows it
    # is the first one, not mirrored.
    *("data.id_token_share", "data.tag_shuffles", "data.keep_tags"),
    *("data.random_windows", "data.flip"),
}


# -- before anything runs ------------------------------------------------------------------------


def unlike_settings(configs: Iterable[Config]) -> dict[str, list[object]]:
    """The settings in which these differ so that their held-out losses measure unlike things."""
    judged = [judged_settings(each) for each in configs if is_judged(each)]
    keys = dict.fromkeys(key for own in judged for key in own)
    values = {key: [*{str(own.get(key)): own.get(key) for own in judged}.values()] for key in keys}
    return {key: found for key, found in values.items() if len(found) > 1}


def is_judged(config: Config) -> bool:
    return isinstance(config.task, TrainTask | EvaluateTask)


def judged_settings(config: Config) -> dict[str, object]:
    every = config.choices | configuration.flat(configuration.as_dict(config))
    return {
        key: value
        for key, value in every.items()
        if JUDGED.fullmatch(key) and key not in NOT_JUDGED
    }


# -- after they ran ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What a run's held-out loss is measured on, as far as its folder says."""

    parts: dict[str, str]  # earlier versions recorded the model only
    base_loss: float | None

    @classmethod
    def read(cls, folder: Path, losses: list[dict]) -> Judged:
        """losses: the lines of metrics.jsonl with a held-out loss."""
        facts = read_json(folder / record.ENVIRONMENT)
        model = facts.get("model_commit") or facts.get("model_fingerprint")
        first = next((line["heldout_loss"] for line in losses if line["step"] == 0), None)
        summed_up = read_json(folder / record.SUMMARY).get("heldout_loss_before")
        parts = facts.get("judged", {}) | ({"model": model} if model else {})
        return cls(parts, first if summed_up is None else summed_up)

    @property
    def known(self) -> int:
        return len(self.parts) + (self.base_loss is not None)

    def unlike(self, other: Judged) -> list[str]:
        """In what two runs differ; nothing if they can be compared."""
        both = [name for name in JUDGED_PARTS if name in self.parts and name in other.parts]
        found = [JUDGED_PARTS[name] for name in both if self.parts[name] != other.parts[name]]
        return found or ([] if self.has_base_loss_of(other) else [OTHER_BASE_LOSS])

    def has_base_loss_of(self, other: Judged) -> bool:
        """The loss before training, up to what precision and storage of the weights change."""
        losses = (self.base_loss, other.base_loss)
        if None in losses:
            return True
        return abs(losses[0] - losses[1]) <= SAME_BASE_LOSS * max(losses)


@dataclass(frozen=True)
class Groups:
    """Runs that can be compared with each other have one number: 1, 2, ..."""

    numbers: dict[str, int]  # by the run's name
    reasons: list[str]  # in what the groups differ from the first one

    @classmethod
    def of(cls, judged: dict[str, Judged]) -> Groups:
        """The largest group is the first."""
        members: dict[str, list[str]] = {}
        # A run of which little is known, such as one that is to come, is like any other.
        for name in sorted(judged, key=lambda name: -judged[name].known):
            like = (first for first in members if not judged[first].unlike(judged[name]))
            members.setdefault(next(like, name), []).append(name)
        firsts = sorted(members, key=lambda first: -len(members[first]))
        found = [judged[firsts[0]].unlike(judged[first]) for first in firsts[1:]]
        return cls(
            {name: n for n, first in enumerate(firsts, start=1) for name in members[first]},
            [*Counter(reason for reasons in found for reason in reasons)],
        )

    @property
    def in_words(self) -> str | None:
        """None if all runs can be compared."""
        count = len({*self.numbers.values()})
        if count < 2:
            return None
        return (
            f"Not all of these runs are comparable: the held-out loss of {count} groups of runs "
            f"measures unlike things ({'; '.join(self.reasons)}). Places count within a group"
        )
