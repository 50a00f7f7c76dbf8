"""Imports torch and what is built on it, in half the time.

Two things make these imports slow. Python's garbage collector looks through a growing heap again
and again, and finds nothing. And the libraries import packages that they find installed, though
cogvx asks for no part of them that needs these.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator

LIBRARIES = (
    "torch",
    "accelerate",
    "peft",
    "diffusers.models.transformers.cogvideox_transformer_3d",
    "diffusers.pipelines.cogvideo.pipeline_cogvideox",
)
# diffusers, transformers and peft use these for forms of weights, samplers and losses that are
# not used here. cogvx imports them itself where a setting asks for them.
NOT_NEEDED = ("bitsandbytes", "scipy", "torchao")


def load_libraries() -> None:
    """Imports LIBRARIES. An error is left for the import that needs the library to tell."""
    # A second time there is nothing to import, and what freeze() would keep are a run's own things.
    if all(name in sys.modules for name in LIBRARIES):
        return
    with collections_paused():
        with contextlib.suppress(Exception), looked_up_once(), unseen():
            for name in LIBRARIES:
                importlib.import_module(name)
        # Later collections do not look at what was imported.
        gc.freeze()


@contextlib.contextmanager
def collections_paused() -> Iterator[None]:
    """For code that makes very many small objects which stay.

    Python's garbage collector would look through them again and again: twice as slow.
    """
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


@contextlib.contextmanager
def looked_up_once() -> Iterator[None]:
    """diffusers and transformers both ask which packages are installed, which reads all of them."""
    original = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = functools.cache(original)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = original


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """NOT_NEEDED look as if they were not installed: None in sys.modules means just that."""
    hidden = [name for name in NOT_NEEDED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]
