"""The VAE of diffusers in less memory, with the same bits.

The VAE takes a clip a few frames at a time. Each convolution over time keeps its last input frames
for the next call, in what diffusers calls conv_cache.

B batch, C channels, F frames, H height, W width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class UsedOnce(dict):
    """A conv_cache whose entries are gone once they are read.

    Otherwise the last call's frames stay in memory until the whole next call is done.
    """

    @classmethod
    def of(cls, cache: dict) -> UsedOnce:
        return cls({n: cls.of(v) if isinstance(v, dict) else v for n, v in cache.items()})

    def get(self, name: str, default: object = None) -> object:
        return self.pop(name, default)


def keep_less(vae) -> None:
    """For a VAE that is not trained: it writes over results that a backward pass would need."""
    from diffusers.models.autoencoders import autoencoder_kl_cogvideox as theirs

    for half in (vae.encoder, vae.decoder):
        half.forward = functools.partial(frames_used_once, half.forward)
    for module in vae.modules():
        if isinstance(module, theirs.CogVideoXSpatialNorm3D):
            module.forward = functools.partial(normalized, module)


def frames_used_once(forward: Callable, *given, **named) -> tuple[Tensor, UsedOnce]:
    result, cache = forward(*given, **named)
    return result, UsedOnce.of(cache)


def normalized(norm, f: Tensor, zq: Tensor, conv_cache: dict | None = None) -> tuple[Tensor, dict]:
    """GroupNorm of f [B, C, F, H, W], scaled and shifted by the latents zq at every pixel.

    diffusers has up to six tensors of this size at once; here they are three. It also keeps a copy
    of the resized latents for each convolution, whose kernels of one frame never use it.
    """
    zq = resized(zq, f)
    result = norm.norm_layer(f)
    result *= norm.conv_y.conv(zq)
    result += norm.conv_b.conv(zq)
    return result, {}


def resized(zq: Tensor, f: Tensor) -> Tensor:
    """The latents at the size of f. Of an odd number of frames the first one stands alone."""
    frames, *size = f.shape[2:]
    if frames == 1 or frames % 2 == 0:
        return F.interpolate(zq, size=(frames, *size))
    first = F.interpolate(zq[:, :, :1], size=(1, *size))
    rest = F.interpolate(zq[:, :, 1:], size=(frames - 1, *size))
    return torch.cat([first, rest], dim=2)
