"""What is printed while something runs: progress bars, and silence from the libraries."""

import contextlib
import logging
import sys

# When diffusers looks for these packages, they warn of missing parts that cogvx does not use.
NOISY = ("bitsandbytes", "diffusers.quantizers", "torch.utils._pytree", "torchao")


def bar(iterable=None, **settings):
    """A tqdm progress bar. In a log file only long work prints one line every 20 seconds."""
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    seconds = {"mininterval": 0.2} if on_terminal else {"mininterval": 20, "delay": 20}
    return tqdm(iterable, dynamic_ncols=True, **seconds, **settings)


def counted(number: int, thing: str, things: str | None = None) -> str:
    """counted(1, "prompt") is "1 prompt", counted(2, "prompt") is "2 prompts".

    `things` is the plural, where it is not `thing` with an s.
    """
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def quiet_libraries() -> None:
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def library_bars(*, shown: bool):
    """Shows or hides the bars that diffusers and transformers draw while they load and save."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        (library.enable_progress_bar if shown else library.disable_progress_bar)()
    try:
        yield
    finally:
        for library in (diffusers_logging, transformers_logging):
            library.enable_progress_bar()
