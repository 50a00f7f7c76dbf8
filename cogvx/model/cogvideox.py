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


class CogVideoX:
    """The transformer with its noise schedule and positions. Schedule arithmetic is fp32 whatever the weights are."""

    def __init__(self, transformer, noise_scheduler, geometry: Geometry, *, device: torch.device, dtype: torch.dtype):
        self.transformer = transformer
        self.geometry = geometry
        self.device = device
        self.dtype = dtype  # of the transformer's inputs
        self.num_timesteps = noise_scheduler.config.num_train_timesteps
        self.alphas_cumprod = noise_scheduler.alphas_cumprod.to(device, torch.float32)
        self.rotary_embeddings = lru_cache(maxsize=8)(self.compute_rotary_embeddings)

    def scale(self, latents: Tensor) -> Tensor:
        """The VAE's latents to the transformer's: unit variance, frames first."""
        return (latents * self.geometry.scaling_factor).permute(0, 2, 1, 3, 4)  # [B, C, F, H, W] -> [B, F, C, H, W]

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

    def predict_velocity(self, noisy_latents: Tensor, prompt_embeds: Tensor, timesteps: Tensor) -> Tensor:
        _, frames, _, height, width = noisy_latents.shape
        return self.transformer(
            hidden_states=noisy_latents.to(self.dtype),
            encoder_hidden_states=prompt_embeds.to(self.dtype),
            timestep=timesteps,
            image_rotary_emb=self.rotary_embeddings(frames, height, width) if self.geometry.rotary else None,
            return_dict=False,
        )[0]

    def compute_rotary_embeddings(self, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the tokens' rotations, [F * H/p * W/p, head_dim] each. The grid is resized to the one the positions
        were trained for, as CogVideoXPipeline does (CogVideo's own fine-tuning builds it from the clip instead)."""
        patch = self.geometry.patch_size
        grid = (height // patch, width // patch)
        base_height, base_width = self.geometry.sample_height // patch, self.geometry.sample_width // patch
        return get_3d_rotary_pos_embed(
            embed_dim=self.geometry.head_dim,
            crops_coords=get_resize_crop_region_for_grid(grid, base_width, base_height),
            grid_size=grid,
            temporal_size=frames,
            device=self.device,
        )
