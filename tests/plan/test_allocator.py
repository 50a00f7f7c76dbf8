"""The allocator's model against what PyTorch documents of its own."""

from cogvx.plan.allocator import MIB, Allocator, replay


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


def test_each_phase_has_its_own_peak():
    first = [("allocate", 1, 30 * MIB), ("allocate", 2, 20 * MIB), ("free", 2)]
    second = [("empty_cache",), ("allocate", 3, 12 * MIB), ("free", 1), ("free", 3)]
    events = [("phase", "a"), *first, ("phase", "b"), *second]
    peaks = replay(events)
    assert (peaks["a"].allocated, peaks["a"].reserved) == (50 * MIB, 50 * MIB)
    assert (peaks["b"].allocated, peaks["b"].reserved) == (42 * MIB, 50 * MIB)
