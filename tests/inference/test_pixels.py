"""What is seen in the pixels is right for every kind of clip, also after the VAE."""

import dataclasses

import numpy
import pytest
import torch

from cogvx.data import world
from cogvx.inference import pixels
from cogvx.model import nano
from cogvx.model.pretrained import PretrainedModel
from cogvx.training import autoencoder

NAMES = ("shape", "colour", "background", "direction")


def small(scene, **other):
    return dataclasses.replace(scene, width=64, height=64, **other)


def wrong(scene, frames) -> list[str]:
    found = pixels.look_at(frames)
    return [
        f"{name} {getattr(scene, name)} seen as {getattr(found, name)}"
        for name in NAMES
        if getattr(found, name) != getattr(scene, name)
    ]


@pytest.mark.slow
def test_every_kind_of_clip_is_seen_as_what_it_is():
    kinds = world.scenes(672, seed=3)
    kinds += [dataclasses.replace(scene, shape="ring") for scene in kinds[:150]]
    kinds += [dataclasses.replace(scene, colour="black") for scene in kinds[:150]]
    assert [w for scene in kinds for w in wrong(small(scene), world.draw_clip(small(scene)))] == []


@pytest.fixture(scope="module")
def vae():
    return PretrainedModel(nano.SHIPPED_WEIGHTS / "nano", torch.device("cpu"), torch.float32).vae(
        tiling=False
    )


@pytest.mark.slow
def test_clips_that_the_vae_restored_are_seen_as_what_they_are(vae):
    scenes = [
        small(scene, shape=shape)
        for scene, shape in zip(world.scenes(32, 5), [*world.SHAPES, "ring"] * 8, strict=True)
    ]
    mistakes = []
    with torch.no_grad():
        for scene in scenes:
            restored = vae.decode(
                vae.encode(autoencoder.as_input(world.draw_clip(scene))[None]).latent_dist.mean
            ).sample[0]
            frames = (
                ((restored.permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5)
                .round()
                .numpy()
                .astype(numpy.uint8)
            )
            mistakes += wrong(scene, frames)
    assert len(mistakes) <= 1, mistakes


@pytest.mark.slow
def test_nanos_vae_restores_clips_it_has_not_seen(vae):
    found = autoencoder.measure(vae)
    assert found["psnr"] >= 27, "dB, over 64 clips of the world"
    assert (
        vae.config.scaling_factor
        == nano.SCALING_FACTOR
        == pytest.approx(1 / found["latent_std"], rel=0.01)
    )


def test_nothing_is_seen_where_nothing_is():
    even = numpy.full((9, 64, 64, 3), world.COLOURS["blue"], numpy.uint8)
    found = pixels.look_at(even)
    assert (found.shape, found.colour, found.direction, found.background) == (
        None,
        None,
        None,
        "blue",
    )
    noise = numpy.random.default_rng(0).integers(0, 256, (9, 64, 64, 3)).astype(numpy.uint8)
    assert pixels.look_at(noise).direction is None
    still = numpy.stack(
        [world.draw_clip(small(world.Scene("circle", "red", "blue", "right")))[4]] * 9
    )
    found = pixels.look_at(still)
    assert (found.shape, found.direction, found.motion) == ("circle", None, 0.0)


def test_a_slanting_way_has_no_direction():
    scene = small(world.Scene("circle", "red", "blue", "right"))
    assert (
        pixels.look_at(world.paint(scene, (214, 48, 49), (36, 113, 209), (0.7, -0.7))).direction
        is None
    )


def test_saturation_is_that_of_the_pixels():
    assert pixels.look_at(numpy.full((2, 8, 8, 3), 90, numpy.uint8)).saturation == 0
    assert pixels.look_at(numpy.full((2, 8, 8, 3), (200, 100, 0), numpy.uint8)).saturation == 1
