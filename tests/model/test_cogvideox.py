"""The objective against its published form, and checkpoints that are not whole."""

import families
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from cogvx.errors import UserError
from cogvx.model import nano
from cogvx.model.cogvideox import CogVideoX
from cogvx.model.geometry import read_geometry, released
from cogvx.model.pretrained import PretrainedModel
from cogvx.training.step import Batch, Draw, FixedDraw, Sample, training_losses

CPU = torch.device("cpu")
EVERY = torch.arange(1000)


@pytest.fixture(params=[3.0, 1.0], ids=["2B's schedule", "the others'"])
def scheduler(request):
    return nano.noise_scheduler(request.param)


def model_of(scheduler, dtype=torch.float32, model_class=CogVideoX) -> CogVideoX:
    return model_class(None, scheduler, nano.NANO.geometry, device=CPU, dtype=dtype)


def test_noise_and_velocity_are_the_noise_schedulers_at_every_timestep(scheduler):
    model = model_of(scheduler)
    latents, noise = torch.randn(
        (2, 1000, 1, 1, 1, 4), generator=torch.Generator().manual_seed(0)
    ).unbind()
    for ours, theirs in (
        (model.add_noise, scheduler.add_noise),
        (model.velocity, scheduler.get_velocity),
    ):
        assert torch.allclose(ours(latents, noise, EVERY), theirs(latents, noise, EVERY), atol=1e-6)


