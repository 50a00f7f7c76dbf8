"""What a model's configuration files say about frames, sizes and positions.   [no torch]"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from cogvx.data.buckets import Size
from cogvx.errors import UserError
from cogvx.model.released import NAMES, RELEASED


@dataclass(frozen=True)
class Geometry:
    """What decides which clips a model takes and how it is trained, from its config.json files."""

    spatial_stride: int  # pixels per latent pixel
    temporal_stride: int  # frames per latent frame, after the first
    patch_size: int  # latent pixels per token, along each side
    patch_size_t: int | None  # latent frames per token; None: 1 (CogVideoX 1.0)
    in_channels: int  # of the transformer; twice the latents' for image-to-video
    latent_channels: int
    sample_height: int  # latent pixels the positions were trained for; the most there can be (1.5)
    sample_width: int
    sample_frames: int  # frames of the clip, not of its latents
    heads: int  # of attention
    head_dim: int
    rotary: bool  # positions rotate queries and keys (5B), or a sine table is added (2B)
    learned_positions: bool  # besides, a learned table is added (5B-I2V)
    ofs: bool  # an offset is embedded beside the timestep (1.5-5B-I2V)
    text_tokens: int
    scaling_factor: float
    invert_scale_latents: bool  # image latents are divided by the factor (1.5-5B-I2V)
    stored_dtype: str | None  # of the transformer's weights, in safetensors' words: F16, BF16, F32

    @classmethod
    def from_configs(cls, transformer: dict, vae: dict, stored_dtype: str | None):
        """KeyError if a setting is missing that all released models have."""
        return cls(
            spatial_stride=2 ** (len(vae["block_out_channels"]) - 1),
            temporal_stride=int(vae["temporal_compression_ratio"]),
            patch_size=transformer["patch_size"],
            patch_size_t=transformer.get("patch_size_t"),
            in_channels=transformer["in_channels"],
            latent_channels=vae["latent_channels"],
            sample_height=transformer["sample_height"],
            sample_width=transformer["sample_width"],
            sample_frames=transformer["sample_frames"],
            heads=transformer["num_attention_heads"],
            head_dim=transformer["attention_head_dim"],
            rotary=transformer["use_rotary_positional_embeddings"],
            learned_positions=transformer.get("use_learned_positional_embeddings", False),
            ofs=transformer.get("ofs_embed_dim") is not None,
            text_tokens=transformer["max_text_seq_length"],
            scaling_factor=vae["scaling_factor"],
            invert_scale_latents=vae.get("invert_scale_latents", False),
            stored_dtype=stored_dtype,
        )

    @property
    def pixel_multiple(self) -> int:
        return self.spatial_stride * self.patch_size

    @property
    def image_to_video(self) -> bool:
        return self.in_channels == 2 * self.latent_channels

    @property
    def pipeline(self) -> str:
        """The name of the diffusers class that generates videos with this model."""
        return "CogVideoXImageToVideoPipeline" if self.image_to_video else "CogVideoXPipeline"

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels. For 1.5: the most that there are positions for."""
        return self.sample_height * self.spatial_stride, self.sample_width * self.spatial_stride

    def padding(self, latent_frames: int) -> int:
        """Latent frames that 1.5 needs in front of a clip, to fill whole tokens."""
        return -latent_frames % (self.patch_size_t or 1)

    def tokens(self, *, frames: int, height: int, width: int) -> int:
        """How many tokens a clip of this size and its prompt are together. Sizes in pixels."""
        latent_frames = (frames - 1) // self.temporal_stride + 1
        in_time = (latent_frames + self.padding(latent_frames)) // (self.patch_size_t or 1)
        rows, columns = (side // self.pixel_multiple for side in (height, width))
        return self.text_tokens + in_time * rows * columns

    def problems(
        self,
        *,
        frames: int,
        height: int,
        width: int,
        image_to_video: bool,
        precision: str,
        buckets: list[Size] | None = None,
    ) -> list[str]:
        """Why the model cannot be trained like this, and what is allowed.

        `precision`: no, fp16 or bf16. `buckets`: sizes besides this one; None: there is only one.
        """
        return [
            *self.kind_problems(image_to_video),
            *self.frame_problems(frames),
            *self.size_problems(height, width),
            *self.bucket_problems(buckets),
            *self.precision_problems(precision),
        ]

    def kind_problems(self, image_to_video: bool) -> list[str]:
        if self.in_channels not in (self.latent_channels, 2 * self.latent_channels):
            return [
                f"the transformer takes {self.in_channels} channels over {self.latent_channels} "
                f"latent channels: neither text-to-video ({self.latent_channels}) "
                f"nor image-to-video ({2 * self.latent_channels})"
            ]
        if image_to_video and not self.image_to_video:
            return [
                "model.image_to_video=true, but this is a text-to-video checkpoint: "
                "model=2b, 5b or 1_5_5b"
            ]
        if self.image_to_video and not image_to_video:
            return [
                "model.image_to_video=false, but this is an image-to-video checkpoint: "
                "model=5b_i2v or 1_5_5b_i2v"
            ]
        return []

    def frame_problems(self, frames: int, named: str = "data.max_num_frames") -> list[str]:
        """`named`: the setting, for messages."""
        step = self.temporal_stride
        if frames >= 1 and frames % step == 1 % step:
            return []
        below = max(1, (frames - 1) // step * step + 1)
        return [f"{named}={frames}: must be {step}k + 1; nearest: {below} or {below + step}"]

    def size_problems(self, height: int, width: int, named: str = "data.") -> list[str]:
        """`named`: the setting, for messages, without height or width."""
        found, multiple = [], self.pixel_multiple
        for name, value, latent in (
            ("height", height, self.sample_height),
            ("width", width, self.sample_width),
        ):
            native = latent * self.spatial_stride
            setting = f"{named}{name}={value}"
            if self.learned_positions and value != native:
                found.append(
                    f"{setting}: must be {native}, the only one this checkpoint has positions for"
                )
            elif value < multiple or value % multiple:
                below = value // multiple * multiple
                nearest = f"{below} or {below + multiple}" if below >= multiple else f"{multiple}"
                found.append(
                    f"{setting}: must be a multiple of {multiple} "
                    f"(VAE {self.spatial_stride} x patch {self.patch_size}); nearest: {nearest}"
                )
            elif self.patch_size_t is not None and value > native:
                found.append(
                    f"{setting}: must be at most {native}, where this checkpoint's positions end"
                )
        return found

    def bucket_problems(self, buckets: list[Size] | None) -> list[str]:
        if buckets is None:
            return []
        if self.learned_positions:
            height, width = self.native_size
            return [
                f"data.buckets: this checkpoint has positions for one size only, {height}x{width} "
                f"(height x width): data.buckets=null"
            ]
        found = []
        for size in buckets:
            found += self.frame_problems(size.frames, f"data.buckets={size}: frames")
            found += self.size_problems(size.height, size.width, f"data.buckets={size}: ")
        return found

    def precision_problems(self, precision: str) -> list[str]:
        if precision == "fp16" and self.stored_dtype == "BF16":
            return [
                "train.mixed_precision=fp16: this checkpoint was trained in bf16 and overflows in "
                "fp16; train.mixed_precision=bf16"
            ]
        return []

    def caution_of_buckets(self, buckets: list[Size]) -> str | None:
        """Which sizes are new to the checkpoint; None if none is, or if this is not known."""
        if self.ofs:
            new = [size for size in buckets if not trained_on_by_1_5_i2v(size)]
            trained = "768 pixels on the short side and up to 1360 on the long one"
        elif self.patch_size_t is None:
            height, width = self.native_size
            new = [size for size in buckets if (size.height, size.width) != (height, width)]
            trained = f"{height}x{width}"
        else:
            return None
        if not new:
            return None
        shapes = dict.fromkeys(f"{size.height}x{size.width}" for size in new)
        return (
            f"this checkpoint was trained at {trained} (height x width). New to it: "
            f"{', '.join(shapes)}"
        )

    def cautions(self, frames: int) -> list[str]:
        """What is allowed but not what the model was trained on."""
        if self.learned_positions and frames != self.sample_frames:
            return [
                f"this checkpoint's learned positions are for {self.sample_frames} frames; "
                f"at {frames} diffusers puts a sine table in their place, here and in its "
                f"pipeline, and the checkpoint was not trained with it"
            ]
        if self.patch_size_t is None and frames > self.sample_frames:
            return [
                f"this checkpoint was trained on up to {self.sample_frames} frames, "
                f"and these are {frames}"
            ]
        return []


def trained_on_by_1_5_i2v(size: Size) -> bool:
    """The model card of CogVideoX1.5-5B-I2V: min(W, H) = 768, 768 <= max(W, H) <= 1360."""
    shorter, longer = sorted((size.height, size.width))
    return shorter == 768 and longer <= 1360


def released(path: str) -> Geometry | None:
    """The geometry of a released model by its hub id or its folder's name; None for others."""
    option = NAMES.get(path.rstrip("/").split("/")[-1])
    if option is None:
        return None
    transformer, vae, _, stored_dtype = RELEASED[option]
    return Geometry.from_configs(transformer, vae, stored_dtype)


def read_geometry(folder: Path) -> Geometry:
    """From a folder in diffusers layout. UserError if a part is missing or cannot be read."""
    try:
        return Geometry.from_configs(
            read_config(folder, "transformer"),
            read_config(folder, "vae"),
            stored_dtype(folder / "transformer"),
        )
    except KeyError as error:
        raise UserError(
            f"{folder}: a config.json of this model lacks {error}: is it a CogVideoX checkpoint?"
        ) from error


LONGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one


def stored_dtype(part: Path) -> str | None:
    """The dtype of the first tensor in a part's safetensors files; None if there is none."""
    for path in sorted(part.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = struct.unpack("<Q", file.read(8))[0]
                header = json.loads(file.read(min(length, LONGEST_HEADER)))
            of_tensors = {name: header[name] for name in header if name != "__metadata__"}
            return next((about["dtype"] for about in of_tensors.values()), None)
        except (OSError, ValueError, KeyError, TypeError, struct.error, RecursionError):
            # Loading the file will raise an error that tells more.
            return None
    return None


def read_config(folder: Path, part: str) -> dict:
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist: the model folder lacks its {part}. {LAYOUT}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings: {{...}} with names and values")
    return found


LAYOUT = (
    "A model folder in diffusers layout holds transformer/, vae/, text_encoder/, tokenizer/ "
    "and scheduler/"
)
