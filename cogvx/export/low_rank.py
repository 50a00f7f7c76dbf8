"""LoRAs as matrices: added up, brought to another rank, taken from a full fine-tuning.

r: rank of a LoRA; out, in: output and input features of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cogvx.errors import UserError
from cogvx.model import lora
from cogvx.model.layers import Shape, layer_shapes, misfit_in_words
from cogvx.model.lora_file import LoraFile, read_lora
from cogvx.model.naming import ALPHA, DOWN, UP, Naming

# Of the randomized singular value decomposition: columns beyond the wanted rank, and passes over
# the matrix (Halko, Martinsson and Tropp 2011, Finding Structure with Randomness).
MORE_COLUMNS, PASSES = 16, 6


@dataclass(frozen=True)
class Update:
    """What a LoRA adds to the weight [out, in] of one layer: up @ down. The strength is in it.

    A convolution's weight [out, in, h, w] counts as a matrix [out, in * h * w].
    """

    down: Tensor  # [r, in] in fp32, or [r, in, h, w]
    up: Tensor  # [out, r] in fp32, or [out, r, 1, 1]

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def shape(self) -> Shape:
        """Of the layer's weight."""
        return (len(self.up), *self.down.shape[1:])

    def matrices(self) -> tuple[Tensor, Tensor]:
        """up [out, r] and down [r, in]."""
        return self.up.flatten(1), self.down.flatten(1)

    def delta(self) -> Tensor:
        """[out, in], or [out, in, h, w]."""
        up, down = self.matrices()
        return (up @ down).reshape(self.shape)


# A LoRA: the update of each layer, by the layer's name in the diffusers transformer.
Updates = dict[str, Update]


def read_updates(path: Path, strength: float = 1.0) -> Updates:
    """The LoRA of a file or folder, as strong as it was trained, times `strength`.

    Any naming of model/naming.py is read. A file without an alpha is taken at strength 1, as
    diffusers does, and this is said. UserError if it is no LoRA for CogVideoX, or if it is a DoRA,
    which is not the product of two matrices.
    """
    file = read_lora(path)
    if file.is_dora:
        raise UserError(
            f"{path} is a DoRA, and a DoRA is not the product of two matrices: it cannot be added "
            f"up, brought to another rank or renamed. What works, alone: task=generate "
            f"task.run=..., and task=export with task.format=diffusers or task.format=merged"
        )
    problem = file.strength_problem()
    if problem is not None:
        raise UserError(problem)
    if not file.has_alpha:
        print(f"note    {file.path} has no alpha: taken at strength 1, as diffusers does")
    return updates_of(file, strength)


def updates_of(file: LoraFile, strength: float = 1.0) -> Updates:
    """The layers of a file in fp32, with their strengths in them."""
    return {
        module: Update(layer.down.float(), layer.up.float() * (strength * file.scale_of(module)))
        for module, layer in file.layers.items()
    }


def require_fit(place: object, updates: Updates, transformer_config: dict, base: object) -> None:
    """UserError if a LoRA changes layers that the base model does not have like this.

    transformer_config: the transformer's config.json. place, base: how both are called.
    """
    shapes = {module: update.shape for module, update in updates.items()}
    problem = misfit_in_words(place, shapes, layer_shapes(transformer_config), base)
    if problem is not None:
        raise UserError(problem)


def added(adapters: list[Updates]) -> Updates:
    """Their sum, exactly: the ranks add up."""
    found: Updates = {}
    for updates in adapters:
        for module, update in updates.items():
            found[module] = (
                update if module not in found else with_more_rank(module, found[module], update)
            )
    return found


def with_more_rank(module: str, one: Update, other: Update) -> Update:
    if (one.down.shape[1:], len(one.up)) != (other.down.shape[1:], len(other.up)):
        raise UserError(
            f"these LoRAs are for different models: {module} has {list(one.down.shape[1:])} inputs "
            f"and {len(one.up)} outputs in one, {list(other.down.shape[1:])} and {len(other.up)} "
            f"in the other"
        )
    return Update(torch.cat([one.down, other.down]), torch.cat([one.up, other.up], dim=1))


