"""For each family, training passes to the transformer what the pipeline passes, bit for bit."""

import json
import shutil

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from families import FAMILIES, differences_from_the_pipeline, model_of, pipeline_class, tiny

from cogvx.errors import UserError
from cogvx.model.geometry import Geometry
from cogvx.model.released import NAMES, RELEASED

# Native size, other sizes; odd and even numbers of latent frames. 5B-I2V has one size.
CASES = [(9, 48, 64), (13, 48, 64), (17, 64, 48), (5, 32, 80), (1, 48, 48)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("frames", "height", "width"), CASES)
def test_training_passes_what_the_pipeline_passes(
    family, frames, height, width, family_folder, compose
):
    if tiny(family).geometry.size_problems(height, width):
        height, width = 48, 64
    found = differences_from_the_pipeline(
        family_folder(family), family, compose, frames, height, width
    )
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("latent_frames", [1, 2, 3, 4])
def test_scaling_and_padding_are_undone_by_the_pipeline(family, latent_frames, family_folder):
    pipeline, model = (
        pipeline_class(family).from_pretrained(family_folder(family)),
        model_of(family_folder(family)),
    )
    latents = torch.randn((1, 16, latent_frames, 8, 8), generator=torch.Generator().manual_seed(0))
    scaled, padding = model.scale(latents), model.geometry.padding(latent_frames)
    assert padding == (latent_frames % 2 if family.startswith("1_5") else 0)
    assert all(torch.equal(scaled[:, 0], scaled[:, index]) for index in range(padding + 1)), (
        "the first frame's copies"
    )
    with torch.no_grad():
        decoded = pipeline.decode_latents(scaled[:, padding:])  # it drops them from the front too
        assert torch.allclose(decoded, pipeline.vae.decode(latents).sample, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_noise_schedule_is_the_familys(family, family_folder):
    model = model_of(family_folder(family))
    assert abs(model.alphas_cumprod[0].item() - (0.99745 if family == "2b" else 0.99915)) < 1e-5
    assert model.alphas_cumprod[999] == 0


PUBLISHED = {
    "2b": 1.694,
    "5b": 5.570,
    "5b_i2v": 5.570,
    "1_5_5b": 5.571,
    "1_5_5b_i2v": 5.572,
}  # 10^9 parameters


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_released_configurations_have_the_published_sizes(family, compose):
    """Full size, without weights: parameters, and the LoRA of the project's default on them."""
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**RELEASED[family][0])
        assert round(sum(p.numel() for p in transformer.parameters()) / 1e9, 3) == PUBLISHED[family]
        compose("lora.rank=64").lora.attach(transformer, seed=0)
    trained = [p for p in transformer.parameters() if p.requires_grad]
    assert (len(trained), round(sum(p.numel() for p in trained) / 1e6, 1)) == (
        (240, 29.5) if family == "2b" else (336, 66.1)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_released_checkpoint_is_known_before_it_is_here(family, compose):
    """Its own size and length are legal; the geometry comes from configuration files alone."""
    config = compose(f"model={family}", "data=text_files", "data.instance_data_root=/clips")
    geometry = config.model.expected_geometry()
    assert isinstance(geometry, Geometry) and NAMES[config.model.path.split("/")[1]] == family
    assert geometry.image_to_video == config.model.image_to_video == family.endswith("i2v")
    assert geometry.cautions(config.data.max_num_frames) == []


def refusal(compose, *overrides) -> str:
    with pytest.raises(UserError) as raised:
        compose("data=text_files", "data.instance_data_root=/clips", *overrides)
    return str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("model=5b train.mixed_precision=fp16", "was trained in bf16 and overflows in fp16"),
        ("model=5b_i2v data.height=256", "data.height=256: must be 480"),
        (
            "model=1_5_5b data.height=776",
            "data.height=776: must be a multiple of 16 (VAE 8 x patch 2); nearest: 768 or 784",
        ),
        ("model=1_5_5b data.width=4096", "data.width=4096: must be at most 2400"),
        (
            "model=1_5_5b_i2v data.max_num_frames=80",
            "data.max_num_frames=80: must be 4k + 1; nearest: 77 or 81",
        ),
        (
            "model=5b_i2v model.path=THUDM/CogVideoX-5b",
            "this is a text-to-video checkpoint: model=2b, 5b or 1_5_5b",
        ),
        (
            "model=5b model.path=THUDM/CogVideoX-5b-I2V",
            "this is an image-to-video checkpoint: model=5b_i2v",
        ),
        ("model=5b data.image_column=images.txt", "data.image_column is for image-to-video"),
        (
            "model=5b validation.validation_images=a.png",
            "validation.validation_images is for image-to-video",
        ),
    ],
)
def test_what_a_family_cannot_do_is_refused_at_the_door(compose, overrides, said):
    assert said in refusal(compose, *overrides.split())


def test_a_local_checkpoint_of_the_other_kind_is_refused_before_weights(
    compose, family_folder, tmp_path
):
    size = ["data.height=48", "data.width=64", "data.max_num_frames=9"]
    shutil.copytree(
        family_folder("5b"), tmp_path / "5b", ignore=shutil.ignore_patterns("*.safetensors")
    )
    said = refusal(compose, "model=5b_i2v", f"model.path={tmp_path / '5b'}", *size)
    assert "this is a text-to-video checkpoint" in said


def test_bf16_weights_of_any_name_are_refused_in_fp16(compose, family_folder, tmp_path):
    transformer = CogVideoXTransformer3DModel.from_pretrained(
        family_folder("5b"), subfolder="transformer"
    )
    shutil.copytree(family_folder("5b"), tmp_path / "mine")
    transformer.to(torch.bfloat16).save_pretrained(tmp_path / "mine" / "transformer")
    size = ["data.height=48", "data.width=64", "data.max_num_frames=9"]
    said = refusal(
        compose, "model=5b", f"model.path={tmp_path / 'mine'}", *size, "train.mixed_precision=fp16"
    )
    assert "overflows in fp16" in said


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_setting_that_diffusers_does_not_know_is_refused(compose, family_folder, tmp_path, part):
    shutil.copytree(family_folder("2b"), tmp_path / "new")
    path = tmp_path / "new" / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_new_trick": True}))
    size = ["data.height=48", "data.width=64", "data.max_num_frames=9", "train.mixed_precision=no"]
    config = compose("model=2b", f"model.path={tmp_path / 'new'}", *size)
    with pytest.raises(
        UserError, match=r"sets use_new_trick, which diffusers [\d.]+ does not know"
    ):
        config.model.prepare(**config.asked_of_model())


def test_learned_positions_of_another_length_are_warned_of():
    geometry = Geometry.from_configs(RELEASED["5b_i2v"][0], RELEASED["5b_i2v"][1], "BF16")
    assert geometry.cautions(49) == [] and "are for 49 frames; at 25" in geometry.cautions(25)[0]
