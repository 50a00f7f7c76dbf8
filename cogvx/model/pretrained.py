"""From a hub id or a local folder to the parts of a CogVideoX model.

Each part is loaded when it is needed.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cogvx.errors import UserError, first_line, listed
from cogvx.files import absolute, is_hub_id
from cogvx.model.geometry import LAYOUT, Geometry, read_config, read_geometry, released
from cogvx.model.weight_files import require_weights
from cogvx.progress import heartbeat, library_bars

if TYPE_CHECKING:
    import torch

    from cogvx.data.buckets import Size
    from cogvx.data.cache import Cache
    from cogvx.options.validation import Sampler

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
# Bytes. A larger part is loaded with a progress bar.
LONG_TO_LOAD = 10**9


@dataclass
class Model:
    """A published model, or a local one in diffusers layout."""

    path: str
    revision: str | None
    # What the authors recommend.
    height: int  # pixels
    width: int
    num_frames: int
    fps: int
    precision: str
    num_inference_steps: int
    guidance_scale: float
    # A model of the other kind is refused.
    image_to_video: bool

    is_built_in: ClassVar[bool] = False  # ships with cogvx, and knows the demo's clips

    def is_local(self) -> bool:
        return not is_hub_id(self.path)

    def make_paths_absolute(self) -> None:
        if self.is_local():
            self.path = str(absolute(Path(self.path)))

    def expected_geometry(self) -> Geometry | None:
        """What is known before anything is downloaded; None for an unknown hub id."""
        here = (Path(self.path) / "transformer" / "config.json").is_file()
        return read_geometry(Path(self.path)) if here else released(self.path)

    def refusals(
        self,
        *,
        frames: int,
        height: int,
        width: int,
        precision: str,
        buckets: list[Size] | None = None,
    ) -> list[str]:
        """Why it cannot be trained like this, as far as this is known before a download."""
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
            buckets=buckets,
        )

    def prepare(self, **asked_for) -> Path:
        """The model's local folder, with all its parts. A hub id is downloaded.

        UserError if it cannot be trained as asked; its configuration files tell this before the
        weights are downloaded. `asked_for`: as for refusals().
        """
        folder = self.local_folder() if self.is_local() else self.download("*.json")
        require_known_settings(folder)
        self.require_suited(folder, asked_for)
        if not self.is_local():
            folder = self.download("*")
            # Now the weights tell their precision too.
            self.require_suited(folder, asked_for)
        require_parts(folder)
        return folder

    def require_suited(self, folder: Path, asked_for: dict) -> None:
        found = replace(self, path=str(folder)).refusals(**asked_for)
        if found:
            raise UserError(listed(f"{self.path} cannot be trained like this:", found))

    def local_folder(self) -> Path:
        self.require_here()
        return Path(self.path)

    def require_here(self) -> None:
        """UserError if a local model is not there."""
        if self.is_local() and not Path(self.path).is_dir():
            raise UserError(
                f"model.path={self.path} does not exist here, and is not a hub id (name/name). "
                f"{LAYOUT}"
            )

    def download(self, files: str) -> Path:
        """The files of every part that match the pattern, from the hub or its cache."""
        from cogvx.hub_client import OnTheHub

        wanted = ("model_index.json", *(f"{part}/{files}" for part in PARTS))
        local = f"model.path=/models/{self.path.rpartition('/')[2]}"
        asked = OnTheHub(self.path, self.revision, "model.path", local, "model.revision")
        return asked.download(wanted)


@dataclass
class Nano(Model):
    """The built-in tiny text-to-video model. It is written to `path` on first use."""

    blank: bool  # its transformer is not trained yet

    is_built_in: ClassVar[bool] = True
    takes_images: ClassVar[bool] = False

    def problems(self) -> list[str]:
        this, other = ("nano_i2v", "nano") if self.takes_images else ("nano", "nano_i2v")
        # A fine-tuned one may lie anywhere.
        if not Path(self.path).name.startswith("nano") and not Path(self.path).is_dir():
            return [
                f"model.path={self.path} with model={this}: that model comes with cogvx and has "
                f"no path. Say which model lies there: model=5b model.path={self.path}"
            ]
        if self.image_to_video is self.takes_images:
            return []
        return [
            f"model.image_to_video={str(self.image_to_video).lower()} with model={this}: "
            f"that model is model={other}"
        ]

    def is_local(self) -> bool:
        return True

    def require_here(self) -> None:
        """It is written when it is needed."""

    def expected_geometry(self) -> Geometry:
        return self.tiny().geometry

    def local_folder(self) -> Path:
        from cogvx.model import nano

        return nano.write_nano(Path(self.path), self.tiny(), blank=self.blank)

    def tiny(self):
        from cogvx.model import nano

        return nano.NANO_I2V if self.image_to_video else nano.NANO


@dataclass
class NanoI2v(Nano):
    """The built-in tiny image-to-video model."""

    takes_images: ClassVar[bool] = True


def require_known_settings(folder: Path) -> None:
    """UserError if a config.json has a setting that the installed diffusers does not know.

    diffusers would ignore it with a warning, and build another model.
    """
    import diffusers

    for part, class_name in (
        ("transformer", "CogVideoXTransformer3DModel"),
        ("vae", "AutoencoderKLCogVideoX"),
    ):
        settings = read_config(folder, part)
        if settings.get("_class_name", class_name) != class_name:
            raise UserError(
                f"{folder / part} is a {settings['_class_name']}; "
                f"CogVideoX has a {class_name} there"
            )
        known = inspect.signature(getattr(diffusers, class_name).__init__).parameters
        unknown = [name for name in settings if not name.startswith("_") and name not in known]
        if unknown:
            raise UserError(
                f"{folder / part / 'config.json'} sets {', '.join(unknown)}, which diffusers "
                f"{diffusers.__version__} does not know: "
                f"a newer checkpoint needs a newer diffusers (pip install -U diffusers)"
            )


def require_parts(folder: Path) -> None:
    """UserError if a part lacks its configuration or weights."""
    missing = [f"{part}/ is not there" for part in PARTS if not (folder / part).is_dir()]
    for part in ("transformer", "vae", "text_encoder"):
        if (folder / part).is_dir():
            read_config(folder, part)
            files = sorted((folder / part).glob("*.safetensors"))
            for path in files:
                require_weights(path)
            if not files:
                missing.append(f"{part}/ has no *.safetensors file")
    if missing:
        raise UserError(
            listed(f"{folder} is not a whole CogVideoX checkpoint:", missing) + f"\n{LAYOUT}"
        )


@dataclass(frozen=True)
class PretrainedModel:
    """A whole model on this machine. Each part is read from disk when asked for."""

    folder: Path
    device: torch.device
    dtype: torch.dtype  # of the frozen weights
    # Where quantised weights are kept for the next start. None: nowhere.
    cache: Cache | None = field(default=None, kw_only=True)

    def hub_commit(self) -> str | None:
        """The commit of a hub snapshot, which is its folder's name; None for a local folder."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    def geometry(self) -> Geometry:
        return read_geometry(self.folder)

    def transformer(self, dtype: torch.dtype | None = None):
        """On the CPU, in `dtype`, else in that of the frozen weights."""
        import torch

        from cogvx.model.unread import read_weights

        transformer = self.unread_transformer(dtype)
        read_weights(transformer, torch.device("cpu"))
        return transformer

    def unread_transformer(self, dtype: torch.dtype | None = None):
        """As transformer(), with its weights still in their files: blocks.arrange() reads them.

        UserError if the files are damaged, or of another model.
        """
        from diffusers import CogVideoXTransformer3DModel

        from cogvx.model.stored import KeptForms
        from cogvx.model.unread import UnreadWeights, without_weights

        folder, model_class = self.folder / "transformer", CogVideoXTransformer3DModel
        try:
            settings = model_class.load_config(folder)
            transformer = without_weights(
                lambda: model_class.from_config(settings), dtype or self.dtype
            )
            transformer.register_to_config(_name_or_path=str(self.folder))
            transformer.unread = UnreadWeights(transformer, folder, "diffusion_pytorch_model")
        # Damaged files raise errors of many kinds.
        except Exception as error:
            raise UserError(
                f"{folder} cannot be loaded as {model_class.__name__}: {first_line(error)}"
            ) from error
        if self.cache is not None:
            transformer.unread.kept = KeptForms(self.cache, self.transformer_fingerprint)
        return transformer

    def transformer_fingerprint(self) -> str:
        """A hub commit identifies the weights. Those of a local folder must be read."""
        return self.hub_commit() or self.cache.fingerprint(self.folder / "transformer")

    def vae(self, *, tiling: bool):
        from diffusers import AutoencoderKLCogVideoX

        from cogvx.model.lean_vae import keep_less

        vae = self.loaded(AutoencoderKLCogVideoX, "vae", torch_dtype=self.dtype).to(self.device)
        keep_less(vae)
        if tiling:
            vae.enable_tiling()
        return vae

    def tokenizer(self):
        from transformers import AutoTokenizer

        try:
            # A tokenizer may come with code of its own, which is never run.
            return AutoTokenizer.from_pretrained(self.folder / "tokenizer", trust_remote_code=False)
        except Exception as error:
            raise UserError(
                f"{self.folder / 'tokenizer'} cannot be read: {first_line(error)}"
            ) from error

    def text_encoder(self, *, streamed: bool = False):
        """The tokenizer and the encoder; `streamed`: its blocks' weights are stored on the CPU."""
        from transformers import T5EncoderModel

        return self.tokenizer(), placed(
            self.loaded(T5EncoderModel, "text_encoder", dtype=self.dtype), self.device, streamed
        )

    def noise_scheduler(self, sampler: Sampler | None = None):
        """DDIM or DPM with the model's schedule and trailing timesteps; None: as it ships."""
        import diffusers

        name = read_config(self.folder, "scheduler").get("_class_name", "")
        if name not in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
            raise UserError(
                f"{self.folder}/scheduler is a {name or 'nameless class'}; "
                f"CogVideoX uses CogVideoXDDIMScheduler or CogVideoXDPMScheduler"
            )
        shipped = getattr(diffusers, name).from_pretrained(self.folder, subfolder="scheduler")
        if sampler is None or sampler.value == name:
            return shipped
        return getattr(diffusers, sampler.value).from_config(shipped.config)

    def loaded(self, model_class, part: str, **dtype):
        size = sum(path.stat().st_size for path in (self.folder / part).iterdir())
        try:
            speaking = heartbeat(f"load    still reading {part}")
            with library_bars(shown=size > LONG_TO_LOAD), speaking:
                # Other files of weights are pickles, which could run code.
                model = model_class.from_pretrained(
                    self.folder, subfolder=part, use_safetensors=True, **dtype
                )
        # Damaged files raise errors of many kinds.
        except Exception as error:
            raise UserError(
                f"{self.folder / part} cannot be loaded as {model_class.__name__}: "
                f"{first_line(error)}"
            ) from error
        return model.eval().requires_grad_(False)


def placed(text_encoder, device: torch.device, streamed: bool):
    """A T5 encoder on the device; `streamed`: its blocks' weights are stored on the CPU."""
    from cogvx.model import transfer
    from cogvx.model.kept import BlockStore
    from cogvx.model.offload import WeightOffloader
    from cogvx.options.memory import Storage

    if streamed:
        store = BlockStore(None, Storage.own, device, streamed=True)
        WeightOffloader(text_encoder.encoder.block, store, device, streamed=True)
    transfer.bring(text_encoder, device)
    return text_encoder
