"""Video files are read in processes of their own: a decoder that crashes or hangs costs one clip.

F frames, H height, W width, C is 3 (R, G, B).
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy

from cogvx.data.decoder_process import ENDED_IDLE, NEEDS_MEMORY
from cogvx.data.footage import BadClip, Footage

IMPORTED_FROM = str(Path(__file__).parent.parent.parent)  # the folder that holds cogvx
# -P: a file of the working folder is no module.
COMMAND = [sys.executable, "-P", "-m", "cogvx.data.decoder_process"]
# The seconds and the gigabytes of memory that reading a file may take; None: no limit.
Limits = tuple[float | None, float | None]


def surveyed(path: Path, seconds: float | None, gigabytes: float | None = None) -> Footage:
    """footage.survey() in another process. BadClip if it cannot be used, within the limits."""
    return ask("survey", path, (seconds, gigabytes), {})


def decoded_frames(
    footage: Footage, indices: list[int], seconds: float | None, gigabytes: float | None = None
) -> numpy.ndarray:
    """The frames with these numbers among those that a player shows, [F, H, W, C] uint8.

    They are read in another process. BadClip if one cannot be decoded, within the limits.
    """
    times = [footage.times[index] for index in indices]
    rows = {time: row for row, time in enumerate(sorted(set(times)))}
    frames = ask("frames", (footage, set(times)), (seconds, gigabytes), rows)
    order = [rows[time] for time in times]
    return frames if order == list(range(len(rows))) else frames[order]


def found_jumps(
    footage: Footage, threshold: float, seconds: float | None, gigabytes: float | None = None
) -> list[int]:
    """scenes.jumps() in another process. BadClip if it cannot be decoded, within the limits."""
    return ask("jumps", (footage, threshold), (seconds, gigabytes), {})


def ask(what: str, given: object, limits: Limits, rows: dict[int, int]) -> object:
    """The answer to one request. rows: for each time of a frame, its row in the array."""
    killed = 0
    while True:
        decoder = free_decoder()
        try:
            bad, found = decoder.ask(what, given, limits, rows)
        except EOFError:
            code = decoder.stop()
            was_killed = code == -signal.SIGKILL
            killed += was_killed
            # It had nothing to do for a while, and has just ended. Or someone killed it, which
            # says nothing of this clip, if it does not happen again.
            if code != ENDED_IDLE and not (was_killed and killed == 1):
                raise BadClip(how_it_ended(code, limits[0])) from None
            continue
        except BaseException:
            decoder.stop()
            raise
        finally:
            BUSY.discard(decoder)
        IDLE.append(decoder)
        if bad is not None:
            raise BadClip(bad)
        return found


def require_room(count: int, shape: tuple[int, int, int], gigabytes: float | None) -> None:
    """BadClip if so many frames, together in memory, take more."""
    if gigabytes is not None and count * math.prod(shape) > gigabytes * 2**30:
        raise BadClip(NEEDS_MEMORY)


def how_it_ended(code: int, seconds: float) -> str:
    if code == -signal.SIGALRM:
        return (
            f"was not read in {seconds:g} s: its decoder hangs, or the file is very long "
            f"(a longer time: data.decode_seconds)"
        )
    if code == -signal.SIGKILL:
        return "needs too much memory, or someone killed the process that read it"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"makes the decoder crash ({how})"


class Decoder:
    """One process that reads files."""

    def __init__(self):
        paths = [IMPORTED_FROM, os.environ.get("PYTHONPATH")]
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            # Ctrl-C is for us. It ends when we have ended.
            start_new_session=True,
        )

    def ask(
        self, what: str, given: object, limits: Limits, rows: dict[int, int]
    ) -> tuple[str | None, object]:
        """Why there is no answer, and the answer. EOFError if the process ends."""
        try:
            pickle.dump((what, given, *limits), self.process.stdin)
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self.ended() from error
        found = None
        while True:
            kind, value = self.receive()
            if kind == "bad":
                return value, None
            if kind == "done":
                return None, found
            if kind == "frame" and found is None:
                require_room(len(rows), value[1], limits[1])
            is_frame = kind == "frame"
            found = self.receive_frame(found, *value, rows) if is_frame else value

    def receive(self) -> tuple[str, object]:
        try:
            return pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self.ended() from error

    def receive_frame(
        self,
        frames: numpy.ndarray | None,
        time: int,
        shape: tuple[int, int, int],
        rows: dict[int, int],
    ) -> numpy.ndarray:
        """Puts a frame into its row of `frames`, which the first frame makes."""
        if frames is None:
            frames = numpy.empty((len(rows), *shape), numpy.uint8)
        if shape != frames.shape[1:]:
            before, now = (f"{width}x{height}" for height, width, _ in (frames.shape[1:], shape))
            raise BadClip(f"changes its size from {before} to {now}")
        frame = frames[rows[time]]
        if self.process.stdout.readinto(frame.reshape(-1).data) < frame.size:
            raise self.ended()
        return frames

    def ended(self) -> EOFError:
        # For its own exit code: stop() would kill it while it ends.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        return EOFError()

    def stop(self) -> int:
        """Its exit code."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        return self.process.wait()


def free_decoder() -> Decoder:
    """BadClip after end_decoding()."""
    try:
        decoder = IDLE.pop()
    except IndexError:
        decoder = Decoder()
    BUSY.add(decoder)
    if DECODING_ENDED.is_set():
        BUSY.discard(decoder)
        decoder.stop()
        raise BadClip("was not read: the run was asked to stop")
    return decoder


def end_decoding() -> None:
    """Threads that wait for a file go on at once, with BadClip."""
    DECODING_ENDED.set()
    for decoder in list(BUSY):
        decoder.process.kill()


def forget_decoders() -> None:
    """A forked process would share the pipes with the one before it."""
    IDLE.clear()
    BUSY.clear()


IDLE: list[Decoder] = []
BUSY: set[Decoder] = set()
DECODING_ENDED = threading.Event()
os.register_at_fork(after_in_child=forget_decoders)