def of_one_rank(updates: Updates) -> Updates:
    """Every layer at the highest rank, filled up with zeros.

    diffusers reads one rank for a whole file, and a strength for it.
    """
    rank = max(update.rank for update in updates.values())
    return {module: filled_with_zeros(update, rank) for module, update in updates.items()}


def filled_with_zeros(update: Update, rank: int) -> Update:
    missing = rank - update.rank
    if missing == 0:
        return update
    down = torch.cat([update.down, update.down.new_zeros(missing, *update.down.shape[1:])])
    up_zeros = update.up.new_zeros(len(update.up), missing, *update.up.shape[2:])
    return Update(down, torch.cat([update.up, up_zeros], dim=1))


def at_rank(update: Update, rank: int) -> tuple[Update, float, float]:
    """The nearest update of at most this rank, and the squared norm after and before.

    By a singular value decomposition (Eckart and Young 1936). Two thin QR decompositions make it
    one of an r x r matrix.
    """
    up, down = update.matrices()
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, sizes, v = torch.linalg.svd(r_up @ r_down.T)
    up, down = halves(q_up @ u, sizes, (q_down @ v.T).T, rank)
    shorter = Update(
        down.reshape(len(down), *update.down.shape[1:]),
        up.reshape(*up.shape, *update.up.shape[2:]),
    )
    return shorter, float(sizes[:rank].square().sum()), float(sizes.square().sum())


def nearest_update(delta: Tensor, rank: int) -> tuple[Update, float, float]:
    """The nearest update of this rank to a change [out, in] or [out, in, h, w] of a weight.

    And the squared norm of the update and of the change.
    """
    matrix = delta.flatten(1).float()
    rank = min(rank, *matrix.shape)
    columns = min(rank + MORE_COLUMNS, *matrix.shape)
    # It draws random columns. The same change gives the same update.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, sizes, v = torch.svd_lowrank(matrix, q=columns, niter=PASSES)
    up, down = halves(u, sizes, v.T, rank)
    ones = [1] * (delta.ndim - 2)
    update = Update(down.reshape(rank, *delta.shape[1:]), up.reshape(*up.shape, *ones))
    return update, float(sizes[:rank].square().sum()), float(matrix.square().sum())


def halves(u: Tensor, sizes: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up and down of the largest singular values. Each gets the square root of the values."""
    root = sizes[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def share_kept(pairs: Iterable[tuple[float, float]]) -> float:
    """The share of the squared norm that is kept, from pairs of kept and former norms."""
    kept, before = (sum(values) for values in zip(*pairs, strict=True))
    return kept / before if before else 1.0


# -- writing -------------------------------------------------------------------------------------


def renamed(updates: Updates, naming: Naming) -> dict[str, Tensor]:
    """Tensors by another program's names, and alpha, where alpha / r is the strength.

    The strength is in the weights already, so alpha is r.
    """
    found = {}
    for module, update in updates.items():
        found[naming.key(module, DOWN)] = update.down
        found[naming.key(module, UP)] = update.up
        found[naming.key(module, ALPHA)] = torch.tensor(float(update.rank))
    return found


def save_adapter(tensors: dict[str, Tensor], folder: Path, **settings: object) -> None:
    """Writes lora.WEIGHTS as a run delivers it. settings: peft's, such as r and lora_alpha."""
    from diffusers import CogVideoXPipeline
    from peft import LoraConfig

    CogVideoXPipeline.save_lora_weights(
        save_directory=str(folder),
        transformer_lora_layers=tensors,
        # peft makes a set of target_modules, and JSON has no sets.
        transformer_lora_adapter_metadata=LoraConfig(**settings).to_dict() | settings,
        weight_name=lora.WEIGHTS,
    )
    # safetensors writes files that only their owner can read.
    (folder / lora.WEIGHTS).chmod(folder.stat().st_mode & 0o666)
