"""What a run trains: a LoRA, or every weight. Two classes with the same methods.

weights_of() is the only place that chooses between them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cogvx.model import full, lora

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel

    from cogvx.model.pretrained import PretrainedModel
    from cogvx.options.optimizers import Optimizer

# CogVideo's own trainer uses 1e-5 for full fine-tuning.
HIGH_RATE_FOR_FULL = 1e-4


def weights_of(settings: lora.Lora | None) -> LoraWeights | FullWeights:
    """The config's `lora` section decides; None trains every weight."""
    return FullWeights() if settings is None else LoraWeights(settings)


@dataclass(frozen=True)
class LoraWeights:
    """Low-rank updates of linear layers, over a frozen base model."""

    settings: lora.Lora
    result: ClassVar[str] = lora.WEIGHTS  # the file that a run delivers
    freezes_base: ClassVar[bool] = True  # memory modes may store the base model's weights elsewhere
    has_strength: ClassVar[bool] = True  # can be applied more or less strongly after training

    def __str__(self) -> str:
        return f"LoRA rank {self.settings.rank}"

    def require_start(self) -> Path | None:
        """The local file or folder of lora.init_from, or None. UserError if it does not exist."""
        return self.settings.start_file()

    def attach(self, base: PretrainedModel, seed: int) -> CogVideoXTransformer3DModel:
        """The base model's transformer with an adapter that does not change its output yet.

        blocks.arrange() reads its frozen weights.
        """
        # DoRA starts from the norms of the weights.
        whole = self.settings.use_dora
        transformer = base.transformer() if whole else base.unread_transformer()
        self.settings.attach(transformer, seed)
        return transformer

    def describe(self, transformer: CogVideoXTransformer3DModel) -> str:
        settings = self.settings
        variant = ", rsLoRA" * settings.use_rslora + ", DoRA" * settings.use_dora
        modules = lora.count_modules(lora.state(transformer))
        return (
            f"lora    rank {settings.rank}, alpha {settings.lora_alpha:g}{variant} on {modules} "
            f"layers: {millions(transformer)} M trainable parameters"
        )

    def start(self, transformer: CogVideoXTransformer3DModel) -> list[str]:
        """Loads lora.init_from, if it is set. Returns the line that says so."""
        path = self.settings.start_file()
        return [] if path is None else [f"init    {self.settings.start_from(transformer, path)}"]

    def save(self, transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
        lora.save(transformer, folder)

    def save_result(
        self, transformer: CogVideoXTransformer3DModel, folder: Path, dtype: torch.dtype
    ) -> None:
        """An adapter is small, so it is delivered in fp32, whatever `dtype` is."""
        lora.save(transformer, folder)

    def load(self, transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
        lora.load(transformer, folder)

    def differences(
        self, transformer: CogVideoXTransformer3DModel, folder: Path, *, values: bool
    ) -> list[str]:
        return lora.adapter_differences(transformer, folder, values=values)

    def inference_settings(self) -> dict[str, object]:
        """What inference.json says about the adapter."""
        return {
            "rank": self.settings.rank,
            "lora_alpha": self.settings.lora_alpha,
            "lora_scale": self.settings.scale,
            "lora_scale_note": "load_lora_weights applies it by itself, from the file's metadata; "
            "do not set an adapter weight for it",
        }

    @contextlib.contextmanager
    def base_model(self, transformer: CogVideoXTransformer3DModel) -> Iterator[None]:
        """Within this context the transformer is the base model."""
        transformer.disable_adapters()
        try:
            yield
        finally:
            transformer.enable_adapters()

    def warnings(self, optimizer: Optimizer) -> list[str]:
        return []

    def variants(
        self,
        base: PretrainedModel,
        seed: int,
        wanted: list[tuple[Path | None, float]],
        arrange: Callable[[CogVideoXTransformer3DModel], None],
    ) -> Iterator[CogVideoXTransformer3DModel]:
        """For each folder and strength the tuned transformer; for None the base model.

        arrange(transformer) reads its weights to the device.
        """
        transformer = self.attach(base, seed)
        arrange(transformer)
        for folder, strength in wanted:
            if folder is None:
                transformer.disable_adapters()
            else:
                transformer.enable_adapters()
                self.load(transformer, folder)
                transformer.set_adapters("default", weights=strength)
            # peft makes active adapters trainable.
            transformer.requires_grad_(False)
            yield transformer


@dataclass(frozen=True)
class FullWeights:
    """Every weight of the transformer."""

    result: ClassVar[str] = full.FOLDER  # the folder that a run delivers
    freezes_base: ClassVar[bool] = False
    has_strength: ClassVar[bool] = False

    def __str__(self) -> str:
        return "full fine-tuning"

    def require_start(self) -> None:
        """The base model is the start."""

    def attach(self, base: PretrainedModel, seed: int) -> CogVideoXTransformer3DModel:
        import torch

        transformer = base.unread_transformer(torch.float32)
        full.train_all(transformer)
        return transformer

    def describe(self, transformer: CogVideoXTransformer3DModel) -> str:
        return (
            f"full    every weight: {millions(transformer)} M trainable parameters, stored in fp32"
        )

    def start(self, transformer: CogVideoXTransformer3DModel) -> list[str]:
        return []

    def save(self, transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
        full.save_transformer(transformer, folder)

    def save_result(
        self, transformer: CogVideoXTransformer3DModel, folder: Path, dtype: torch.dtype
    ) -> None:
        """In the precision of the run, which is what a pipeline loads."""
        full.save_transformer(transformer, folder, dtype)

    def load(self, transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
        full.load_transformer(transformer, folder)

    def differences(
        self, transformer: CogVideoXTransformer3DModel, folder: Path, *, values: bool
    ) -> list[str]:
        return full.transformer_differences(transformer, folder, values=values)

    def inference_settings(self) -> dict[str, object]:
        return {}

    def base_model(
        self, transformer: CogVideoXTransformer3DModel
    ) -> contextlib.AbstractContextManager[None]:
        """The caller asks for it before it loads trained weights: it is the base model already."""
        return contextlib.nullcontext()

    def warnings(self, optimizer: Optimizer) -> list[str]:
        rate = optimizer.learning_rate
        if rate <= HIGH_RATE_FOR_FULL or optimizer.finds_its_own_rate:
            return []
        return [
            f"optimizer.learning_rate={rate:g} with lora=null: "
            f"1e-5 is usual when every weight is trained"
        ]

    def variants(
        self,
        base: PretrainedModel,
        seed: int,
        wanted: list[tuple[Path | None, float]],
        arrange: Callable[[CogVideoXTransformer3DModel], None],
    ) -> Iterator[CogVideoXTransformer3DModel]:
        """For each folder the tuned transformer; for None the base model.

        There is one transformer in memory: the one before loses its weights. UserError if a folder
        has another model.
        """
        from cogvx.model import offload

        before = None
        for folder, _ in wanted:
            source = base
            if folder is not None:
                full.require_same_model(folder, base.folder)
                source = dataclasses.replace(base, folder=folder, cache=None)
            if before is not None:
                offload.let_go(before)
            before = source.unread_transformer()
            arrange(before)
            yield before


def millions(transformer: CogVideoXTransformer3DModel) -> str:
    """The number of trainable parameters, in millions."""
    return f"{sum(weight.numel() for weight in lora.trainable(transformer)) / 1e6:.2f}"
