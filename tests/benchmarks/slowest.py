"""The slowest tests, as a table.

python tests/benchmarks/slowest.py                      the whole suite in one process
python tests/benchmarks/slowest.py -m "not slow"        arguments of pytest may follow

Two figures for each test: seconds, and processor seconds of pytest and of what it started and
waited for. The second is the same on a busy machine, nearly. It lacks the jobs of a sweep, which
are no children of pytest. A fixture counts for the first test that needs it.
"""

from __future__ import annotations

import resource
import sys
import time

import pytest

SHOWN = 20


def processor_seconds() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


class Clock:
    """A plugin of pytest."""

    def __init__(self):
        self.taken: list[tuple[float, float, str]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        started, used = time.monotonic(), processor_seconds()
        result = yield
        seconds = time.monotonic() - started
        self.taken.append((seconds, processor_seconds() - used, item.nodeid))
        return result


def main() -> int:
    clock = Clock()
    code = pytest.main(["-n0", "-q", "--durations=0", *sys.argv[1:]], plugins=[clock])
    total, used = (sum(column) for column in list(zip(*clock.taken, strict=True))[:2])
    print(f"\n{len(clock.taken)} tests: {total:.0f} s, {used:.0f} processor seconds\n")
    print("| seconds | processor seconds | test |\n|---|---|---|")
    for seconds, processor, name in sorted(clock.taken, reverse=True)[:SHOWN]:
        print(f"| {seconds:.1f} | {processor:.1f} | {name.removeprefix('tests/')} |")
    return code


if __name__ == "__main__":
    sys.exit(main())
