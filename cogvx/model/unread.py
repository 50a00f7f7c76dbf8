"""Weights that stay in their files until their place is known.

A 5B transformer has 10.4 GiB of weights. They are read weight by weight, each to the place where it
will be used. So the CPU's memory never holds a second copy, nor weights that the device will hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cogvx.model import transfer
from cogvx.model.stored import KeptForms
from cogvx.progress import bar

# Bytes. Reading more shows a progress bar.
LONG_TO_READ = 10**9


def without_weights(build, dtype: torch.dtype) -> torch.nn.Module:
    """The model that build() makes, in `dtype`, with parameters that take no memory.

    They are single numbers, seen as tensors of the right shape. On torch's meta device, peft would
    not initialize the adapters that it adds to them.
    """
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            model = build()
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        stand_in = torch.zeros((), dtype=dtype).expand(parameter.shape)
        # A parameter on the meta device cannot be given another device's data.
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(stand_in, requires_grad=False))
    return model.eval()


class UnreadWeights:
    """The weights of a model that are still in its files."""

    def __init__(self, model: torch.nn.Module, folder: Path, stem: str):
        """Reads the buffers. ValueError if the files do not have the model's weights.

        stem: the name of the safetensors file, without its ending and number.
        """
        self.path_of = tensor_files(folder, stem)
        self.name_of = {parameter: name for name, parameter in model.named_parameters()}
        self.unread = set(self.name_of.values())
        self.kept: KeptForms | None = None  # where quantised weights are kept
        self.require_fit(model)
        # A learned table of positions is a buffer too.
        for name, _ in list(model.named_buffers()):
            if name in self.path_of:
                owner, _, last = name.rpartition(".")
                model.get_submodule(owner)._buffers[last] = self.tensor(name).to(model.dtype)

    def require_fit(self, model: torch.nn.Module) -> None:
        expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {}
        for path in dict.fromkeys(self.path_of.values()):
            with safe_open(path, framework="pt") as file:
                found |= {n: file.get_slice(n).get_shape() for n in file.keys()}  # noqa: SIM118
        wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
        wrong += [
            f"{name} has shape {tuple(found[name])}, expected {tuple(expected[name])}"
            for name in expected.keys() & found.keys()
            if list(found[name]) != expected[name]
        ]
        if wrong:
            raise ValueError(f"its weights are another model's: {'; '.join(sorted(wrong)[:3])}")
        unused = sorted(found.keys() - expected.keys())
        if unused:
            print(f"warning {path.parent} has weights that are not used: {unused[0]}", flush=True)

    def tensor(self, name: str) -> Tensor:
        """In the CPU's memory, where its pages are the file's. They go with the tensor."""
        with safe_open(self.path_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def read(self, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> None:
        """Gives those of the parameters that are still unread their values, on the device."""
        waiting = [each for each in parameters if self.name_of.get(each) in self.unread]
        size = sum(each.numel() * each.itemsize for each in waiting)
        bars = bar(waiting, desc="load", unit="weight", leave=False, disable=size < LONG_TO_READ)
        for parameter in bars:
            name = self.name_of[parameter]
            weight = transfer.to_device(self.tensor(name), device)
            parameter.data = weight.to(parameter.dtype)
            self.unread.remove(name)

    def forget(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """The model does not need these any more, read or not."""
        for parameter in parameters:
            self.name_of.pop(parameter, None)


def tensor_files(folder: Path, stem: str) -> dict[str, Path]:
    """The file of every tensor, from the index of a model in several files, or from its one."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if paths := [file for file in names.values() if Path(file).name != file]:
            raise ValueError(f"{index.name} names {paths[0]!r}, and not a file beside it")
        return {name: folder / file for name, file in names.items()}
    path = folder / f"{stem}.safetensors"
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)


def read_weights(model: torch.nn.Module, device: torch.device) -> None:
    """Reads what is still in the model's files, to the device."""
    unread = getattr(model, "unread", None)
    if unread is not None:
        unread.read(model.parameters(), device)
