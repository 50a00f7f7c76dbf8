"""CogVideoX as training sees it: scaling, noise, positions and the predicted velocity, each equal to the pipeline's.

B batch, F latent frames, C channels, H W latent size, S text tokens, D their width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor

from cogvx.model.geometry import Geometry

OFS = 2.0  # the offset that CogVideoXImageToVideoPipeline gives to 1.5-5B-I2V


class CogVideoX:
    """The transformer with its noise schedule and positions. Schedule arithmetic is fp32 whatever the weights are."""

    def __init__(
        self,
        transformer,
        noise_scheduler,
        geometry: Geometry,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.transformer = transformer
        self.geometry = geometry
        self.device = device
        self.dtype = dtype  # of the transformer's inputs
        self.num_timesteps = noise_scheduler.config.num_train_timesteps
        self.alphas_cumprod = noise_scheduler.alphas_cumprod.to(device, torch.float32)
        self.rotary_embeddings = lru_cache(maxsize=8)(self.compute_rotary_embeddings)

    def scale(self, latents: Tensor) -> Tensor:
        """The VAE's latents to the transformer's: unit variance, frames first, and for 1.5 copies of the first frame in front
        where a token needs them. They are trained like the others; CogVideoXPipeline samples them and drops them again."""
        latents = (latents * self.geometry.scaling_factor).permute(
            0, 2, 1, 3, 4
        )  # [B, C, F, H, W] -> [B, F, C, H, W]
        padding = self.geometry.padding(latents.shape[1])
        return torch.cat([latents[:, :1]] * padding + [latents], dim=1) if padding else latents

    def image_condition(self, image_latents: Tensor | None, frames: int) -> Tensor | None:
        """What stands beside the noisy latents in the channels: the image's latents [B, C, 1, H, W] on the first of `frames`
        latent frames, padding included, and zeros on the others, [B, F, C, H, W]. None for text-to-video.

        1.5-5B-I2V was trained on image latents divided by the scaling factor (invert_scale_latents), the others multiply.
        """
        if image_latents is None:
            return None
        factor = self.geometry.scaling_factor
        scaled = (
            1 / factor if self.geometry.invert_scale_latents else factor
        ) * image_latents.permute(0, 2, 1, 3, 4)
        return torch.cat(
            [scaled, scaled.new_zeros(len(scaled), frames - 1, *scaled.shape[2:])], dim=1
        )

    def signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at timesteps [B], each [B, 1, 1, 1, 1]."""
        alphas_cumprod = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, noise_level = self.signal_and_noise(timesteps)
        return signal * latents + noise_level * noise

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the transformer learns to predict (Salimans and Ho 2022, Progressive Distillation, appendix D)."""
        signal, noise_level = self.signal_and_noise(timesteps)
        return signal * noise - noise_level * latents

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) / (SNR + 1), [B]: Hang et al. 2023 (Efficient Diffusion Training via Min-SNR Weighting), for velocities."""
        alphas_cumprod = self.alphas_cumprod[timesteps]
        return torch.minimum(
            alphas_cumprod, gamma * (1 - alphas_cumprod)
        )  # both over (SNR + 1) = 1 / (1 - alphas_cumprod)

    def predict_velocity(
        self,
        noisy_latents: Tensor,
        condition: Tensor | None,
        prompt_embeds: Tensor,
        timesteps: Tensor,
    ) -> Tensor:
        """[B, F, C, H, W], of the noisy latents' shape; condition and prompt_embeds [B, S, D] as they are beside them."""
        _, frames, _, height, width = noisy_latents.shape
        given = noisy_latents if condition is None else torch.cat([noisy_latents, condition], dim=2)
        return self.transformer(
            hidden_states=given.to(self.dtype),
            encoder_hidden_states=prompt_embeds.to(self.dtype),
            timestep=timesteps,
            ofs=torch.full((1,), OFS, dtype=self.dtype, device=self.device)
            if self.geometry.ofs
            else None,
            image_rotary_emb=self.rotary_embeddings(frames, height, width)
            if self.geometry.rotary
            else None,
            return_dict=False,
        )[0]

    def compute_rotary_embeddings(
        self, frames: int, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of the tokens' rotations, [F/p_t * H/p * W/p, head_dim] each, as CogVideoXPipeline makes them.

        1.0 resizes the grid to the one its positions were trained for (CogVideo's own fine-tuning builds it from the clip
        instead); 1.5 cuts its grid out of a larger one.
        """
        geometry, patch = self.geometry, self.geometry.patch_size
        grid = (height // patch, width // patch)
        base_height, base_width = geometry.sample_height // patch, geometry.sample_width // patch
        common = {"embed_dim": geometry.head_dim, "grid_size": grid, "device": self.device}
        if geometry.patch_size_t is None:
            crop = get_resize_crop_region_for_grid(grid, base_width, base_height)
            return get_3d_rotary_pos_embed(crops_coords=crop, temporal_size=frames, **common)
        return get_3d_rotary_pos_embed(
            crops_coords=None,
            temporal_size=frames // geometry.patch_size_t,
            grid_type="slice",
            max_size=(base_height, base_width),
            **common,
        )
