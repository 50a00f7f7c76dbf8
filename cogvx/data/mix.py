"""data=mix: several sources in one run, each in its own format, with its own share of the samples.

Its usual use is to keep what the base model knows: clips of what is new, and clips of other things.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from cogvx.data.sources import Data, Example
from cogvx.errors import UserError

# What each source has for itself. Everything else that all formats share is set once: data.height.
OWN = (
    *("instance_data_root", "allow_outside_root"),
    *("caption_column", "video_column", "image_column"),
    *("id_token", "id_token_position", "id_token_share"),
    *("caption_split", "tag_shuffles", "keep_tags"),
)
FORMAT, SHARE = "format", "share"
USUAL_FORMAT = "folder"


@dataclass
class Mix(Data):
    """sources: by name, the format, the share, and the settings of the format.

    config.check() makes a Data of each and hands them to use().
    """

    sources: dict[str, Any]

    by_name: ClassVar[dict[str, Data]] = {}  # what use() is given

    def use(self, parts: dict[str, Data]) -> None:
        self.by_name = parts

    def problems(self) -> list[str]:
        found = super().problems()
        found += [
            f"data.{name}={getattr(self, name)} with data=mix: each source has its own: "
            f"data.sources.NAME.{name}=..."
            for name in ("id_token", "instance_data_root")
            if getattr(self, name) is not None
        ]
        for name, part in self.by_name.items():
            found += problems_of_part(name, part)
        return found + self.problems_of_shares()

    def problems_of_shares(self) -> list[str]:
        given = {name: each[SHARE] for name, each in self.sources.items() if each.get(SHARE)}
        without = [name for name in self.sources if name not in given]
        if given and len(without) > 1:
            return [
                f"data.sources: {' and '.join(without)} have no share, and others have. Give a "
                f"share to all sources but one at most, which takes the rest"
            ]
        if without and sum(given.values()) >= 1:
            return [
                f"data.sources: the shares add up to {sum(given.values()):g}, so none is left for "
                f"{without[0]}: give it one, or less to the others"
            ]
        return []

    def make_paths_absolute(self) -> None:
        from cogvx.files import absolute

        for name, part in self.by_name.items():
            part.cache_dir = self.cache_dir
            if part.instance_data_root is not None:
                part.instance_data_root = absolute(part.instance_data_root)
                self.sources[name]["instance_data_root"] = str(part.instance_data_root)
            if hasattr(part, "make_paths_absolute"):
                part.make_paths_absolute()
                self.sources[name]["dataset_name"] = part.dataset_name

    def read(self) -> list[Example]:
        """The examples of all sources. An error says of which source it speaks."""
        examples, said = [], []
        for name, part in self.by_name.items():
            try:
                with part.knowing(self.known):
                    found = part.read()
            except UserError as error:
                raise UserError(f"data.sources.{name}: {error}") from error
            examples += [replace(e, source=name, origin=f"{name} {e.origin}") for e in found]
            said += [f"{line} ({name})" for line in part.said]
        self.said = tuple(said)
        return examples

    def of(self, example: Example) -> Data:
        return self.by_name[example.source]

    def shares(self) -> dict[str, float]:
        given = {name: each[SHARE] for name, each in self.sources.items() if each.get(SHARE)}
        if not given:
            return {}
        rest = 1 - sum(given.values())
        return {name: given.get(name, rest) for name in self.sources}

    def id_tokens(self) -> list[str]:
        return [word for part in self.by_name.values() for word in part.id_tokens()]

    def described(self) -> str:
        return f"data=mix of {', '.join(part.described() for part in self.by_name.values())}"


def settings_of_part(part_class: type[Data]) -> list[str]:
    """What a source of this format has for itself."""
    shared = {field.name for field in fields(Data)}
    return [f.name for f in fields(part_class) if f.name in OWN or f.name not in shared]


def problems_of_part(name: str, part: Data) -> list[str]:
    """Of what the source has for itself, under its own name."""
    found, own = [], settings_of_part(type(part))
    for problem in part.problems():
        key = re.match(r"data\.(\w+)", problem)
        if key is None or key[1] in own:
            found.append(re.sub(r"\bdata(?=[.:])", f"data.sources.{name}", problem, count=1))
    if part.needs_root and part.instance_data_root is None:
        found.append(f"data.sources.{name}.instance_data_root must be given")
    return found


def recorded_part(part: Data, option: str, share: float | None) -> dict[str, object]:
    """The values of a source as they stand in a YAML file."""
    values = {name: getattr(part, name) for name in settings_of_part(type(part))}
    plain = {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}
    return {FORMAT: option, SHARE: share, **plain}
