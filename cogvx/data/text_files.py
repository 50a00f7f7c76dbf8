"""data=text_files: two text files. The demo and nano's world have the same form."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cogvx.data import demo, world
from cogvx.data.listed import (
    ListedClip,
    located,
    paired,
    read_lines,
    require_no_link_out,
)
from cogvx.data.sources import Data
from cogvx.errors import UserError


@dataclass
class TextFiles(Data):
    """The seed's small format: two text files. Line i of one belongs to line i of the other.

    caption_column and video_column are the names of the files.
    """

    needs_root: ClassVar[bool] = True

    def require_list(self) -> None:
        root = self.root()
        absent = [name for name in self.columns() if not (root / name).is_file()]
        if absent:
            here = sorted(p.name for p in root.iterdir() if p.is_file())[:8]
            raise UserError(
                f"{' and '.join(absent)} not found in {root}. {self.caption_column} holds one "
                f"caption per line, {self.video_column} one path per line. "
                f"Files there now: {', '.join(here) or 'none'}. For a CSV file: data=csv"
            )

    def rows(self) -> list[ListedClip]:
        self.require_list()
        root = self.root()
        if not self.allow_outside_root:
            for name in self.columns():
                require_no_link_out(root / name, root)
        lines = {name: read_lines(root / name) for name in self.columns()}
        return located(
            paired(lines, root), root, anywhere=self.allow_outside_root, known=self.known
        )


@dataclass
class Demo(TextFiles):
    """Text files, as above. Without instance_data_root: the demo's clips, made in the cache."""

    needs_root: ClassVar[bool] = False

    def root(self) -> Path:
        if self.instance_data_root is None:
            return demo.render_demo(self.cache_dir)
        return super().root()

    def is_demo(self) -> bool:
        return self.instance_data_root is None

    def require_list(self) -> None:
        if not self.is_demo():
            super().require_list()


@dataclass
class World(TextFiles):
    """The little world that model=nano was trained on, made in the cache."""

    clips: int
    clips_seed: int

    needs_root: ClassVar[bool] = False

    def root(self) -> Path:
        name = f"{world.WORLD_FOLDER}_{self.clips}_{self.clips_seed}"
        return world.render_clips(self.cache_dir, world.scenes(self.clips, self.clips_seed), name)

    def require_list(self) -> None:
        """It is made when it is needed."""

    def described(self) -> str:
        return "data=world"

    def problems(self) -> list[str]:
        few = [] if self.clips >= 1 else [f"data.clips={self.clips}: must be 1 or more"]
        return super().problems() + few
