"""The pipeline is the oracle: what training computes equals what CogVideoXPipeline computes."""

import json

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from cogvx.errors import UserError
from cogvx.model import nano
from cogvx.model.checkpoint import Checkpoint
from cogvx.model.cogvideox import CogVideoX
from cogvx.model.geometry import RELEASED, Geometry, read_geometry
from cogvx.training.step import Batch, Draw, FixedDraw, training_loss

CPU = torch.device("cpu")
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": True,
}  # fmt: skip


def model_of(folder, dtype=torch.float32) -> CogVideoX:
    checkpoint = Checkpoint(folder, CPU, dtype)
    return CogVideoX(
        checkpoint.transformer(), checkpoint.noise_scheduler(), checkpoint.geometry(), device=CPU, dtype=dtype
    )


@pytest.fixture(scope="module")
def rotary_folder(nano_folder, tmp_path_factory):
    """A tiny checkpoint like 5B: rotary positions, factor 0.7, SNR shift 1."""
    folder = tmp_path_factory.mktemp("rotary")
    pipeline = CogVideoXPipeline.from_pretrained(nano_folder)
    settings = dict(pipeline.transformer.config) | {"use_rotary_positional_embeddings": True}
    pipeline.transformer = CogVideoXTransformer3DModel.from_config(settings)
    pipeline.vae.register_to_config(scaling_factor=0.7)
    pipeline.scheduler = CogVideoXDDIMScheduler(**SCHEDULE, snr_shift_scale=1.0)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(params=["like 2B", "like 5B"])
def folder(request, nano_folder, rotary_folder):
    return {"like 2B": nano_folder, "like 5B": rotary_folder}[request.param]


def seen_by_the_transformer(transformer) -> list[dict]:
    """Records what the transformer is called with from now on."""
    calls, forward = [], transformer.forward

    def record(*args, **kwargs):
        calls.append({name: value for name, value in kwargs.items() if name != "attention_kwargs"})
        return forward(*args, **kwargs)

    transformer.forward = record
    return calls


