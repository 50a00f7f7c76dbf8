"""What the two pages share: the templates, videos inside the page, numbers in words.   [no torch]

A page is one file. It loads nothing from elsewhere, so it opens offline in any browser.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.files import read_json, write_text

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = "report.html"
# Of task=generate: a list of {prompt, seed, videos: [[label, path in the folder], ...]}.
VIDEO_INDEX = "videos.json"
TEMPLATES = Path(__file__).parent / "templates"
MOST_EMBEDDED = (
    40 * 2**20
)  # bytes of video in a page; beyond that the videos stay files and are linked
MOST_DECIMALS = 6
REAL_CLIPS = "clips"  # validation/clips/NAME.mp4: the real clip shown beside the video NAME
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Panel:
    """One video with its label."""

    label: str
    source: str  # a data: URL, or the file's address


@dataclass(frozen=True)
class VideoGroup:
    """The videos of one prompt and seed. They play in step."""

    prompt: str
    panels: list[Panel]


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95 % interval, with the text that says it."""

    mean: float
    low: float
    high: float
    digits: int = 3

    @property
    def text(self) -> str:
        low, high = signed(self.low, self.digits), signed(self.high, self.digits)
        return f"{signed(self.mean, self.digits)} (95 % interval: {low} to {high})"

    @property
    def includes_zero(self) -> bool:
        return self.low <= 0 <= self.high


@cache
def templates() -> Environment:
    """Jinja with autoescape: a caption or an error's text cannot write into the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {"place_on": place_on}
    return found


def render(page: Path, template: str, **values: object) -> Path:
    """Writes the page whole or not at all, and returns its path."""
    write_text(page, templates().get_template(template).render(**values) + "\n")
    return page


# -- videos --------------------------------------------------------------------------------------


def newest_videos(folder: Path) -> dict[str, Path]:
    """The tuned model's videos of the last validation, by name (`01_seed42`)."""
    steps = sorted((folder / "validation").glob("step_*"))
    found = sorted(steps[-1].glob("*.mp4")) if steps else []
    return {path.stem: path for path in found if not path.stem.endswith("_before_after")}


def generated_videos(folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """Labels and files of each prompt and seed that task=generate made videos for."""
    found = {}
    for row in read_json(folder / VIDEO_INDEX) or []:
        those = [(label, folder / file) for label, file in row["videos"]]
        said = title_of(row)
        # A prompt can stand there twice, with two images or clips.
        said = said if said not in found else f"{said}, number {len(found) + 1}"
        found[said] = [each for each in those if each[1].is_file()]
    return found


def title_of(row: dict) -> str:
    """Of a prompt and seed in VIDEO_INDEX. `asked`: what task.enhancer wrote the prompt out of."""
    if "asked" in row:
        return f"{row['asked']} (seed {row['seed']}), written out: {row['prompt']}"
    return f"{row['prompt']} (seed {row['seed']})"


def prompt_of_video(folder: Path, name: str) -> str:
    return read_json(folder / "validation" / "prompts.json").get(name, name)


def base_video(folder: Path, name: str) -> Path:
    return folder / "validation" / "base" / f"{name}.mp4"


def clip_beside(folder: Path, name: str) -> tuple[str, Path] | None:
    """The real clip shown beside a video, and its label: held-out clip or training clip."""
    path = folder / "validation" / REAL_CLIPS / f"{name}.mp4"
    label = read_json(folder / "validation" / f"{REAL_CLIPS}.json").get(name, "clip of the data")
    return (label, path) if path.is_file() else None


def panels(found: list[tuple[str, Path]], here: Path, *, embed: bool) -> list[Panel]:
    """`found`: labels and mp4 files; `here`: the page's folder."""
    sources = [video_url(path) if embed else address(path, here) for _, path in found]
    return [Panel(label, source) for (label, _), source in zip(found, sources, strict=True)]


def can_embed(paths: list[Path]) -> bool:
    return sum(path.stat().st_size for path in paths) <= MOST_EMBEDDED


def video_url(path: Path) -> str:
    return f"data:video/mp4;base64,{base64_of(path)}"


def picture_url(path: Path) -> str | None:
    return f"data:image/png;base64,{base64_of(path)}" if path.is_file() else None


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def address(path: Path, here: Path) -> str:
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.absolute().as_uri()


# -- numbers -------------------------------------------------------------------------------------


def setting_text(value: object) -> str:
    """A setting as it would be typed: never shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def column(values: list[object], decimals: int = 0) -> list[str]:
    """One column of a table: numbers with as many decimals as tell them apart; None is empty."""
    numbers = {value for value in values if isinstance(value, float) and math.isfinite(value)}
    while decimals < MOST_DECIMALS and len({f"{n:.{decimals}f}" for n in numbers}) < len(numbers):
        decimals += 1
    return [
        "" if value is None else f"{value:.{decimals}f}" if isinstance(value, float) else str(value)
        for value in values
    ]


def signed(value: float, digits: int = 3) -> str:
    """With its sign; a value that rounds to zero has none."""
    text = f"{abs(value):.{digits}f}"
    if not float(text):
        return text
    return f"+{text}" if value > 0 else f"{MINUS}{text}"


def joined(words: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def size_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def difference_interval(before: list[float], after: list[float]) -> Interval | None:
    """The mean difference of pairs with its 95 % interval (Student's t); None for less than two."""
    from scipy.special import stdtrit

    pairs = list(zip(before, after, strict=False))
    differences = [b - a for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    if len(differences) < 2 or len(before) != len(after):
        return None
    count, mean = len(differences), math.fsum(differences) / len(differences)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    reach = float(stdtrit(count - 1, 0.975)) * math.sqrt(variance / count)
    return Interval(mean, mean - reach, mean + reach, digits=4)


def place_on(value: float, low: float, high: float) -> str:
    """Where a value stands between low and high, in percent, for a drawing."""
    return f"{100 * (value - low) / (high - low):.2f}" if high > low else "50"
