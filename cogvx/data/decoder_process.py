"""A process that reads video files for another one, and sends it their frames.

data/decoders.py starts it: python -m cogvx.data.decoder_process. It imports no torch. Requests and
answers are pickles on its standard input and output. Behind each answer "frame" follow the bytes of
that frame.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import resource
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy

from cogvx.data.footage import BadClip, Footage, survey, wanted_frames
from cogvx.errors import first_line
from cogvx.leaving import outlast_signals

IDLE_SECONDS = 60  # without a request it ends, and its memory is free
ENDED_IDLE = 75  # its exit code then
# Of two processes, Linux kills this one first when the machine's memory runs out. At most 1000.
OOM_SCORE = "800"
NEEDS_MEMORY = (
    "needs too much memory to be read: it is damaged, or its frames are very large "
    "(more memory: data.decode_gigabytes)"
)


def serve_requests() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Whatever a library prints does not get between the answers.
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    outlast_signals()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(OOM_SCORE)
    own = own_memory()
    # The other process has ended, or has no use for the rest.
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            if not select.select([requests], [], [], IDLE_SECONDS)[0]:
                os._exit(ENDED_IDLE)
            what, given, seconds, gigabytes = pickle.load(requests)
            bound_memory(own, gigabytes)
            answer(answers, STEPS[what](given), seconds)
    os._exit(0)


def own_memory() -> int | None:
    """The bytes of memory that this process has for itself. None where the system does not say."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else None
    return None


def bound_memory(own: int | None, gigabytes: float | None) -> None:
    """A file may take so much more than `own`. None: no bound."""
    if own is None:
        return
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    bound = most if gigabytes is None else own + int(gigabytes * 2**30)
    bound = bound if most == resource.RLIM_INFINITY else min(bound, most)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, most))


def answer(answers: BinaryIO, steps: Iterator[tuple], seconds: float | None) -> None:
    """Sends what `steps` gives.

    After so many seconds of work the system ends this process by SIGALRM, wherever its code
    hangs. None: no limit.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        for kind, value, pixels in steps:
            # The other process may take its time to receive.
            left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
            send(answers, kind, value, pixels)
            signal.setitimer(signal.ITIMER_REAL, left)
        last = ("done", None)
    except BadClip as bad:
        last = ("bad", str(bad))
    except MemoryError:
        last = ("bad", NEEDS_MEMORY)
    except BrokenPipeError:
        raise
    # Of a broken file, libraries raise errors of many kinds.
    except Exception as error:
        last = ("bad", f"cannot be read: {type(error).__name__}: {first_line(error)}")
    signal.setitimer(signal.ITIMER_REAL, 0)
    send(answers, *last)


def send(answers: BinaryIO, kind: str, value: object, pixels: numpy.ndarray | None = None) -> None:
    pickle.dump((kind, value), answers)
    if pixels is not None:
        answers.write(numpy.ascontiguousarray(pixels).data)
    answers.flush()


def footage_of(path) -> Iterator[tuple]:
    yield "footage", survey(path), None


def frames_of_request(given: tuple[Footage, set[int]]) -> Iterator[tuple]:
    for time, pixels in wanted_frames(*given):
        yield "frame", (time, pixels.shape), pixels


def jumps_of_request(given: tuple[Footage, float]) -> Iterator[tuple]:
    # PySceneDetect needs as long to start as all the others together.
    from cogvx.data.scenes import jumps

    yield "jumps", list(jumps(*given)), None


STEPS = {"survey": footage_of, "frames": frames_of_request, "jumps": jumps_of_request}

if __name__ == "__main__":
    serve_requests()
