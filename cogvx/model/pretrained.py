"""From a hub id or a local folder to the parts of a CogVideoX checkpoint, each loaded when it is needed and not before."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cogvx.errors import UserError, first_line, listed
from cogvx.files import absolute
from cogvx.model.geometry import LAYOUT, Geometry, read_config, read_geometry, released
from cogvx.progress import library_bars

if TYPE_CHECKING:
    import torch

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
LONG_TO_LOAD = 10**9  # bytes; from here on a part is loaded with a progress bar


@dataclass
class Model:
    """A published checkpoint, or a local one in diffusers layout."""

    path: str
    revision: str | None
    height: int  # pixels; with what follows, but for image_to_video: what its authors recommend
    width: int
    num_frames: int
    fps: int
    precision: str
    num_inference_steps: int  # of its videos, with guidance_scale
    guidance_scale: float
    image_to_video: bool  # what it is to be trained as; a checkpoint of the other kind is refused

    is_built_in: ClassVar[bool] = False  # ships with cogvx, and knows the demo's clips

    def is_local(self) -> bool:
        """A hub id has the form name/name; anything that exists here, or has another form, is a folder."""
        return (
            Path(self.path).exists()
            or self.path.startswith((".", "/", "~"))
            or self.path.count("/") != 1
        )

    def make_paths_absolute(self) -> None:
        if self.is_local():
            self.path = str(absolute(Path(self.path)))

    def expected_geometry(self) -> Geometry | None:
        """What can be known before anything is downloaded; None for a checkpoint of an unknown name that is not here."""
        here = (Path(self.path) / "transformer" / "config.json").is_file()
        return read_geometry(Path(self.path)) if here else released(self.path)

    def refusals(self, *, frames: int, height: int, width: int, precision: str) -> list[str]:
        """Why it cannot be trained so, as far as that can be known now."""
        try:
            geometry = self.expected_geometry()
        except UserError as error:
            return [str(error)]
        if geometry is None:
            return []
        return geometry.problems(
            frames=frames,
            height=height,
            width=width,
            precision=precision,
            image_to_video=self.image_to_video,
        )

    def prepare(self, **asked_for) -> Path:
        """The local folder of the checkpoint, downloaded if it is on the hub, with all its parts. UserError when it cannot be
        trained as asked (see refusals), which its configuration files tell before the weights are fetched."""
        folder = self.local_folder() if self.is_local() else self.download("*.json")
        require_known_settings(folder)
        self.require_suited(folder, asked_for)
        if not self.is_local():
            folder = self.download("*")
            self.require_suited(folder, asked_for)  # now the weights tell their precision
        require_parts(folder)
        return folder

    def require_suited(self, folder: Path, asked_for: dict) -> None:
        found = replace(self, path=str(folder)).refusals(**asked_for)
        if found:
            raise UserError(listed(f"{self.path} cannot be trained like this:", found))

    def local_folder(self) -> Path:
        folder = Path(self.path)
        if not folder.is_dir():
            raise UserError(
                f"model.path={self.path} does not exist here, and is not a hub id (name/name). {LAYOUT}"
            )
        return folder

    def download(self, files: str) -> Path:
        """The files of this form of every part, from the hub or its cache."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            wanted = ["model_index.json", *(f"{part}/{files}" for part in PARTS)]
            return Path(snapshot_download(self.path, revision=self.revision, allow_patterns=wanted))
        except RevisionNotFoundError as error:
            raise UserError(
                f"model.revision={self.revision} does not exist in {self.path} on the hub"
            ) from error
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            offline = (
                " (HF_HUB_OFFLINE is set)"
                if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
                else ""
            )
            raise UserError(
                f"model.path={self.path} is no folder here and could not be fetched from the hub: either there is no public model "
                f"of that name, or this machine has no network{offline} or no free disk. Give a local folder in diffusers layout: "
                f"model.path=/models/{self.path.split('/')[-1]}. The hub client says: {first_line(error)}"
            ) from error


@dataclass
class Nano(Model):
    """The built-in tiny text-to-video model. It is written to `path` on first use."""

    blank: bool  # its transformer is not trained yet

    is_built_in: ClassVar[bool] = True
    takes_images: ClassVar[bool] = False

    def problems(self) -> list[str]:
        if self.image_to_video is self.takes_images:
            return []
        this, other = ("nano_i2v", "nano") if self.takes_images else ("nano", "nano_i2v")
        return [
            f"model.image_to_video={str(self.image_to_video).lower()} with model={this}: "
            f"that model is model={other}"
        ]

    def is_local(self) -> bool:
        return True

    def expected_geometry(self) -> Geometry:
        return self.tiny().geometry

    def local_folder(self) -> Path:
        from cogvx.model import nano

        return nano.write(Path(self.path), self.tiny(), blank=self.blank)

    def tiny(self):
        from cogvx.model import nano

        return nano.NANO_I2V if self.image_to_video else nano.NANO


