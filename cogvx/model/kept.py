"""A block's weights into their stored form. Quantised weights are kept in the cache.

So only the first start reads all weights and quantises them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from cogvx.data.cache import Cache, claimed
from cogvx.errors import UserError
from cogvx.model import transfer
from cogvx.model.stored import StoredWeight
from cogvx.model.unread import UnreadWeights
from cogvx.options.memory import Storage
from cogvx.progress import bar

FORM_PARTS = ("data", "scale", "code")  # of a StoredWeight

# From a block's parameters to their stored forms.
Store = Callable[[list[torch.nn.Parameter]], list[StoredWeight]]


class BlockStore:
    """Brings the weights of one block after the other into their stored form.

    They are read to the device and quantised there, block by block. Weights that are streamed as
    they are never go to the device. The forms are on `place`, or on the device if they are new.
    """

    def __init__(
        self,
        unread: UnreadWeights | None,
        storage: Storage,
        device: torch.device,
        *,
        streamed: bool,
    ):
        self.unread, self.storage, self.device = unread, storage, device
        self.place = torch.device("cpu") if streamed else device
        self.disk_fails = False

    def __call__(self, parameters: list[torch.nn.Parameter]) -> list[StoredWeight]:
        kept = None if self.unread is None else self.unread.kept
        if kept is None or self.storage is Storage.own or not parameters:
            return self.made(parameters)
        names = [self.unread.name_of[parameter] for parameter in parameters]
        path = kept.path(names, parameters[0].dtype, self.storage, self.device.type)
        with claimed(path, wait=True):
            found = self.found(kept.cache, path, names, parameters)
            if found is None:
                found = self.made(parameters)
                self.keep(kept.cache, path, dict(zip(names, found, strict=True)))
        self.unread.forget(parameters)
        return found

    def made(self, parameters: list[torch.nn.Parameter]) -> list[StoredWeight]:
        device = self.place if self.storage is Storage.own else self.device
        if self.unread is not None:
            self.unread.read(parameters, device)
            self.unread.forget(parameters)
        weights = (transfer.to_device(parameter.detach(), device) for parameter in parameters)
        return [StoredWeight.store(weight, self.storage) for weight in weights]

    def found(
        self, cache: Cache, path: Path, names: list[str], parameters: list[torch.nn.Parameter]
    ) -> list[StoredWeight] | None:
        if cache.about(path) is None:
            if path in cache.damaged:
                why = cache.damaged[path]
                print(f"warning {path} is damaged, and made again: {why}", flush=True)
            return None
        with safe_open(path, framework="pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        forms = []
        for name, parameter in zip(names, parameters, strict=True):
            parts = [held.get(f"{name}.{part}") for part in FORM_PARTS]
            storage = StoredWeight.storage_of(parameter, self.storage)
            form = StoredWeight(*parts, storage, parameter.shape, parameter.dtype)
            forms.append(form.moved(lambda part: transfer.to_device(part, self.place)))
        return forms

    def keep(self, cache: Cache, path: Path, forms: dict[str, StoredWeight]) -> None:
        if self.disk_fails:
            return
        parts = {
            f"{name}.{part}": getattr(form, part)
            for name, form in forms.items()
            for part in FORM_PARTS
            if getattr(form, part) is not None
        }
        try:
            cache.save(path, parts, {})
        # The run goes on without it.
        except UserError as error:
            self.disk_fails = True
            print(f"warning quantised weights are not kept for the next start: {error}", flush=True)


@contextlib.contextmanager
def storing(
    model: torch.nn.Module, blocks: int, storage: Storage, device: torch.device, *, streamed: bool
) -> Iterator[Store]:
    """Gives what brings a block's weights into their stored form, with a progress bar."""
    store = BlockStore(getattr(model, "unread", None), storage, device, streamed=streamed)
    with bar(total=blocks, desc="load    blocks", unit="block", leave=False) as progress:

        def and_count(parameters: list[torch.nn.Parameter]) -> list[StoredWeight]:
            stored = store(parameters)
            progress.update()
            return stored

        yield and_count
