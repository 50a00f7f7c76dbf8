"""Progress bars, on a terminal and in a log file."""

import sys


def bar(iterable=None, **settings):
    """A tqdm bar; in a log file it draws a line every 20 seconds instead of ten a second."""
    from tqdm import tqdm

    return tqdm(iterable, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 20, **settings)
