"""Who makes which file of the cache: the processes of a run and other runs share the work.

Every file is made once. A process that is killed leaves no claim behind.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cogvx.data.cache import Cache, claimed
from cogvx.data.video import BadClip
from cogvx.progress import PULSE, bar, counted

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

Content = TypeVar("Content")
# Clips that are read while another one is encoded. A clip of 161 frames at 768x1360 has 2 GB.
READ_AHEAD = 2


@dataclass
class Share:
    """The files of the cache that this process has to make.

    take() claims the next file. The claim is held until done(), so that no other run makes the
    same file. take() waits for another run only while nothing is claimed here: two runs that wait
    for each other would never end.
    """

    left: deque[Path]
    cache: Cache
    progress: tqdm
    wait: bool  # for files that another run has claimed
    taken: deque[Path] = field(default_factory=deque)  # claimed, not begun
    claims: dict[Path, contextlib.ExitStack] = field(default_factory=dict)
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    writing: tuple[Path, Future[None]] | None = None  # at most one file at a time
    elsewhere: list[Path] = field(default_factory=list)  # other runs make these
    reasons: dict[Path, str] = field(default_factory=dict)  # why a file cannot be made

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.shutdown()
        for claim in self.claims.values():
            claim.close()

    def take(self) -> bool:
        """Claims the next file. False if there is none."""
        while self.left:
            path, claim = self.left.popleft(), contextlib.ExitStack()
            mine = claim.enter_context(claimed(path, wait=self.wait and not self.claims))
            if mine and self.cache.about(path) is None:
                self.claims[path] = claim
                self.taken.append(path)
                return True
            claim.close()
            if mine:
                self.progress.update()
            else:
                self.elsewhere.append(path)
        return False

    def take_group(self, size: int) -> list[Path]:
        """Up to `size` claimed files."""
        while len(self.taken) < size and self.take():
            pass
        return [self.taken.popleft() for _ in range(min(size, len(self.taken)))]

    def done(self, path: Path, reason: str | None = None) -> None:
        """The file is in the cache, or there is a reason why it cannot be made."""
        if reason is not None:
            self.reasons[path] = reason
        self.claims.pop(path).close()
        self.progress.update()

    def write(
        self, path: Path, tensors: dict[str, Tensor], about: dict[str, object] | None = None
    ) -> None:
        """Writes a file that is then done, while the caller goes on with the next one.

        An error is raised when the next file is written, or at the end of read_ahead().
        """
        self.finish_writing()
        self.writing = path, self.writer.submit(self.cache.write, path, tensors, about)

    def finish_writing(self) -> None:
        if self.writing is not None:
            (path, written), self.writing = self.writing, None
            written.result()
            self.done(path)

    def read_ahead(self, read: Callable[[Path], Content]) -> Iterator[tuple[Path, Content]]:
        """Each file with what read(path) returns. The caller gives its tensors to write().

        Threads read the next READ_AHEAD files while the caller works on this one. So at most
        READ_AHEAD + 1 contents are in memory. A BadClip that read() raises is the file's reason.
        """
        reading: deque[tuple[Path, Future[Content]]] = deque()
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            try:
                self.begin(reading, pool, read)
                while reading:
                    path, content = reading.popleft()
                    bad = content.exception()  # waits until it is read
                    self.begin(reading, pool, read)
                    if isinstance(bad, BadClip):
                        self.done(path, str(bad))
                    else:
                        yield path, content.result()
                    # Without this, one more content would stay in memory.
                    del content
                self.finish_writing()
            finally:
                pool.shutdown(cancel_futures=True)

    def begin(
        self, reading: deque, pool: ThreadPoolExecutor, read: Callable[[Path], Content]
    ) -> None:
        while len(reading) < READ_AHEAD:
            group = self.take_group(1)
            if not group:
                return
            reading.append((group[0], pool.submit(read, group[0])))


def make_missing(
    paths: list[Path],
    cache: Cache,
    make: Callable[[Share], None],
    what: str,
    say: Callable[[str], None],
) -> dict[Path, str]:
    """Makes the files that the cache lacks. Returns the reasons of those that cannot be made.

    make(share) makes at least the files that are taken. The processes of this run share the work.
    So do other runs at the same time: a file that another run has started is left to it, and
    waited for at the end.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    state = PartialState()
    # All processes take the first one's list: another run may write while they look.
    [missing] = broadcast_object_list([cache.lacking(paths) if state.process_index == 0 else None])
    if state.process_index > 0:
        # What the first one has read is remembered there.
        cache.index.forget()
    for line in said_of_damage(cache, missing):
        say(line)
    lacking = set(missing)
    say(cache_state(what, len(paths), sum(path in lacking for path in paths)))
    mine, started = missing[state.process_index :: state.num_processes], time.monotonic()
    reasons, elsewhere = make_claimed(mine, cache, make, what, wait=False)
    if elsewhere:
        say(f"encode  waiting for another run to finish {counted(len(elsewhere), what)}")
    while elsewhere:
        more, elsewhere = make_claimed(elsewhere, cache, make, what, wait=True)
        reasons |= more
    with PULSE.waiting():
        reasons = dict(gather_object(list(reasons.items())))
        state.wait_for_everyone()
    if len(missing) > len(reasons):
        say(speed(len(missing) - len(reasons), what, time.monotonic() - started))
    return reasons


def said_of_damage(cache: Cache, missing: list[Path]) -> list[str]:
    damaged = [path for path in missing if path in cache.damaged]
    if not damaged:
        return []
    what = counted(len(damaged), "file of the cache is", "files of the cache are")
    first = f"{cache.name_of(damaged[0])}: {cache.damaged[damaged[0]]}"
    also = "; the first is" if len(damaged) > 1 else ":"
    return [f"warning {what} damaged, and made again{also} {first}"]


def make_claimed(
    paths: list[Path], cache: Cache, make: Callable[[Share], None], what: str, *, wait: bool
) -> tuple[dict[Path, str], list[Path]]:
    """The reasons of files that cannot be made, and the files that another run makes.

    With `wait` there are fewer of the second kind than `paths`: the first one is waited for.
    """
    with (
        bar(total=len(paths), desc=f"encode  {what}s", unit=what, leave=False) as progress,
        Share(deque(paths), cache, progress, wait) as share,
    ):
        while share.take():
            make(share)
        share.finish_writing()
    return share.reasons, share.elsewhere


def speed(made: int, what: str, seconds: float) -> str:
    per_second = made / max(seconds, 1e-3)
    rate = f"{per_second:.2f}" if per_second < 10 else f"{per_second:.0f}"
    return f"encode  {counted(made, what)} in {seconds:.1f} s: {rate} {what}s/s"


def cache_state(what: str, total: int, missing: int) -> str:
    if missing == 0:
        return f"encode  nothing: {counted(total, what)} found in the cache"
    return f"encode  {counted(missing, what)}; {total - missing} of {total} found in the cache"