@pytest.mark.parametrize(("frames", "height", "width"), [(9, 64, 64), (9, 48, 80), (17, 32, 32), (5, 96, 64)])
def test_training_passes_what_the_pipeline_passes(folder, frames, height, width):
    """Same latents, same prompt, same timestep: the transformer's inputs agree bit for bit, positions included."""
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    piped = seen_by_the_transformer(pipeline.transformer)
    latents = torch.randn(
        (1, (frames - 1) // 4 + 1, 16, height // 4, width // 4), generator=torch.Generator().manual_seed(0)
    )
    prompt_embeds = torch.randn((1, 64, 64), generator=torch.Generator().manual_seed(1))
    pipeline(
        prompt_embeds=prompt_embeds, guidance_scale=1, num_frames=frames, height=height, width=width, num_inference_steps=3,
        latents=latents, output_type="latent",
    )  # fmt: skip
    model = model_of(folder)
    trained = seen_by_the_transformer(model.transformer)
    with torch.no_grad():
        model.predict_velocity(latents, prompt_embeds, piped[0]["timestep"])
    ours, theirs = trained[0], piped[0]
    for name in ("hidden_states", "encoder_hidden_states", "timestep"):
        assert torch.equal(ours[name], theirs[name]), name
    assert model.geometry.rotary == (theirs["image_rotary_emb"] is not None)
    if model.geometry.rotary:
        assert len(theirs["image_rotary_emb"]) == 2
        for one, other in zip(ours["image_rotary_emb"], theirs["image_rotary_emb"], strict=True):
            assert torch.equal(one, other)


def test_scaling_is_undone_by_the_pipeline(folder):
    pipeline, model = CogVideoXPipeline.from_pretrained(folder), model_of(folder)
    latents = torch.randn((1, 16, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = pipeline.decode_latents(model.scale(latents))
        assert torch.allclose(decoded, pipeline.vae.decode(latents).sample, atol=1e-5)


def test_noise_and_velocity_are_the_noise_schedulers_at_every_timestep(folder):
    scheduler, model = Checkpoint(folder, CPU, torch.float32).noise_scheduler(), model_of(folder)
    latents, noise = torch.randn((2, 1000, 1, 1, 1, 4), generator=torch.Generator().manual_seed(0)).unbind()
    timesteps = torch.arange(1000)
    assert torch.allclose(
        model.add_noise(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps), atol=1e-6
    )
    assert torch.allclose(
        model.velocity(latents, noise, timesteps), scheduler.get_velocity(latents, noise, timesteps), atol=1e-6
    )


@pytest.mark.parametrize(("shift", "first"), [(3.0, 0.99745), (1.0, 0.99915)])
def test_the_schedules_are_those_of_2b_and_5b(nano_folder, shift, first):
    """alphas_cumprod at t = 0, and exactly no signal at t = 999."""
    scheduler = CogVideoXDDIMScheduler(**SCHEDULE, snr_shift_scale=shift)
    model = CogVideoX(None, scheduler, nano.GEOMETRY, device=CPU, dtype=torch.float32)
    assert abs(model.alphas_cumprod[0].item() - first) < 1e-5
    assert model.alphas_cumprod[999] == 0


@pytest.mark.parametrize("folder", ["like 2B", "like 5B"], indirect=True)
def test_velocity_loss_is_the_weighted_x0_loss(folder):
    """The published form, mean((x0_predicted - x0)^2 / (1 - alphas_cumprod)), in fp64: same value, same gradient."""
    model = model_of(folder)
    generator = torch.Generator().manual_seed(0)
    latents, noise, predicted = (torch.randn((1, 2, 4, 4, 4), generator=generator) for _ in range(3))
    for timestep in range(0, 1000, 37):
        t = torch.tensor([timestep])
        prediction = predicted.clone().requires_grad_()
        loss = torch.nn.functional.mse_loss(prediction, model.velocity(latents, noise, t))
        loss.backward()
        alpha = model.alphas_cumprod[timestep].double()
        published = predicted.double().requires_grad_()
        noisy = alpha.sqrt() * latents.double() + (1 - alpha).sqrt() * noise.double()
        x0 = alpha.sqrt() * noisy - (1 - alpha).sqrt() * published
        reference = ((x0 - latents.double()) ** 2 / (1 - alpha)).mean()
        reference.backward()
        assert torch.allclose(loss.double(), reference, rtol=1e-4)
        assert torch.allclose(prediction.grad.double(), published.grad, rtol=1e-3, atol=1e-6)


class Perfect(CogVideoX):
    """Predicts the velocity it will be compared with."""

    def predict_velocity(self, noisy_latents, prompt_embeds, timesteps):
        return self.answer(timesteps).to(self.dtype)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-12), (torch.bfloat16, 1e-4), (torch.float16, 1e-6)])
def test_a_perfect_predictor_has_no_loss_at_any_timestep(nano_folder, dtype, most):
    model = Perfect(None, nano.noise_scheduler(), nano.GEOMETRY, device=CPU, dtype=dtype)
    batch = Batch(torch.randn((1, 32, 2, 4, 4), generator=torch.Generator().manual_seed(0)), torch.zeros(1, 4, 4))
    for timestep in range(0, 1000, 9):
        draw = FixedDraw(seed=0, samples=[(0, 0)], device=CPU, timestep=timestep)
        latents = model.scale(draw.posterior(batch.latent_moments))
        noise = draw.noise(latents)
        model.answer = lambda timesteps, latents=latents, noise=noise: model.velocity(latents, noise, timesteps)
        assert training_loss(model, batch, draw) <= most * latents.pow(2).mean().clamp(min=1)


def test_the_posterior_sample_is_diffusers():
    draw = Draw(seed=0, samples=[(0, 0)], device=CPU)
    moments = torch.randn((1, 32, 2, 4, 4), generator=torch.Generator().manual_seed(0)) * 20
    posterior = DiagonalGaussianDistribution(moments)
    sample = draw.posterior(moments)
    eps = (sample - posterior.mean) / posterior.std
    again = Draw(seed=0, samples=[(0, 0)], device=CPU).posterior(torch.zeros_like(moments))
    assert torch.allclose(eps[posterior.std > 1e-3], again[posterior.std > 1e-3], atol=1e-3, rtol=1e-2)


