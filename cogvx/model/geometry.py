"""What a checkpoint's own configuration files say about frames, sizes and positions. No torch, no weights."""

import json
from dataclasses import dataclass
from pathlib import Path

from cogvx.errors import UserError


@dataclass(frozen=True)
class Geometry:
    """Everything of a checkpoint that decides which clips it takes, read from its config.json files."""

    spatial_stride: int  # pixels per latent pixel
    temporal_stride: int  # frames per latent frame, after the first
    patch_size: int  # latent pixels per token, along each side
    patch_size_t: int | None  # latent frames per token; None: 1 (CogVideoX 1.0)
    in_channels: int  # of the transformer; twice the latents' for image-to-video
    latent_channels: int
    sample_height: int  # latent pixels the positions were trained for
    sample_width: int
    head_dim: int
    rotary: bool  # positions rotate queries and keys (5B), or a sine table is added (2B)
    text_tokens: int
    scaling_factor: float

    @property
    def pixel_multiple(self) -> int:
        return self.spatial_stride * self.patch_size

    def frame_problems(self, frames: int) -> list[str]:
        step = self.temporal_stride
        if frames >= 1 and frames % step == 1 % step:
            return []
        below = max(1, (frames - 1) // step * step + 1)
        return [f"data.max_num_frames={frames}: must be {step}k + 1; nearest: {below} or {below + step}"]

    def size_problems(self, height: int, width: int) -> list[str]:
        found, multiple = [], self.pixel_multiple
        for name, value in (("height", height), ("width", width)):
            if value < multiple or value % multiple:
                below = value // multiple * multiple
                nearest = f"{below} or {below + multiple}" if below >= multiple else f"{multiple}"
                found.append(
                    f"data.{name}={value}: must be a multiple of {multiple} "
                    f"(VAE {self.spatial_stride} x patch {self.patch_size}); nearest: {nearest}"
                )
        return found

    def unsupported(self) -> list[str]:
        """Kinds of checkpoints that later versions will train."""
        found = []
        if self.patch_size_t is not None:
            found.append(f"patch_size_t={self.patch_size_t}: this is a CogVideoX 1.5 checkpoint")
        if self.in_channels != self.latent_channels:
            found.append(
                f"in_channels={self.in_channels} over {self.latent_channels} latent channels: this is an image-to-video checkpoint"
            )
        return found


# What the released text-to-video checkpoints of 1.0 share; used to check sizes before a checkpoint is on this machine.
RELEASED = Geometry(
    spatial_stride=8,
    temporal_stride=4,
    patch_size=2,
    patch_size_t=None,
    in_channels=16,
    latent_channels=16,
    sample_height=60,
    sample_width=90,
    head_dim=64,
    rotary=False,
    text_tokens=226,
    scaling_factor=1.15258426,
)


def read_geometry(folder: Path) -> Geometry:
    """From a folder in diffusers layout. UserError when a part is missing or cannot be read."""
    transformer, vae = read_config(folder, "transformer"), read_config(folder, "vae")
    try:
        return Geometry(
            spatial_stride=2 ** (len(vae["block_out_channels"]) - 1),
            temporal_stride=int(vae["temporal_compression_ratio"]),
            patch_size=transformer["patch_size"],
            patch_size_t=transformer.get("patch_size_t"),
            in_channels=transformer["in_channels"],
            latent_channels=vae["latent_channels"],
            sample_height=transformer["sample_height"],
            sample_width=transformer["sample_width"],
            head_dim=transformer["attention_head_dim"],
            rotary=transformer["use_rotary_positional_embeddings"],
            text_tokens=transformer["max_text_seq_length"],
            scaling_factor=vae["scaling_factor"],
        )
    except KeyError as error:
        raise UserError(
            f"{folder}: a config.json of this model does not say {error}: is it a CogVideoX checkpoint?"
        ) from error


def read_config(folder: Path, part: str) -> dict:
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: the model folder lacks its {part}. {LAYOUT}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


LAYOUT = "A model folder in diffusers layout holds transformer/, vae/, text_encoder/, tokenizer/ and scheduler/"
