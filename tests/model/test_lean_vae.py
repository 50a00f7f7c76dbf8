"""The VAE in less memory makes the same bits as diffusers' own."""

import copy
import itertools

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogvx.model.lean_vae import keep_less
from cogvx.plan.trace import tracing

# The released VAE's kinds of blocks, with few channels. Tiles are 16 pixels high and wide.
SETTINGS = {
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "block_out_channels": (8, 16, 16, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_height": 32,
    "sample_width": 32,
}


@pytest.fixture(scope="module")
def both():
    """diffusers' own VAE, and the same one in less memory."""
    torch.manual_seed(0)
    own = AutoencoderKLCogVideoX(**SETTINGS).eval().requires_grad_(False)
    lean = copy.deepcopy(own)
    keep_less(lean)
    return own, lean


def decoded(vae, latents):
    with torch.no_grad():
        return vae.decode(latents).sample


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiling", "frames"), itertools.product((False, True), (1, 2, 3, 5)), ids=str
)
def test_decoding_gives_the_same_bits(both, tiling, frames):
    latents = torch.randn(1, 4, frames, 4, 6, generator=torch.Generator().manual_seed(1))
    for vae in both:
        vae.use_tiling = tiling
    expected, found = (decoded(vae, latents) for vae in both)
    assert found.shape[2] > 0 and expected.std() > 0 and found.equal(expected)


def test_encoding_gives_the_same_bits(both):
    pixels = torch.randn(1, 3, 17, 32, 48, generator=torch.Generator().manual_seed(1))
    found = []
    for vae in both:
        vae.use_tiling = False
        with torch.no_grad():
            found.append(vae.encode(pixels).latent_dist.parameters)
    assert found[0].shape[2] == 5 and found[1].equal(found[0])


def test_the_same_bits_in_16_bits(both):
    latents = torch.randn(1, 4, 5, 4, 6).bfloat16()
    expected, found = (decoded(copy.deepcopy(vae).bfloat16(), latents) for vae in both)
    assert found.equal(expected)


@pytest.mark.slow
def test_it_takes_two_thirds_of_the_memory():
    peaks = []
    for spare in (False, True):
        with tracing() as recorder:
            vae = AutoencoderKLCogVideoX(**SETTINGS | {"block_out_channels": (64, 128, 128, 256)})
            vae.requires_grad_(False)
            if spare:
                keep_less(vae)
            latents = torch.zeros(1, 4, 5, 30, 45)
            before = recorder.now[None]
            recorder.most[None] = before
            decoded(vae, latents)
            peaks.append(recorder.most[None] - before)
    assert peaks[1] < 0.67 * peaks[0], peaks
