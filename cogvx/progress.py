"""Progress bars, on a terminal and in a log file."""

import sys


def bar(iterable=None, **settings):
    """A tqdm bar; in a log file, where there is no going back in a line, only what takes long, every 20 seconds."""
    from tqdm import tqdm

    seconds = {"mininterval": 0.2} if sys.stderr.isatty() else {"mininterval": 20, "delay": 20}
    return tqdm(iterable, dynamic_ncols=True, **seconds, **settings)