def test_nano_is_what_its_geometry_says(nano_folder):
    assert read_geometry(nano_folder) == nano.GEOMETRY


def test_nanos_latents_have_unit_variance(nano_folder, run, cache):
    """The measurement behind nano.SCALING_FACTOR."""
    from safetensors.torch import load_file

    run("measured", "task=encode")
    found = [load_file(path) for path in (cache / "latents").rglob("*.safetensors")]
    means = torch.cat(
        [f["latent_moments"][:16].flatten() for f in found if f["latent_moments"].shape[1:] == (3, 16, 16)]
    )
    assert abs(1 / means.std().item() / nano.SCALING_FACTOR - 1) < 0.1


def test_nano_is_the_same_on_every_writing(nano_folder, tmp_path):
    nano.write(tmp_path / "nano")
    files = [path.relative_to(nano_folder) for path in nano_folder.rglob("*") if path.suffix in (".model", ".json")]
    assert len(files) >= 7
    assert all((tmp_path / "nano" / f).read_bytes() == (nano_folder / f).read_bytes() for f in files)
    ours, theirs = model_of(nano_folder).transformer.state_dict(), model_of(tmp_path / "nano").transformer.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_nearest_legal_sizes():
    assert RELEASED.size_problems(480, 720) == [] and RELEASED.frame_problems(49) == []
    assert "nearest: 464 or 480" in RELEASED.size_problems(470, 720)[0]
    assert "nearest: 45 or 49" in RELEASED.frame_problems(48)[0]
    assert "nearest: 1 or 5" in RELEASED.frame_problems(0)[0]


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_model_folder_without_a_part_is_named(nano_folder, tmp_path, part, compose):
    import shutil

    shutil.copytree(nano_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(UserError, match=part):
        compose(
            "model=2b", f"model.path={tmp_path / 'model'}", "data.max_num_frames=9", "data.height=64", "data.width=64"
        ).model.prepare()


def test_a_damaged_weights_file_is_named(nano_folder, tmp_path):
    import shutil

    shutil.copytree(nano_folder, tmp_path / "model")
    weights = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="transformer cannot be loaded"):
        Checkpoint(tmp_path / "model", CPU, torch.float32).transformer()


def test_kinds_not_trained_yet_are_refused_before_weights(nano_folder, tmp_path):
    import shutil

    shutil.copytree(nano_folder, tmp_path / "model")
    path = tmp_path / "model/transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 32, "patch_size_t": 2}))
    with pytest.raises(UserError, match="image-to-video") as raised:
        Checkpoint(tmp_path / "model", CPU, torch.float32).geometry()
    assert "CogVideoX 1.5" in str(raised.value)


def test_an_unknown_hub_id_says_name_and_network(compose):
    with pytest.raises(UserError, match=r"no public model of that name, or this machine has no network"):
        compose("model=2b", "model.path=nobody/nothing-here").model.prepare()


def test_geometry_of_a_released_config(tmp_path):
    """The 2B's own numbers, in the files as released."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "vae").mkdir()
    transformer = {
        "patch_size": 2, "in_channels": 16, "sample_height": 60, "sample_width": 90, "attention_head_dim": 64,
        "use_rotary_positional_embeddings": False, "max_text_seq_length": 226,
    }  # fmt: skip
    vae = {
        "block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4, "latent_channels": 16,
        "scaling_factor": 1.15258426,
    }  # fmt: skip
    (tmp_path / "transformer/config.json").write_text(json.dumps(transformer))
    (tmp_path / "vae/config.json").write_text(json.dumps(vae))
    assert read_geometry(tmp_path) == RELEASED == Geometry(8, 4, 2, None, 16, 16, 60, 90, 64, False, 226, 1.15258426)
