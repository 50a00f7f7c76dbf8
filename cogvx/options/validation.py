"""How a model is judged while it trains: held-out loss and videos. Values: conf/config.yaml."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cogvx.files import absolute


class Sampler(Enum):
    """How a video's noise is removed step by step, with the name of its class in diffusers."""

    ddim = "CogVideoXDDIMScheduler"
    dpm = "CogVideoXDPMScheduler"


class Preview(Enum):
    """What is shown between the validation videos: nothing, or colours guessed from latents."""

    none = "none"
    latents = "latents"


@dataclass
class Validation:
    validation_prompt: str | None
    validation_prompt_separator: str
    validation_prompts_file: Path | None
    validation_images: str | None
    num_validation_videos: int
    scored_prompts: int
    validation_steps: int | None
    num_inference_steps: int
    scheduler: Sampler | None  # None: as the checkpoint ships
    guidance_scale: float
    use_dynamic_cfg: bool
    negative_prompt: str
    preview: Preview
    preview_steps: int
    heldout_steps: int
    heldout_timesteps: int
    heldout_draws: int

    def make_paths_absolute(self) -> None:
        if self.validation_images is not None:
            separator = self.validation_prompt_separator
            names = self.validation_images.split(separator)
            self.validation_images = separator.join(
                str(absolute(Path(name.strip()))) for name in names
            )

    def problems(self) -> list[str]:
        found = [
            f"validation.{name}={value}: must be 1 or more"
            for name in (
                "validation_steps",
                "num_inference_steps",
                "preview_steps",
                "heldout_steps",
                "heldout_timesteps",
                "heldout_draws",
            )
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if self.num_inference_steps > 1000:
            found.append(
                f"validation.num_inference_steps={self.num_inference_steps}: must be at most 1000; "
                f"50 are usual"
            )
        for name in ("num_validation_videos", "scored_prompts"):
            if getattr(self, name) < 0:
                found.append(f"validation.{name}={getattr(self, name)}: must be 0 (none) or more")
        if self.validation_prompt is not None and self.validation_prompts_file is not None:
            found.append(
                "validation.validation_prompt and validation.validation_prompts_file are both set: "
                "leave one null"
            )
        if not self.validation_prompt_separator:
            found.append("validation.validation_prompt_separator is empty: the usual one is :::")
        return found
