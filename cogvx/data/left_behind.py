"""What killed processes have left in the cache: unfinished files and folders, and locks."""

from __future__ import annotations

from pathlib import Path

from cogvx.data.cache import INDEX, LISTS, claimed
from cogvx.files import ending_with, gone, is_left_over

# The folders in which files are written and claimed. Nothing else is looked at: data.cache_dir may
# hold more than the cache.
KINDS_OF_CACHE = (
    *("arrived", "colours", "images", INDEX, "latents", LISTS, "looks", "models", "prompts"),
    *("quantised", "traces", "videos"),
)
# Beside them lie folders of clips that are made. Their names begin so.
MADE = ("demo_", "world_")


def tidy_cache(folder: Path) -> int:
    """Removes what killed processes have left; returns how many files and folders.

    What a process is writing, or may be writing on another machine, stays. So does a lock that a
    process holds.
    """
    found = [
        path for kind in KINDS_OF_CACHE for path in ending_with(folder / kind, ".partial", ".lock")
    ]
    beside = [path for name in MADE for path in folder.glob(f"{name}*")]
    found += [path for path in beside if path.suffix in (".partial", ".lock")]
    return sum(was_left(path) for path in found)


def was_left(path: Path) -> bool:
    """Whether a killed process has left it, and it is removed now."""
    if path.suffix == ".partial":
        return is_left_over(path) and gone(path)
    # A lock that nobody holds goes with the claim.
    with claimed(path.with_suffix(""), wait=False):
        pass
    return not path.exists()
