"""The kernel of attention that a run takes: the one asked for, the recorded one, or the fastest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from cogvx.config import Config
from cogvx.files import read_json
from cogvx.model import attention
from cogvx.model.attention import KernelChoice
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.sizes import largest_size
from cogvx.options.train import Attention
from cogvx.records import record
from cogvx.training.prepare import device_name
from cogvx.training.ranks import Ranks


@contextlib.contextmanager
def chosen_attention(
    config: Config,
    pretrained: PretrainedModel,
    folder: Path,
    ranks: Ranks,
    earlier: list[Path],
) -> Iterator[None]:
    """Within this context attention is computed by the kernel that train.attention says.

    auto on a GPU: the kernel that this run has recorded, or one of the runs in `earlier`; else the
    fastest, measured here. It is recorded in the folder. With train.deterministic nothing is
    measured, because the fastest may be another one next time: it is flash, where that can run.
    """
    wanted = config.train.attention
    if wanted is not Attention.auto or pretrained.device.type != "cuda":
        with attention.using(wanted):
            yield
        return
    if config.train.deterministic:
        with attention.using(Attention.flash, others=True):
            yield
        return
    # All processes take the kernel that the first one has chosen.
    said, choice = ranks.of_first(
        decide(config, pretrained, [folder, *earlier]) if ranks.logs else None
    )
    if ranks.logs:
        note_choice(folder, choice, pretrained.device)
    for line in said:
        ranks.say(line)
    with attention.using(choice.kernel, others=True):
        yield


def decide(
    config: Config, pretrained: PretrainedModel, places: list[Path]
) -> tuple[list[str], KernelChoice]:
    """The choice, and what is said about it."""
    device, said = pretrained.device, []
    for place in places:
        choice = recorded_choice(place, device)
        if choice is None:
            continue
        problem = attention.unusable(choice.kernel, device)
        if problem is None:
            return [
                f"speed   attention: {choice.kernel.name} is recorded, nothing is measured"
            ], choice
        said = [
            f"speed   attention: {choice.kernel.name} was recorded, but {problem}. "
            f"Another kernel rounds differently"
        ]
    geometry = pretrained.geometry()
    size = largest_size(config.data, geometry)
    tokens = geometry.tokens(frames=size.frames, height=size.height, width=size.width)
    shape = (config.train.train_batch_size, geometry.heads, tokens, geometry.head_dim)
    choice = attention.choose(shape, device, pretrained.dtype)
    return said + lines_about(choice, tokens), choice


def lines_about(choice: KernelChoice, tokens: int) -> list[str]:
    times = sorted(choice.milliseconds.items(), key=lambda pair: pair[1])
    found = ", ".join(f"{name} {time:.1f} ms" for name, time in times)
    lines = (
        [f"speed   attention of {tokens} tokens, forward and backward: {found}"] if times else []
    )
    return lines + [
        f"speed   attention: {name} is left out: {reason}"
        for name, reason in choice.left_out.items()
    ]


# -- the record ----------------------------------------------------------------------------------


def note_choice(folder: Path, choice: KernelChoice, device: torch.device) -> None:
    about = asdict(choice) | {"kernel": choice.kernel.name, "device": device_name(device)}
    record.note(folder, attention=about)


def recorded_choice(folder: Path, device: torch.device) -> KernelChoice | None:
    """The choice among several kernels that a run has recorded, if it was made on such a card."""
    about = read_json(folder / record.ENVIRONMENT).get("attention", {})
    if about.get("device") != device_name(device) or not about["milliseconds"]:
        return None
    kernel = Attention[about["kernel"]]
    return KernelChoice(kernel, about["milliseconds"], about["left_out"])
