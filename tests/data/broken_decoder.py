"""A decoder process that fails at files of certain names, as real decoders do at broken files."""

import ctypes
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from cogvx.data import decoder_process, footage


def fails(path: Path) -> None:
    if "crashes" in path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "leaves" in path.name:
        os._exit(0)
    if "takes_too_much_memory" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "raises" in path.name:
        raise ValueError("a library's own words\nin two lines")
    if "hangs" in path.name:
        # As code in C does that never gives Python its turn.
        ctypes.PyDLL(None).sleep(1000)


def survey(path: Path):
    if "survey" in path.name:
        fails(path)
    return footage.survey(path)


def wanted_frames(of, wanted):
    for number, frame in enumerate(footage.wanted_frames(of, wanted)):
        if number == 1:
            fails(of.path)
        yield frame


decoder_process.survey, decoder_process.wanted_frames = survey, wanted_frames
decoder_process.serve_requests()
