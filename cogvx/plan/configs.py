"""The configurations of the model that is planned.   [no torch]"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cogvx.config import Config
from cogvx.model.geometry import Geometry, read_config
from cogvx.model.released import NAMES, RELEASED, T5_XXL
from cogvx.model.sizes import largest_size


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


def geometry_of(config: Config) -> Geometry:
    configs = configs_of(config)
    return Geometry.from_configs(configs["transformer"], configs["vae"], None)


def at_largest_bucket(config: Config) -> Config:
    """The same run with the bucket of the most tokens as its only size."""
    if config.data.buckets is None:
        return config
    size = largest_size(config.data, geometry_of(config))
    only = {"max_num_frames": size.frames, "height": size.height, "width": size.width}
    data = dataclasses.replace(config.data, buckets=None, **only)
    return dataclasses.replace(config, data=data)


def at_given_size(config: Config) -> Config:
    """The same run without buckets. Videos have this size."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=None))
