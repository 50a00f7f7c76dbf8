"""What each memory setting does to the videos of a result: a LoRA, or a whole transformer."""

import numpy
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from cogvx.model import full, lora
from cogvx.model.pretrained import PretrainedModel
from cogvx.training.ranks import Ranks
from cogvx.training.setup import frozen_variants
from cogvx.training.videos import VideoGenerator

CPU = torch.device("cpu")
SMALL = ["data.max_num_frames=9", "data.height=64", "data.width=64", "lora.rank=4"]
ASKED = ["task=generate", "task.prompt=a", "validation.num_inference_steps=2", *SMALL]
KINDS = ["LoRA", "full"]

EVERY_DAY = ["memory.stream_weights=true", "memory.base_storage=int8"]
SAME_BITS = [
    EVERY_DAY[0],
    "memory.recompute=selective memory.offload_activations=true",
    "memory.gradient_checkpointing=true memory.offload_optimizer=true",
    "memory=balanced memory.vae_tiling=false train.ema_decay=0.9 optimizer=muon",
]
# How far a pixel may be off, on average, of 255 levels. Measured with nano: about two thirds of it.
NEARLY = {
    "memory.frugal_videos=true": 0.001,
    "memory.feed_forward_chunks=4": 0.001,
    EVERY_DAY[1]: 0.8,
    "memory.base_storage=int8 memory.stream_weights=true": 0.8,
    "memory.base_storage=fp8": 4,
    "memory.base_storage=nf4": 9,
    "memory.vae_tiling=true": 2,
    "memory=minimal memory.vae_tiling=false": 0.001,
    "memory=low_full memory.vae_tiling=false": 0.001,
    "train.compile=true": 0.01,
}


def cases(settings) -> list:
    return [
        pytest.param(each, marks=() if each in EVERY_DAY else pytest.mark.slow) for each in settings
    ]


@pytest.fixture(scope="module")
def pretrained(nano_folder):
    return PretrainedModel(nano_folder, CPU, torch.float32)


@pytest.fixture(scope="module")
def places(pretrained, compose, tmp_path_factory):
    """The folders of a LoRA and of a whole transformer that change the videos, by their kind."""
    found = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    noise = torch.Generator().manual_seed(0)
    transformer = pretrained.transformer()
    for parameter in transformer.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    full.save_transformer(transformer, found["full"])
    transformer = pretrained.transformer()
    compose("lora.rank=4").lora.attach(transformer, seed=0)
    with torch.no_grad():
        for parameter in lora.trainable(transformer):
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    lora.save(transformer, found["LoRA"])
    return found


@pytest.fixture(scope="module")
def videos(pretrained, places, compose):
    """videos("LoRA", "memory=low", ...): the frames of the base model and of the result."""

    def make(kind: str, *overrides: str) -> list[numpy.ndarray]:
        without = ["lora=null"] if kind == "full" else []
        asked = [each for each in ASKED if not (without and each.startswith("lora."))]
        config = compose(*asked, *without, "train.mixed_precision=no", *overrides)
        shape = pretrained.geometry().text_tokens, pretrained.transformer().config.text_embed_dim
        embeds = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        prompts = {"a": embeds, "": torch.zeros(shape)}
        generator = VideoGenerator(config, pretrained, prompts.get, {})
        wanted = [(None, 1.0), (places[kind], 1.0)]
        # Another test's precision would stay.
        AcceleratorState._reset_state(reset_partial_state=True)
        ranks = Ranks(Accelerator(cpu=True, mixed_precision="no"))
        return [
            generator.generate(transformer, generator.vae(), "a", 0)
            for transformer in frozen_variants(config, pretrained, ranks, wanted)
        ]

    return make


@pytest.fixture(scope="module")
def plain(videos):
    return {kind: videos(kind) for kind in KINDS}


def distance(one: numpy.ndarray, other: numpy.ndarray) -> float:
    return float(numpy.abs(one.astype(float) - other).mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overrides", cases(SAME_BITS))
def test_the_same_bits(videos, plain, kind, overrides):
    base, result = plain[kind]
    assert distance(base, result) > 3, "the result does nothing"
    for found, expected in zip(videos(kind, *overrides.split()), plain[kind], strict=True):
        assert numpy.array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overrides", cases(NEARLY))
def test_nearly_the_same(videos, plain, kind, overrides):
    for found, expected in zip(videos(kind, *overrides.split()), plain[kind], strict=True):
        print(kind, overrides, distance(found, expected))
        assert distance(found, expected) <= NEARLY[overrides]