def weighted_x0_loss(model: CogVideoX, latents, noise, predicted, timesteps):
    """mean((x0_predicted - x0)^2 / (1 - alphas_cumprod)), the published form.

    diffusers, CogVideo and finetrainers write it.
    """
    alpha = model.alphas_cumprod[timesteps].double().view(-1, 1, 1, 1, 1)
    latents, noise = latents.double(), noise.double()
    x0 = (
        alpha.sqrt() * (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
        - (1 - alpha).sqrt() * predicted
    )
    return ((x0 - latents) ** 2 / (1 - alpha)).mean(dim=(1, 2, 3, 4))


class Answers(CogVideoX):
    """Predicts what it is told to."""

    def predict_velocity(self, noisy_latents, condition, prompt_embeds, timesteps):
        return self.answer


class Everywhere(FixedDraw):
    """One sample at each timestep of the schedule."""

    def timesteps(self, num_timesteps):
        return EVERY


EVERYWHERE = Everywhere(
    seed=0, samples=[Sample(0, index, index) for index in range(1000)], device=CPU
)


def moments_of_unit_latents() -> torch.Tensor:
    means = (
        torch.randn((1000, 16, 2, 2, 2), generator=torch.Generator().manual_seed(0))
        / nano.SCALING_FACTOR
    )
    return torch.cat([means, torch.full_like(means, -30)], dim=1)


def test_velocity_loss_is_the_weighted_x0_loss(scheduler):
    """Through training_losses itself, at all 1000 timesteps: same value, same gradient."""
    model = model_of(scheduler, model_class=Answers)
    batch = Batch(moments_of_unit_latents(), torch.zeros(1000, 4, 4))
    latents = model.scale(EVERYWHERE.posterior(batch.latent_moments))
    noise = EVERYWHERE.noise(latents)
    model.answer = torch.randn(
        latents.shape, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    losses, timesteps = training_losses(model, batch, EVERYWHERE)
    losses.sum().backward()
    published = model.answer.detach().double().requires_grad_()
    reference = weighted_x0_loss(model, latents, noise, published, timesteps)
    reference.sum().backward()
    assert torch.equal(timesteps, EVERY)
    assert torch.allclose(losses.double(), reference, rtol=1e-4)
    assert torch.allclose(model.answer.grad.double(), published.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_perfect_predictor_has_no_loss_at_any_timestep(scheduler, dtype):
    """Noise, target and objective are fp32 in every precision of the model.

    An answer rounded to bf16 has only the mean square of its rounding: 2^-14 / 12 x 0.54 = 2.8e-6
    of the velocity's.
    """
    model = model_of(scheduler, dtype, Answers)
    batch = Batch(moments_of_unit_latents(), torch.zeros(1000, 4, 4, dtype=dtype))
    latents = model.scale(EVERYWHERE.posterior(batch.latent_moments))
    exact = model.velocity(latents, EVERYWHERE.noise(latents), EVERY)
    model.answer = exact
    assert training_losses(model, batch, EVERYWHERE)[0].max() < 1e-6
    model.answer = exact.to(dtype)
    assert training_losses(model, batch, EVERYWHERE)[0].max() < 8e-6


def test_min_snr_weights_are_those_of_the_paper(scheduler):
    """min(SNR, gamma) / (SNR + 1): never above 1, and 0 where there is no signal."""
    model = model_of(scheduler)
    alpha = model.alphas_cumprod[:999].double()
    snr = alpha / (1 - alpha)
    weights = model.min_snr_weight(EVERY, 5.0)
    assert torch.allclose(weights[:999].double(), snr.clamp(max=5.0) / (snr + 1), rtol=1e-4)
    assert weights[999] == 0 and weights.max() < 1


def test_the_posterior_sample_is_diffusers():
    draw = Draw(seed=0, samples=[Sample(0, 0, 0)], device=CPU)
    moments = torch.randn((1, 32, 2, 4, 4), generator=torch.Generator().manual_seed(0)) * 20
    posterior = DiagonalGaussianDistribution(moments)
    sample = draw.posterior(moments)
    eps = (sample - posterior.mean) / posterior.std
    again = Draw(seed=0, samples=[Sample(0, 0, 0)], device=CPU).posterior(torch.zeros_like(moments))
    assert torch.allclose(
        eps[posterior.std > 1e-3], again[posterior.std > 1e-3], atol=1e-3, rtol=1e-2
    )


def test_nano_is_what_its_geometry_says(nano_folder):
    assert read_geometry(nano_folder) == nano.NANO.geometry


def test_nanos_latents_have_unit_variance(nano_folder, run, cache):
    """The measurement behind nano.SCALING_FACTOR, on other clips: the demo's."""
    from safetensors.torch import load_file

    run("measured", "task=encode")
    found = [load_file(path) for path in (cache / "latents").rglob("*.safetensors")]
    means = torch.cat(
        [
            f["latent_moments"][:16].flatten()
            for f in found
            if f["latent_moments"].shape[1:] == (3, 16, 16)
        ]
    )
    assert abs(1 / means.std().item() / nano.SCALING_FACTOR - 1) < 0.15


def test_a_random_checkpoint_is_the_same_on_every_writing(tmp_path):
    folders = [families.write_random(tmp_path / name, nano.NANO) for name in ("a", "b")]
    files = [
        path.relative_to(folders[0])
        for path in folders[0].rglob("*")
        # Not .digests.json, which holds times.
        if path.suffix in (".model", ".json") and not path.name.startswith(".")
    ]
    assert len(files) >= 7
    assert all((folders[0] / f).read_bytes() == (folders[1] / f).read_bytes() for f in files)
    ours, theirs = (
        PretrainedModel(folder, CPU, torch.float32).transformer().state_dict() for folder in folders
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_blank_nano_for_images_is_nano_and_does_not_look_at_them(nano_folder, tmp_path):
    blank = families.model_of(nano.write_nano(tmp_path / "blank", nano.NANO_I2V, blank=True))
    plain, latents = families.model_of(nano_folder), torch.randn(1, 3, 16, 16, 16)
    embeds, timestep = torch.randn(1, nano.TEXT_TOKENS, nano.TEXT_WIDTH), torch.tensor([500])
    condition = blank.image_condition(torch.randn(1, 16, 1, 16, 16), frames=3)
    with torch.no_grad():
        answers = [
            m.predict_velocity(latents, c, embeds, timestep)
            for m, c in ((blank, condition), (plain, None))
        ]
    assert torch.allclose(*answers, atol=1e-5)


def test_nearest_legal_sizes():
    released_2b = released("THUDM/CogVideoX-2b")
    assert released_2b.size_problems(480, 720) == [] and released_2b.frame_problems(49) == []
    assert "nearest: 464 or 480" in released_2b.size_problems(470, 720)[0]
    assert "nearest: 45 or 49" in released_2b.frame_problems(48)[0]
    assert "nearest: 1 or 5" in released_2b.frame_problems(0)[0]


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_model_folder_without_a_part_is_named(nano_folder, tmp_path, part, compose):
    import shutil

    shutil.copytree(nano_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    size = ["data.max_num_frames=9", "data.height=64", "data.width=64"]
    with pytest.raises(UserError, match=part):
        config = compose("model=2b", f"model.path={tmp_path / 'model'}", *size)
        config.model.prepare(**config.asked_of_model())


def test_a_damaged_weights_file_is_named(nano_folder, tmp_path):
    import shutil

    shutil.copytree(nano_folder, tmp_path / "model")
    weights = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="transformer cannot be loaded"):
        PretrainedModel(tmp_path / "model", CPU, torch.float32).transformer()


def test_an_unknown_hub_id_that_is_not_in_the_cache_offline(compose):
    with pytest.raises(
        UserError, match=r"^model.path=nobody/nothing-here is no folder here and not whole in the "
    ) as raised:
        compose("model=2b", "model.path=nobody/nothing-here").model.prepare()
    assert "HF_HUB_OFFLINE is set" in str(raised.value)
    assert str(raised.value).endswith("or give a local folder: model.path=/models/nothing-here")
