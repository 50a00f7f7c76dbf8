"""The allocator's model against what PyTorch documents of its own."""

import itertools
import random

from cogvx.plan.allocator import MIB, Allocator, ExpandableAllocator, replay


def test_requests_are_rounded_and_share_segments():
    allocator = Allocator()
    allocator.allocate(1, 1)
    allocator.allocate(2, 513)
    assert (allocator.allocated, allocator.reserved) == (512 + 1024, 2 * MIB)
    allocator.allocate(3, 2 * MIB)
    assert allocator.reserved == (2 + 20) * MIB
    allocator.allocate(4, 11 * MIB)
    assert allocator.reserved == 22 * MIB, "cut from the 20 MiB segment"
    allocator.allocate(5, 12 * MIB + 1)
    assert allocator.reserved == (22 + 14) * MIB, "its own segment, in whole 2 MiB"


def test_freed_neighbours_are_merged_and_used_again():
    allocator = Allocator()
    for key in range(4):
        allocator.allocate(key, 5 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.free(1)
    allocator.free(2)
    allocator.allocate(9, 10 * MIB)
    assert allocator.reserved == 20 * MIB and allocator.allocated == 20 * MIB
    for key in (0, 3, 9):
        allocator.free(key)
    assert allocator.allocated == 0 and allocator.reserved == 20 * MIB
    allocator.empty_cache()
    assert allocator.reserved == 0


def test_the_smallest_block_that_suffices_is_taken():
    allocator = Allocator()
    allocator.allocate(1, 40 * MIB)
    allocator.allocate(2, 30 * MIB)
    allocator.free(1)
    allocator.free(2)
    allocator.allocate(3, 29.5 * MIB)
    assert allocator.reserved == 70 * MIB
    allocator.allocate(4, 40 * MIB)
    assert allocator.reserved == 70 * MIB, "the larger one was left for it"


def test_an_expandable_segment_grows_by_pages():
    allocator = ExpandableAllocator()
    allocator.allocate(1, 1)
    assert allocator.reserved == 2 * MIB
    allocator.allocate(2, 2 * MIB)
    assert allocator.reserved == (2 + 20) * MIB
    allocator.allocate(3, 50 * MIB)
    assert allocator.reserved == (2 + 60) * MIB, "the free 18 MiB and two pages more"
    allocator.free(2)
    allocator.allocate(4, 3 * MIB)
    assert allocator.reserved == (2 + 60) * MIB, "cut from the free 8 MiB at the end"


def test_what_is_free_in_an_expandable_segment_joins_whatever_it_was():
    """In segments of their own, four blocks of 30 MiB leave no room for one of 120."""
    for allocator, most in ((Allocator(), 240 * MIB), (ExpandableAllocator(), 120 * MIB)):
        for key in range(4):
            allocator.allocate(key, 30 * MIB)
        for key in range(4):
            allocator.free(key)
        allocator.allocate(9, 120 * MIB)
        assert allocator.reserved == most


def test_free_pages_of_an_expandable_segment_are_given_back_and_used_again():
    allocator = ExpandableAllocator()
    for key, size in enumerate((30, 50, 30)):
        allocator.allocate(key, size * MIB)
    assert allocator.reserved == 120 * MIB
    allocator.free(1)
    allocator.empty_cache()
    assert allocator.reserved == 80 * MIB, "of 30 to 80 MiB the pages 40 to 60 and 60 to 80"
    allocator.allocate(4, 50 * MIB)
    assert allocator.reserved == 120 * MIB, "the same addresses"
    for key in (0, 2, 4):
        allocator.free(key)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)


def test_an_expandable_segment_keeps_its_books():
    """Whatever comes, reserved is the mapped pages, and no two used blocks overlap."""
    allocator, chance, held = ExpandableAllocator(), random.Random(0), {}
    for number in range(4000):
        if chance.random() < 0.002:
            allocator.empty_cache()
        elif held and chance.random() < 0.5:
            key = chance.choice(list(held))
            del held[key]
            allocator.free(key)
        else:
            size = int(10 ** chance.uniform(2, 8))
            held[number] = size
            allocator.allocate(number, size)
        for small in (True, False):
            blocks = blocks_of(allocator, small)
            assert all(a.end == b.address for a, b in itertools.pairwise(blocks))
        used = [block for small in (True, False) for block in blocks_of(allocator, small)]
        assert allocator.reserved == sum(block.size for block in used if block.mapped)
    assert sorted(block.address for block in allocator.used.values() if not block.small) == sorted(
        block.address for block in blocks_of(allocator, False) if block.mapped and not block.free
    )
    assert allocator.allocated <= allocator.reserved


def blocks_of(allocator: ExpandableAllocator, small: bool) -> list:
    """All blocks of a segment, by address. Its last addresses never have memory behind them."""
    block, found = max(allocator.bare[small].values(), key=lambda block: block.address), []
    while block is not None:
        found.append(block)
        block = block.previous
    return found[::-1]


def test_each_phase_has_its_own_peak():
    first = [("allocate", 1, 30 * MIB), ("allocate", 2, 20 * MIB), ("free", 2)]
    second = [("empty_cache",), ("allocate", 3, 12 * MIB), ("free", 1), ("free", 3)]
    events = [("phase", "a"), *first, ("phase", "b"), *second]
    peaks = replay(events)
    assert (peaks["a"].allocated, peaks["a"].reserved) == (50 * MIB, 50 * MIB)
    assert (peaks["b"].allocated, peaks["b"].reserved) == (42 * MIB, 50 * MIB)
