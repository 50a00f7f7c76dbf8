"""What the two pages share: the templates, videos inside the page, numbers in words.   [no torch]

A page loads nothing from the network, so it opens offline in any browser. The page of something
that has ended is one file. While it goes on, the page shows files beside it, and looks every few
seconds at a small file, NAME_stamp.js, which changes whenever the page is written. Then it fetches
itself into a hidden frame and replaces the parts that differ. All of this works from file:// too,
where a script may not read files.
"""

from __future__ import annotations

import base64
import json
import math
import time
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from cogvx.files import read_json, write_text

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = "report.html"
# Of task=generate: a list of {prompt, seed, videos: [[label, path in the folder], ...], ...}.
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
    starts_row: bool = False


@dataclass(frozen=True)
class VideoGroup:
    """The videos of one prompt and seed. They play in step."""

    prompt: str
    panels: list[Panel]


@dataclass(frozen=True)
class PageState:
    """How far a run or a sweep is, for the top of its page."""

    what: str  # "run" or "sweep"
    words: str
    seconds_left: float | None = None
    share: float | None = None  # that is done, 0 to 1

    @property
    def left(self) -> str | None:
        """None if it is not known, or as good as nothing."""
        return duration(self.seconds_left) if self.seconds_left and self.seconds_left >= 1 else None

    @property
    def until(self) -> str:
        return clock_time(time.time() + self.seconds_left)

    @property
    def until_text(self) -> str:
        """For a browser without scripts."""
        return time.strftime("%H:%M", time.localtime(time.time() + self.seconds_left))


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


def render(page: Path, template: str, *, live: bool = False, **values: object) -> Path:
    """Writes the page whole or not at all, and returns its path.

    live: it belongs to something that goes on, and follows that in the browser.
    """
    now = time.time()
    stamp = f"{now:.3f}"
    about = {"live": live, "stamp": stamp, "stamp_file": stamp_of(page).name}
    text = templates().get_template(template).render(**about, written=clock_time(now), **values)
    write_text(page, text + "\n")
    # The page first: who sees the new stamp finds the new page.
    if live or stamp_of(page).is_file():
        write_text(stamp_of(page), f"pageStamp({json.dumps([stamp, live])})\n")
    return page


def stamp_of(page: Path) -> Path:
    return page.with_name(f"{page.stem}_stamp.js")


def is_final(page: Path) -> bool:
    """Whether the page was written after the end of what it shows."""
    if not stamp_of(page).is_file():
        return page.is_file()
    return stamp_of(page).read_text(encoding="utf-8").rstrip().endswith("false])")


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


def row_starts(folder: Path) -> set[str]:
    """The labels of videos of task=generate that begin a row of the page."""
    rows = read_json(folder / VIDEO_INDEX) or []
    return {label for row in rows for label in row.get("row_starts", [])}


def title_of(row: dict) -> str:
    """Of a prompt and seed in VIDEO_INDEX. `asked`: what task.enhancer wrote the prompt out of."""
    if "asked" in row:
        return f"{row['asked']} (seed {row['seed']}), written out: {row['prompt']}"
    return f"{row['prompt']} (seed {row['seed']})"


def preview_steps(folder: Path) -> list[Path]:
    """The folders of the previews, in the order of their steps."""
    return sorted((folder / "previews").glob("step_*"))


def step_in_words(folder: Path) -> str:
    """`step 50`, of step_000050."""
    return f"step {int(folder.name.partition('_')[2])}"


def prompt_of_video(folder: Path, name: str) -> str:
    return read_json(folder / "validation" / "prompts.json").get(name, name)


def base_video(folder: Path, name: str) -> Path:
    return folder / "validation" / "base" / f"{name}.mp4"


def base_videos(folder: Path) -> list[str]:
    """The names of the base model's videos."""
    return sorted(path.stem for path in (folder / "validation" / "base").glob("*.mp4"))


def clip_beside(folder: Path, name: str) -> tuple[str, Path] | None:
    """The real clip shown beside a video, and its label: held-out clip or training clip."""
    path = folder / "validation" / REAL_CLIPS / f"{name}.mp4"
    label = read_json(folder / "validation" / f"{REAL_CLIPS}.json").get(name, "clip of the data")
    return (label, path) if path.is_file() else None


def panels(
    found: list[tuple[str, Path]], here: Path, *, embed: bool, starts: set[str] = frozenset()
) -> list[Panel]:
    """`found`: labels and mp4 files; `here`: the page's folder.

    `starts`: the labels that begin a row.
    """
    sources = [video_url(path) if embed else address(path, here) for _, path in found]
    return [
        Panel(label, source, label in starts)
        for (label, _), source in zip(found, sources, strict=True)
    ]


def can_embed(paths: list[Path]) -> bool:
    return sum(path.stat().st_size for path in paths) <= MOST_EMBEDDED


def video_url(path: Path) -> str:
    return f"data:video/mp4;base64,{base64_of(path)}"


def picture_url(path: Path, here: Path, *, live: bool = False) -> str | None:
    """The picture itself as a URL, or for a page in `here` that is live its address."""
    if not path.is_file():
        return None
    # A file that is written again has another address: the browser shows the new one.
    if live:
        return f"{address(path, here)}?{path.stat().st_mtime_ns}"
    return f"data:image/png;base64,{base64_of(path)}"


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def address(path: Path, here: Path) -> str:
    if not path.is_relative_to(here):
        return path.absolute().as_uri()
    # A folder may be called "javascript:..." or hold a # or a ?.
    return quote(path.relative_to(here).as_posix(), safe="/=,+@")


# -- numbers -------------------------------------------------------------------------------------


def setting_text(value: object) -> str:
    """A setting as it would be typed: never shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(setting_text, value))}]"
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


def clock_time(seconds: float) -> str:
    """Seconds since 1970, as HTML's <time> wants them: to the second, with this time zone."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


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
