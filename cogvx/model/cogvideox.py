"""CogVideoX in training: scaling, noise, positions and the predicted velocity.

Each equals what the diffusers pipeline computes.

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
    """The transformer with its noise schedule and positions. The schedule is always fp32."""

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
        # Of the present bucket and the one before. One of 85,000 tokens is 44 MB on the GPU.
        self.rotary_embeddings = lru_cache(maxsize=2)(self.compute_rotary_embeddings)

    def scale(self, latents: Tensor) -> Tensor:
        """The VAE's latents [B, C, F, H, W] to the transformer's [B, F, C, H, W].

        They get unit variance. For 1.5, copies of the first frame are put in front until the frames
        fill whole tokens. They are trained like the others; CogVideoXPipeline samples them too, and
        drops them.
        """
        latents = (latents * self.geometry.scaling_factor).permute(0, 2, 1, 3, 4)
        padding = self.geometry.padding(latents.shape[1])
        return torch.cat([latents[:, :1]] * padding + [latents], dim=1) if padding else latents

    def tokens(self, latents: Tensor) -> int:
        """Of a batch [B, C, F, H, W] from the VAE, prompts and padding included."""
        frames, height, width = latents.shape[2:]
        geometry = self.geometry
        return len(latents) * geometry.tokens(
            frames=(frames - 1) * geometry.temporal_stride + 1,
            height=height * geometry.spatial_stride,
            width=width * geometry.spatial_stride,
        )

    def image_condition(self, image_latents: Tensor | None, frames: int) -> Tensor | None:
        """The image latents [B, C, 1, H, W] as further channels [B, F, C, H, W].

        They stand on the first of `frames` latent frames, padding included; the others are zeros.
        1.5-5B-I2V was trained on image latents divided by the scaling factor
        (invert_scale_latents). The others multiply. None for text-to-video.
        """
        if image_latents is None:
            return None
        factor = self.geometry.scaling_factor
        factor = 1 / factor if self.geometry.invert_scale_latents else factor
        scaled = factor * image_latents.permute(0, 2, 1, 3, 4)
        zeros = scaled.new_zeros(len(scaled), frames - 1, *scaled.shape[2:])
        return torch.cat([scaled, zeros], dim=1)

    def signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at [B] timesteps, [B, 1, 1, 1, 1]."""
        alphas_cumprod = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, noise_level = self.signal_and_noise(timesteps)
        return signal * latents + noise_level * noise

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target (Salimans and Ho 2022, Progressive Distillation, appendix D)."""
        signal, noise_level = self.signal_and_noise(timesteps)
        return signal * noise - noise_level * latents

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) / (SNR + 1), [B], for a loss of velocities.

        Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting.
        """
        alphas_cumprod = self.alphas_cumprod[timesteps]
        # Numerator and denominator are multiplied by 1 - alphas_cumprod = 1 / (SNR + 1).
        return torch.minimum(alphas_cumprod, gamma * (1 - alphas_cumprod))

    def predict_velocity(
        self,
        noisy_latents: Tensor,
        condition: Tensor | None,
        prompt_embeds: Tensor,
        timesteps: Tensor,
    ) -> Tensor:
        """Noisy latents and condition [B, F, C, H, W], prompts [B, S, D] -> [B, F, C, H, W]."""
        _, frames, _, height, width = noisy_latents.shape
        ofs = image_rotary_emb = None
        if self.geometry.ofs:
            ofs = torch.full((1,), OFS, dtype=self.dtype, device=self.device)
        if self.geometry.rotary:
            image_rotary_emb = self.rotary_embeddings(frames, height, width)
        given = noisy_latents if condition is None else torch.cat([noisy_latents, condition], dim=2)
        return self.transformer(
            hidden_states=given.to(self.dtype),
            encoder_hidden_states=prompt_embeds.to(self.dtype),
            timestep=timesteps,
            ofs=ofs,
            image_rotary_emb=image_rotary_emb,
            return_dict=False,
        )[0]

    def compute_rotary_embeddings(
        self, frames: int, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of the tokens' rotations, [F/p_t * H/p * W/p, head_dim] each.

        1.0 resizes the grid to the one that its positions were trained for. (CogVideo's own
        fine-tuning builds it from the clip instead.) 1.5 cuts its grid out of a larger one.
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
