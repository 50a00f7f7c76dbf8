"""The configurations of the model that is planned.   [no torch]"""

from __future__ import annotations

from pathlib import Path

from cogvx.config import Config
from cogvx.model.geometry import read_config
from cogvx.model.released import NAMES, RELEASED, T5_XXL


def configs_of(config: Config) -> dict[str, dict]:
    """The model's configurations, from a local folder or by the name of a released checkpoint.

    Keys: transformer, vae, text_encoder. KeyError if model.path is neither.
    """
    folder = Path(config.model.path)
    if (folder / "transformer" / "config.json").is_file():
        return {
            part: part_settings(folder, part) for part in ("transformer", "vae", "text_encoder")
        }
    transformer, vae, _, _ = RELEASED[NAMES[config.model.path.split("/")[-1]]]
    return {"transformer": transformer, "vae": vae, "text_encoder": T5_XXL}


def part_settings(folder: Path, part: str) -> dict:
    """A part's configuration, without diffusers' own entries, such as _class_name."""
    return {
        key: value for key, value in read_config(folder, part).items() if not key.startswith("_")
    }


def layers_of(config: Config) -> int:
    return configs_of(config)["transformer"]["num_layers"]