@dataclass
class NanoI2v(Nano):
    """The built-in tiny image-to-video model."""

    takes_images: ClassVar[bool] = True


def require_known_settings(folder: Path) -> None:
    """Every setting of the transformer's and VAE's config.json is one that the installed diffusers reads: it would pass over
    others with a warning, and build another model."""
    import diffusers

    for part, class_name in (
        ("transformer", "CogVideoXTransformer3DModel"),
        ("vae", "AutoencoderKLCogVideoX"),
    ):
        settings = read_config(folder, part)
        if settings.get("_class_name", class_name) != class_name:
            raise UserError(
                f"{folder / part} is a {settings['_class_name']}; CogVideoX has a {class_name} there"
            )
        known = inspect.signature(getattr(diffusers, class_name).__init__).parameters
        unknown = [name for name in settings if not name.startswith("_") and name not in known]
        if unknown:
            raise UserError(
                f"{folder / part / 'config.json'} sets {', '.join(unknown)}, which diffusers {diffusers.__version__} does not know: "
                f"a newer checkpoint needs a newer diffusers (pip install -U diffusers)"
            )


def require_parts(folder: Path) -> None:
    """Every part with its configuration and its weights, before any of them is loaded."""
    missing = [f"{part}/ is not there" for part in PARTS if not (folder / part).is_dir()]
    for part in ("transformer", "vae", "text_encoder"):
        if (folder / part).is_dir():
            read_config(folder, part)
            if not any((folder / part).glob("*.safetensors")):
                missing.append(f"{part}/ has no *.safetensors file")
    if missing:
        raise UserError(
            listed(f"{folder} is not a whole CogVideoX checkpoint:", missing) + f"\n{LAYOUT}"
        )


@dataclass(frozen=True)
class PretrainedModel:
    """A whole checkpoint on this machine; each part is read from disk when asked for."""

    folder: Path
    device: torch.device
    dtype: torch.dtype  # of the frozen weights

    def hub_commit(self) -> str | None:
        """The commit of a hub snapshot, which its folder is named after; None for a local folder."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    def geometry(self) -> Geometry:
        return read_geometry(self.folder)

    def transformer(self, dtype: torch.dtype | None = None):
        """On the CPU, its weights in `dtype`, else in that of the frozen weights."""
        from diffusers import CogVideoXTransformer3DModel

        return self.loaded(
            CogVideoXTransformer3DModel, "transformer", torch_dtype=dtype or self.dtype
        )

    def vae(self, *, tiling: bool):
        from diffusers import AutoencoderKLCogVideoX

        vae = self.loaded(AutoencoderKLCogVideoX, "vae", torch_dtype=self.dtype).to(self.device)
        if tiling:
            vae.enable_tiling()
        return vae

    def text_encoder(self, *, streamed: bool = False):
        """The tokenizer and the encoder; `streamed`: its blocks' weights wait on the CPU."""
        from transformers import AutoTokenizer, T5EncoderModel

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        except Exception as error:
            raise UserError(
                f"{self.folder / 'tokenizer'} cannot be read: {first_line(error)}"
            ) from error
        return tokenizer, placed(
            self.loaded(T5EncoderModel, "text_encoder", dtype=self.dtype), self.device, streamed
        )

    def noise_scheduler(self):
        """As the checkpoint ships it: DDIM or DPM, with its schedule and trailing timesteps."""
        import diffusers

        name = read_config(self.folder, "scheduler").get("_class_name", "")
        if name not in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
            raise UserError(
                f"{self.folder}/scheduler is a {name or 'nameless class'}; CogVideoX uses CogVideoXDDIMScheduler or CogVideoXDPMScheduler"
            )
        return getattr(diffusers, name).from_pretrained(self.folder, subfolder="scheduler")

    def loaded(self, model_class, part: str, **dtype):
        size = sum(path.stat().st_size for path in (self.folder / part).iterdir())
        try:
            with library_bars(shown=size > LONG_TO_LOAD):
                model = model_class.from_pretrained(self.folder, subfolder=part, **dtype)
        except (
            Exception
        ) as error:  # damaged files surface as many kinds of errors, all of them the folder's
            raise UserError(
                f"{self.folder / part} cannot be loaded as {model_class.__name__}: {first_line(error)}"
            ) from error
        return model.eval().requires_grad_(False)


def placed(text_encoder, device: torch.device, streamed: bool):
    """A T5 encoder on the device."""
    from cogvx.model import transfer
    from cogvx.model.offload import WeightOffloader
    from cogvx.options.memory import Storage

    if streamed:
        WeightOffloader(text_encoder.encoder.block, Storage.own, device, streamed=True)
    transfer.bring(text_encoder, device)
    return text_encoder
