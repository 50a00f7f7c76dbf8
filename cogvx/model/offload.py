"""Frozen weights in a stored form, or on the CPU, until their block runs."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterable, Iterator
from enum import Enum

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from cogvx.model import transfer
from cogvx.model.kept import Store
from cogvx.model.stored import StoredWeight


class Pass(Enum):
    """What runs, and so which block comes next."""

    forward = "forward"  # and no backward pass after it
    forward_of_training = "forward of training"
    backward = "backward"


class WeightOffloader:
    """Holds the frozen weights of all blocks. A block has its weights only while it runs.

    streamed: the weights are stored on the CPU, and copied to the device while the block before
    runs.
    """

    def __init__(
        self,
        blocks: Iterable[torch.nn.Module],
        store: Store,
        device: torch.device,
        *,
        streamed: bool,
    ):
        """store() is called for one block after the other."""
        self.device, self.streamed = device, streamed
        self.running = Pass.forward
        # For each block the module and name of every frozen weight, the weights, and the empty
        # parameters that stand for them while the block does not run.
        self.places = [frozen_places(block) for block in blocks]
        self.stored: list[list[StoredWeight]] = []
        self.placeholders: list[list[torch.nn.Parameter]] = []
        self.slots = WeightSlots(device) if streamed else None
        self.index = {block: index for index, block in enumerate(blocks)}
        for index, block in enumerate(blocks):
            self.take_away(index, store)
            block.register_forward_pre_hook(functools.partial(self.before, index))
            block.register_forward_hook(functools.partial(self.after, index), always_call=True)

    def take_away(self, index: int, store: Store) -> None:
        """Stores a block's weights. The modules keep empty parameters in their place."""
        weights = store([owner._parameters[name] for owner, name in self.places[index]])
        if self.slots is None:
            move = functools.partial(transfer.to_device, device=self.device)
            self.stored.append([weight.moved(move) for weight in weights])
        else:
            self.stored.append(self.slots.add(weights))
        self.placeholders.append([self.placeholder(weight) for weight in weights])
        self.put(index, self.placeholders[index])

    def placeholder(self, weight: StoredWeight) -> torch.nn.Parameter:
        empty = torch.empty(0, dtype=weight.dtype, device=self.device)
        return torch.nn.Parameter(empty, requires_grad=False)

    def put(self, index: int, weights: Iterable[Tensor]) -> None:
        for (owner, name), weight in zip(self.places[index], weights, strict=True):
            owner._parameters[name] = weight

    def before(self, index: int, block: torch.nn.Module, inputs: tuple) -> None:
        weights = self.stored[index]
        if self.slots is not None:
            weights = self.slots.take(index, self.running)
        self.put(index, (weight.restored() for weight in weights))

    def after(self, index: int, block: torch.nn.Module, inputs: tuple, outputs: object) -> None:
        """outputs: None if the block has failed."""
        self.put(index, self.placeholders[index])
        # A graph keeps the weights for its backward pass; finished() comes after that.
        if self.slots is not None and not has_graph(outputs):
            self.slots.done(index)

    @contextlib.contextmanager
    def during(self, running: Pass) -> Iterator[None]:
        before, self.running = self.running, running
        try:
            yield
        finally:
            self.running = before

    def finished(self, block: torch.nn.Module) -> None:
        """The block's backward pass is issued: nothing needs its weights any more."""
        if self.slots is not None:
            self.slots.done(self.index[block])

    def move(self, move: Callable[[Tensor], Tensor]) -> None:
        for weights in self.stored:
            weights[:] = [weight.moved(move) for weight in weights]


