"""Text on pictures, in the letters of any language that this machine has a font for."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path


def font(size: int, text: str = ""):
    """A font with the letters of most alphabets; for other letters, one of this machine's."""
    from PIL import ImageFont

    path = font_file(text)
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def drawable(text: str) -> str:
    """The text. Letters that no font of this machine has are written as \\u4e2d, never as boxes."""
    path = font_file(text)
    known = letters_of(path) if path else frozenset(map(chr, range(0x7F)))
    return "".join(letter if letter in known else as_escape(letter) for letter in text)


def as_escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def font_file(text: str) -> Path | None:
    """matplotlib's DejaVu Sans, unless this machine has a font with more of the text's letters."""
    usual = dejavu()
    if usual is None:
        return None
    missing = sorted({*text} - letters_of(usual))
    other = system_font(missing[0]) if missing else None
    if other is None:
        return usual
    more = len({*text} & letters_of(other)) > len({*text} & letters_of(usual))
    return other if more else usual


def dejavu() -> Path | None:
    try:
        import matplotlib
    except ImportError:
        return None
    return Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")


@functools.cache
def system_font(letter: str) -> Path | None:
    """A font of this machine with that letter: fontconfig knows (Linux, and macOS with brew)."""
    if shutil.which("fc-match") is None:
        return None
    command = ["fc-match", "-f", "%{file}", f":charset={ord(letter):x}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    path = Path(found.stdout)
    # It names the nearest font, even if that has not the letter either.
    return path if path.is_file() and letter in letters_of(path) else None


@functools.cache
def letters_of(path: Path) -> frozenset[str]:
    """Pillow draws the first font of a collection."""
    from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(path, fontNumber=0, lazy=True) as file:
            return frozenset(map(chr, file.getBestCmap() or {}))
    except (TTLibError, OSError):
        return frozenset()
