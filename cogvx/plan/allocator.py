"""Imitates PyTorch's CUDA caching allocator: from a log of allocations to the memory reserved.

Source: c10/cuda/CUDACachingAllocator.cpp with its default settings. A request is rounded up to 512
bytes, and gets the smallest free block that is large enough. Blocks are cut from segments of 2 MiB
(small requests), of 20 MiB (large ones), or of the request's own size in whole 2 MiB (from 10 MiB
on). Freed blocks are merged with free neighbours. A segment stays reserved until empty_cache().
[no torch]
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

MIB, GIB = 2**20, 2**30
ROUNDING = 512
# Requests up to SMALL share small segments.
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
LARGE_SEGMENT, FROM_OWN_SEGMENT = 20 * MIB, 10 * MIB

# An entry of a log: ("allocate", key, bytes), ("free", key), ("empty_cache",) or ("phase", name).
Event = tuple


@dataclass
class Block:
    size: int
    address: int
    small: bool
    previous: Block | None = None
    following: Block | None = None
    free: bool = False


@dataclass
class Allocator:
    allocated: int = 0
    reserved: int = 0
    max_allocated: int = 0
    max_reserved: int = 0
    next_address: int = 0
    used: dict[int, Block] = field(default_factory=dict)
    unused: dict[bool, list[tuple[int, int, Block]]] = field(
        default_factory=lambda: {True: [], False: []}
    )

    def allocate(self, key: int, size: int) -> None:
        if size <= 0:
            return
        size = -(-size // ROUNDING) * ROUNDING
        block = self.find(size) or self.new_segment(size)
        rest = block.size - size
        if rest >= ROUNDING if block.small else rest > SMALL:
            self.split(block, size)
        self.used[key] = block
        self.allocated += block.size
        self.max_allocated = max(self.max_allocated, self.allocated)

    def find(self, size: int) -> Block | None:
        """Takes the smallest unused block that is large enough out of its list."""
        candidates = self.unused[size <= SMALL]
        place = bisect_left(candidates, (size, -1))
        if place == len(candidates):
            return None
        block = candidates.pop(place)[2]
        block.free = False
        return block

    def new_segment(self, size: int) -> Block:
        if size <= SMALL:
            segment = SMALL_SEGMENT
        elif size < FROM_OWN_SEGMENT:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
        block = Block(segment, self.next_address, small=size <= SMALL)
        # The gap: segments are never neighbours.
        self.next_address += segment + SMALL_SEGMENT
        self.reserved += segment
        self.max_reserved = max(self.max_reserved, self.reserved)
        return block

    def split(self, block: Block, size: int) -> None:
        rest = Block(block.size - size, block.address + size, block.small, block, block.following)
        if block.following is not None:
            block.following.previous = rest
        block.following, block.size = rest, size
        self.set_free(rest)

    def set_free(self, block: Block) -> None:
        block.free = True
        insort(self.unused[block.small], (block.size, block.address, block))

    def free(self, key: int) -> None:
        block = self.used.pop(key, None)
        if block is None:
            return
        self.allocated -= block.size
        for neighbour in (block.previous, block.following):
            if neighbour is not None and neighbour.free:
                self.merge(block, neighbour)
        self.set_free(block)

    def merge(self, block: Block, neighbour: Block) -> None:
        candidates = self.unused[neighbour.small]
        candidates.pop(bisect_left(candidates, (neighbour.size, neighbour.address)))
        block.size += neighbour.size
        if neighbour is block.previous:
            block.address, block.previous = neighbour.address, neighbour.previous
            if block.previous is not None:
                block.previous.following = block
        else:
            block.following = neighbour.following
            if block.following is not None:
                block.following.previous = block

    def empty_cache(self) -> None:
        """Gives back all segments that are empty."""
        for small, candidates in self.unused.items():
            whole = [
                entry
                for entry in candidates
                if entry[2].previous is None and entry[2].following is None
            ]
            self.reserved -= sum(size for size, _, _ in whole)
            self.unused[small] = [entry for entry in candidates if entry not in whole]


@dataclass(frozen=True)
class Peak:
    """The highest values within one phase, in bytes."""

    allocated: int
    reserved: int


def replay(events: Iterable[Event]) -> dict[str, Peak]:
    """The peak of each phase. A phase lasts from its ("phase", name) to the next such entry.

    A phase that comes twice gets the higher values of both.
    """
    allocator, peaks, phase = Allocator(), {}, None

    def close_phase() -> None:
        if phase is not None:
            before = peaks.get(phase, Peak(0, 0))
            peaks[phase] = Peak(
                max(before.allocated, allocator.max_allocated),
                max(before.reserved, allocator.max_reserved),
            )

    for kind, *details in events:
        if kind == "allocate":
            allocator.allocate(*details)
        elif kind == "free":
            allocator.free(*details)
        elif kind == "empty_cache":
            allocator.empty_cache()
        else:
            close_phase()
            [phase] = details
            allocator.max_allocated = allocator.allocated
            allocator.max_reserved = allocator.reserved
    close_phase()
    return peaks


def gib(size: float) -> float:
    return round(size / GIB, 3)
