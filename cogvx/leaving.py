"""Ends a process at once when its work is done.

Python takes two or three seconds to take apart what torch and diffusers have put into its memory.
Nothing needs that: the operating system frees it in milliseconds. So the last hook that runs at
exit ends the process. Hooks run in reverse order. Import this file before all others.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

codes: list[int] = []


def leave(code: int) -> NoReturn:
    """sys.exit(code): threads are waited for, hooks run, and then the process is gone."""
    codes.append(code)
    sys.exit(code)


@atexit.register
def end_at_once() -> None:
    """Only after leave(): an error that nobody caught ends Python in its own way."""
    if not codes:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # Python tells of it
        return
    os._exit(codes[-1])
