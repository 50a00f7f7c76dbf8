"""Finds data races between CUDA streams without a GPU: the CPU's tensors are taken for a GPU's.

A GPU does its work later than the CPU issues it. What one stream does is in order. What two
streams do is in order only where one waits for an event of the other. So each operation has a
clock: for each stream, how much of its work is done for certain when this operation begins (a
vector clock). Two operations on one memory, of which one writes, are a race if the later one's
clock does not cover the earlier one.
"""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvx.model import transfer

HOST, COMPUTING, COPYING = "host", "computing", "copying"


class FakeEvent:
    def __init__(self, races: Races, clock: dict[str, int]):
        self.races, self.clock = races, dict(clock)

    def synchronize(self) -> None:
        join(self.races.clocks[HOST], self.clock)


class FakeStream:
    def __init__(self, races: Races, name: str):
        self.races, self.name = races, name

    def record_event(self) -> FakeEvent:
        return FakeEvent(self.races, self.races.clocks[self.name])

    def wait_event(self, event: FakeEvent) -> None:
        join(self.races.clocks[self.name], event.clock)


def join(clock: dict[str, int], other: dict[str, int]) -> None:
    for name, count in other.items():
        clock[name] = max(clock.get(name, 0), count)


class Memory:
    """The last operation that wrote it and those that read it since: each stream and count."""

    def __init__(self, storage, on_host: bool):
        self.size, self.on_host = storage.nbytes(), on_host
        self.written: tuple[str, int] | None = None
        self.read: dict[str, int] = {}


class Races(TorchDispatchMode):
    """Logs every operation inside. `found` are the races, `born` the sizes of new memories.

    The CPU's own memories are those of transfer.host_memory(), and `on_host`.
    """

    def __init__(self, monkeypatch, on_host: list[torch.Tensor] = ()):
        super().__init__()
        self.clocks = {name: {} for name in (HOST, COMPUTING, COPYING)}
        self.current, self.found, self.born = COMPUTING, [], []
        self.memories: dict[int, Memory] = {}
        self.host_memories = 0
        for tensor in on_host:
            self.remember(tensor, on_host=True)
        self.patch(monkeypatch)

    def patch(self, monkeypatch) -> None:
        races = self

        class Copies(transfer.CopyStream):
            def __init__(self, device: torch.device):
                self.device, self.stream = device, FakeStream(races, COPYING)

        real = transfer.host_memory

        def host_memory(size: int, device: torch.device) -> torch.Tensor:
            born = len(races.born)
            memory = real(size, device)
            # It has been taken for the device's.
            del races.born[born:]
            races.remember(memory, on_host=True)
            races.host_memories += 1
            return memory

        monkeypatch.setattr(transfer, "CopyStream", Copies)
        monkeypatch.setattr(transfer, "host_memory", host_memory)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: FakeStream(races, COMPUTING))
        monkeypatch.setattr(torch.cuda, "stream", self.within)

    @contextlib.contextmanager
    def within(self, stream: FakeStream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    # -- memories --------------------------------------------------------------------------------

    def remember(self, tensor: torch.Tensor, *, on_host: bool) -> Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.memories or (on_host and not self.memories[key].on_host):
            self.memories[key] = memory = Memory(storage, on_host)
            memory.alive = weakref.ref(storage, lambda _: self.freed(key))
        return self.memories[key]

    def freed(self, key: int) -> None:
        """What the computing stream does next may have this memory."""
        memory = self.memories.pop(key)
        if not memory.on_host:
            join(self.clocks[COMPUTING], self.clocks[HOST])
            self.touch(memory, COMPUTING, "free", writes=True)

    def touch(self, memory: Memory, stream: str, what: str, *, writes: bool) -> None:
        clock = self.clocks[stream]
        earlier = [memory.written] if memory.written else []
        if writes:
            earlier += memory.read.items()
        for other, count in earlier:
            if clock.get(other, 0) < count:
                self.found.append(f"{what} on {stream} with {other}, {memory.size} bytes")
        now = clock.get(stream, 0)
        if writes:
            memory.written, memory.read = (stream, now), {}
        else:
            memory.read[stream] = now

    # -- operations ------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        returns = func._schema.returns
        if any(each.alias_info and not each.alias_info.is_write for each in returns):
            return result  # a view
        operands = tensors_in((args, kwargs))
        written = {
            each.untyped_storage()._cdata
            for argument, given in arguments(func, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write
            for each in tensors_in(given)
        }
        new = [
            each
            for each in tensors_in(result)
            if each.untyped_storage()._cdata not in {o.untyped_storage()._cdata for o in operands}
        ]
        self.note(str(func), operands, written, new, blocking=is_blocking(func, args, kwargs))
        return result

    def note(self, what: str, operands, written: set[int], new, *, blocking: bool) -> None:
        used = [self.remember(each, on_host=False) for each in operands]
        hosted = bool(used) and all(memory.on_host for memory in used)
        stream = HOST if hosted else self.current
        join(self.clocks[stream], self.clocks[HOST])
        self.clocks[stream][stream] = self.clocks[stream].get(stream, 0) + 1
        for tensor, memory in zip(operands, used, strict=True):
            writes = tensor.untyped_storage()._cdata in written
            self.touch(memory, stream, what, writes=writes)
        for tensor in new:
            memory = self.remember(tensor, on_host=hosted)
            if not hosted and stream != COMPUTING:
                self.found.append(f"{what} allocates {memory.size} bytes on the copying stream")
            if not hosted:
                self.born.append(memory.size)
            self.touch(memory, stream, what, writes=True)
        if blocking and not hosted and any(memory.on_host for memory in used):
            join(self.clocks[HOST], self.clocks[stream])


def tensors_in(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def arguments(func, args, kwargs: dict) -> list[tuple]:
    """Each argument of the operation's schema that is given, and what is given."""
    by_name = {each.name: each for each in func._schema.arguments}
    by_place = zip(func._schema.arguments, args, strict=False)
    return [*by_place, *((by_name[name], given) for name, given in kwargs.items())]


def is_blocking(func, args, kwargs) -> bool:
    """Copies between the CPU and the device are, unless told otherwise."""
    if func is not torch.ops.aten.copy_.default:
        return True
    return not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
