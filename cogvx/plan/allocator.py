"""Imitates PyTorch's CUDA caching allocator: from a log of allocations to the memory reserved.

Source: c10/cuda/CUDACachingAllocator.cpp. A request is rounded up to 512 bytes, and gets the
smallest free block that is large enough. Freed blocks are merged with free neighbours.

With its default settings (Allocator) blocks are cut from segments of 2 MiB (small requests), of
20 MiB (large ones), or of the request's own size in whole 2 MiB (from 10 MiB on). A segment stays
reserved until empty_cache(), and only if all of it is free then.

With expandable_segments:True (ExpandableAllocator), which every run sets, there is one segment for
small requests and one for large ones. They grow by pages of 2 and of 20 MiB. empty_cache() gives
back every page that is free.
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
# The addresses of an expandable segment: more than are ever used.
ADDRESSES = 2**60

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
    mapped: bool = True  # False: addresses of an expandable segment without memory behind them

    @property
    def end(self) -> int:
        return self.address + self.size


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
        if self.splits(block, size):
            self.set_free(self.cut(block, size))
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

    def splits(self, block: Block, size: int) -> bool:
        """Whether the rest of the block is kept for other requests."""
        rest = block.size - size
        return rest >= ROUNDING if block.small else rest > SMALL

    def cut(self, block: Block, size: int) -> Block:
        """The block keeps `size` bytes. Returns the rest, a new block behind it."""
        rest = Block(block.size - size, block.address + size, block.small, block, block.following)
        rest.mapped = block.mapped
        if block.following is not None:
            block.following.previous = rest
        block.following, block.size = rest, size
        return rest

    def set_free(self, block: Block) -> None:
        block.free = True
        insort(self.unused[block.small], (block.size, block.address, block))

    def free(self, key: int) -> None:
        block = self.used.pop(key, None)
        if block is None:
            return
        self.allocated -= block.size
        self.release(block)

    def release(self, block: Block) -> None:
        """Sets the block free, together with free neighbours."""
        for neighbour in (block.previous, block.following):
            if neighbour is not None and neighbour.free:
                self.take(neighbour)
                self.merge(block, neighbour)
        self.set_free(block)

    def take(self, block: Block) -> None:
        """Takes a free block out of its list."""
        candidates = self.unused[block.small]
        candidates.pop(bisect_left(candidates, (block.size, block.address)))
        block.free = False

    def merge(self, block: Block, neighbour: Block) -> None:
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


@dataclass
class ExpandableAllocator(Allocator):
    """Two segments that grow, page by page."""

    # Addresses of each segment without memory behind them, by where they begin.
    bare: dict[bool, dict[int, Block]] = field(
        default_factory=lambda: {
            small: {0: Block(ADDRESSES, 0, small, mapped=False)} for small in (True, False)
        }
    )

    def splits(self, block: Block, size: int) -> bool:
        return block.size - size >= ROUNDING

    def find(self, size: int) -> Block | None:
        """As in Allocator. A block that can grow counts with what it can grow to."""
        candidates = self.unused[size <= SMALL]
        place = bisect_left(candidates, (size, -1))
        if place == len(candidates):
            return None
        while place + 1 < len(candidates) and (
            grown(candidates[place + 1][2]) < grown(candidates[place][2])
        ):
            place += 1
        block = candidates.pop(place)[2]
        block.free = False
        return block

    def new_segment(self, size: int) -> Block:
        """Grows the segment at the lowest address where there is room."""
        block = self.room_for(size, small=size <= SMALL)
        if not block.mapped:
            self.map(block, min(block.size, size))
        while block.size < size:
            following = block.following
            self.map(following, min(following.size, size - block.size))
            block = following  # it has taken in the block before it
        self.take(block)
        return block

    def room_for(self, size: int, *, small: bool) -> Block:
        """Where `size` bytes in a row are free or have no memory behind them."""
        for _, block in sorted(self.bare[small].items(), key=lambda item: item[0]):
            start = block.previous if block.previous is not None and block.previous.free else block
            room, block = 0, start
            while block is not None and (block.free or not block.mapped):
                room, block = room + block.size, block.following
            if room >= size:
                return start
        raise AssertionError("the last addresses have room for everything")

    def map(self, block: Block, size: int) -> None:
        """Puts memory behind the block's first `size` bytes, in whole pages, and sets it free."""
        page = page_size(small=block.small)
        pages = -(-size // page) * page
        del self.bare[block.small][block.address]
        if pages < block.size:
            rest = self.cut(block, pages)
            self.bare[block.small][rest.address] = rest
        block.mapped = True
        self.reserved += pages
        self.max_reserved = max(self.max_reserved, self.reserved)
        self.release(block)

    def empty_cache(self) -> None:
        """Gives back all pages that are free."""
        for small, candidates in self.unused.items():
            page = page_size(small=small)
            for _, _, block in list(candidates):
                begin, end = -(-block.address // page) * page, block.end // page * page
                if begin < end:
                    self.unmap(block, begin, end)

    def unmap(self, block: Block, begin: int, end: int) -> None:
        """Takes the memory from these addresses, which are part of a free block."""
        self.take(block)
        if end < block.end:
            self.set_free(self.cut(block, end - block.address))
        if begin > block.address:
            rest = self.cut(block, begin - block.address)
            self.set_free(block)
            block = rest
        block.mapped = False
        self.reserved -= block.size
        for neighbour in (block.previous, block.following):
            if neighbour is not None and not neighbour.mapped:
                del self.bare[block.small][neighbour.address]
                self.merge(block, neighbour)
        self.bare[block.small][block.address] = block


def page_size(*, small: bool) -> int:
    return SMALL_SEGMENT if small else LARGE_SEGMENT


def grown(block: Block) -> int:
    """Bytes that the block has together with the addresses behind it that can be mapped."""
    following = block.following
    return block.size + (following.size if following is not None and not following.mapped else 0)


@dataclass(frozen=True)
class Peak:
    """The highest values within one phase, in bytes."""

    allocated: int
    reserved: int


def replay(events: Iterable[Event], *, expandable: bool = False) -> dict[str, Peak]:
    """The peak of each phase. A phase lasts from its ("phase", name) to the next such entry.

    A phase that comes twice gets the higher values of both. expandable: with segments that grow.
    """
    allocator = ExpandableAllocator() if expandable else Allocator()
    peaks, phase = {}, None

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