def frozen_places(block: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """The module and name of every frozen weight."""
    return [
        (owner, name)
        for owner in block.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and not parameter.requires_grad
    ]


def has_graph(outputs: object) -> bool:
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    return any(isinstance(each, Tensor) and each.requires_grad for each in tensors)


# -- streaming -----------------------------------------------------------------------------------


class WeightSlot:
    """Memory of the device for the weights of one block."""

    def __init__(self, size: int, device: torch.device, free: torch.cuda.Event | None):
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: int | None = None  # whose weights are here
        self.filled: torch.cuda.Event | None = None  # they have arrived
        self.free = free  # what was issued with the weights before is done
        self.users = 0  # runs of the block that still need its weights
        # The weights in it, by layout. Most blocks have the same.
        self.views: dict[tuple, list[StoredWeight]] = {}

    def weights(self, like: list[StoredWeight]) -> list[StoredWeight]:
        layout = tuple((weight.storage, weight.shape, weight.dtype) for weight in like)
        if layout not in self.views:
            self.views[layout] = weights_in(self.memory, like)
        return self.views[layout]


class WeightSlots:
    """The weights of all blocks on the CPU, and two slots on the device that they go through.

    The CPU issues work long before the device does it. So a copy into a slot waits, on the device,
    until the block that had the slot is computed, and a block waits until its slot is filled.
    Nothing is allocated per block, however far the CPU is ahead.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.copies = transfer.CopyStream(device)
        self.stored: list[list[StoredWeight]] = []
        # One memory per block, which `stored` lies in.
        self.memories: list[Tensor] = []
        self.slots: list[WeightSlot] = []

    def add(self, weights: list[StoredWeight]) -> list[StoredWeight]:
        """Copies the next block's weights to the CPU's memory, and returns them there."""
        parts = stored_parts(weights)
        memory = transfer.host_memory(transfer.packed_size(parts), self.device)
        for place, part in zip(transfer.packed_views(memory, parts), parts, strict=True):
            place.copy_(part)
        self.memories.append(memory)
        self.stored.append(weights_in(memory, weights))
        return self.stored[-1]

    def take(self, index: int, running: Pass) -> list[StoredWeight]:
        """The block's weights on the device. Starts copying those of the block that comes next.

        They stay there until done() has been called as often as this.
        """
        if not self.slots:
            self.allocate()
        slot = self.slot_of(index) or self.fill(index)
        slot.users += 1
        self.copies.wait(slot.filled)
        upcoming = self.upcoming(index, running)
        if self.slot_of(upcoming) is None and self.idle_slots():
            self.fill(upcoming)
        return slot.weights(self.stored[index])

    def done(self, index: int) -> None:
        """One user of the block's weights has issued all its work."""
        slot = self.slot_of(index)
        # None: take() has failed.
        if slot is not None:
            slot.users -= 1
            slot.free = self.copies.mark()

    def upcoming(self, index: int, running: Pass) -> int:
        last = len(self.stored) - 1
        if running is Pass.backward:
            # After block 0 comes the next forward pass, with blocks 0 and 1.
            return min(abs(index - 1), last)
        if index < last:
            return index + 1
        # The backward pass begins with the blocks that are in the slots.
        return max(last - 1, 0) if running is Pass.forward_of_training else 0

    def slot_of(self, index: int) -> WeightSlot | None:
        return next((slot for slot in self.slots if slot.block == index), None)

    def idle_slots(self) -> list[WeightSlot]:
        return [slot for slot in self.slots if slot.users == 0]

    def fill(self, index: int) -> WeightSlot:
        idle = self.idle_slots()
        if not idle:
            raise RuntimeError(
                f"no room for the weights of block {index}: two blocks keep theirs for the "
                f"backward pass. memory.stream_weights needs memory.gradient_checkpointing=true"
            )
        slot, source = idle[0], self.memories[index]
        target = slot.memory[: source.numel()]
        # slot.free: the block before may not be computed yet.
        slot.filled = self.copies.copy([(target, source)], after=slot.free)
        slot.block = index
        return slot

    def allocate(self) -> None:
        size = max(memory.numel() for memory in self.memories)
        # mark() comes after both slots are there: their memory may have been used before, by work
        # that is issued but not done.
        self.slots = [WeightSlot(size, self.device, None) for _ in range(2)]
        for slot in self.slots:
            slot.free = self.copies.mark()

    def give_back(self) -> None:
        """Frees the slots, until a block runs again."""
        # Otherwise their memory could be used anew while a copy still writes into it.
        for slot in self.slots:
            self.copies.wait(slot.filled)
        self.slots = []


def stored_parts(weights: list[StoredWeight]) -> list[Tensor]:
    """In the order in which StoredWeight.moved() goes through them."""
    parts = (part for weight in weights for part in (weight.data, weight.scale, weight.code))
    return [part for part in parts if part is not None]


def weights_in(memory: Tensor, like: list[StoredWeight]) -> list[StoredWeight]:
    """The same weights in another memory, which theirs is copied to."""
    views = iter(transfer.packed_views(memory, stored_parts(like)))
    return [weight.moved(lambda _: next(views)) for weight in like]


@contextlib.contextmanager
def offloaded(transformer: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Within this context, the frozen weights that are on the device are on the CPU."""
    offloader = getattr(transformer, "offloader", None)
    stored = offloader is not None and offloader.slots is None
    if stored:
        offloader.move(transfer.to_cpu)
    elif offloader is not None:
        offloader.slots.give_back()
    back = functools.partial(transfer.to_device, device=device)
    # An offloader's empty parameters stay.
    places = [
        (owner, name)
        for owner, name in frozen_places(transformer)
        if owner._parameters[name].numel() > 0
    ]
    move_parameters(places, transfer.to_cpu)
    try:
        yield
    except BaseException as error:
        # What the failed work still has in memory takes the place of the weights.
        traceback.clear_frames(error.__traceback__)
        clear_device_cache()
        raise
    finally:
        move_parameters(places, back)
        if stored:
            offloader.move(back)


def let_go(transformer: torch.nn.Module) -> None:
    """Frees the weights of a transformer that does not run any more, whoever refers to it."""
    offloader = getattr(transformer, "offloader", None)
    if offloader is not None:
        offloader.stored.clear()
        if offloader.slots is not None:
            offloader.slots.give_back()
            offloader.slots.stored.clear()
            offloader.slots.memories.clear()
    transformer.to("meta")


def move_parameters(
    places: list[tuple[torch.nn.Module, str]], move: Callable[[Tensor], Tensor]
) -> None:
    for owner, name in places:
        moved = move(owner._parameters[name].detach())
        owner._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
