"""A saved LoRA loads in plain diffusers at the trained strength, or is refused."""

import pytest
import torch
from diffusers import CogVideoXPipeline

from cogvx.errors import UserError
from cogvx.model import lora
from cogvx.model.checkpoint import Checkpoint

INPUTS = {
    "hidden_states": torch.randn((1, 3, 16, 16, 16), generator=torch.Generator().manual_seed(0)),
    "encoder_hidden_states": torch.randn((1, 64, 64), generator=torch.Generator().manual_seed(1)),
    "timestep": torch.tensor([500]),
}


def output(transformer):
    with torch.no_grad():
        return transformer(**INPUTS).sample


def trained(nano_folder, rank, alpha):
    """A transformer whose adapter has been moved away from doing nothing."""
    transformer = Checkpoint(nano_folder, torch.device("cpu"), torch.float32).transformer()
    lora.Lora(rank=rank, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v", "to_out.0"]).attach(
        transformer, seed=0
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in lora.trainable(transformer):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return transformer


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (8, 4), (4, 16), (16, 1)])
def test_plain_diffusers_loads_it_at_the_trained_strength(nano_folder, tmp_path, rank, alpha):
    transformer = trained(nano_folder, rank, alpha)
    lora.save(transformer, tmp_path)
    pipeline = CogVideoXPipeline.from_pretrained(nano_folder)
    base = output(pipeline.transformer)
    pipeline.load_lora_weights(str(tmp_path))
    assert torch.allclose(output(pipeline.transformer), output(transformer), atol=1e-5)
    assert (output(pipeline.transformer) - base).abs().max() > 1e-3


def test_what_is_trained_is_the_adapter_in_fp32(nano_folder):
    transformer = Checkpoint(nano_folder, torch.device("cpu"), torch.bfloat16).transformer()
    lora.Lora(rank=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]).attach(transformer, seed=0)
    names = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    assert len(names) == 4 * 4 * 2 and all("lora_" in name for name in names)  # blocks x modules x (A, B)
    assert {parameter.dtype for parameter in lora.trainable(transformer)} == {torch.float32}


def test_a_new_adapter_changes_nothing_and_follows_the_seed(nano_folder):
    checkpoint = Checkpoint(nano_folder, torch.device("cpu"), torch.float32)
    settings = lora.Lora(rank=4, lora_alpha=8, target_modules=["to_q"])
    states = []
    for seed in (0, 0, 1):
        transformer = checkpoint.transformer()
        base = output(transformer)
        torch.rand(3)  # the global generator's state does not matter
        settings.attach(transformer, seed)
        assert torch.equal(output(transformer), base)
        states.append(lora.state(transformer))
    assert lora.compare(states[0], states[1], values=True) == []
    assert lora.compare(states[0], states[2], values=True) != []


def test_save_and_load_return_every_bit(nano_folder, tmp_path):
    transformer = trained(nano_folder, 4, 2)
    lora.save(transformer, tmp_path)
    other = trained(nano_folder, 4, 2)
    for parameter in lora.trainable(other):
        parameter.data.zero_()
    lora.load(other, tmp_path)
    assert lora.compare(lora.state(transformer), lora.state(other), values=True) == []


def test_another_rank_is_refused_with_the_shapes(nano_folder, tmp_path):
    lora.save(trained(nano_folder, 4, 2), tmp_path)
    with pytest.raises(UserError, match=r"has shape \(4, 128\), expected \(8, 128\)"):
        lora.load(trained(nano_folder, 8, 2), tmp_path)


def test_another_alpha_is_refused(nano_folder, tmp_path):
    lora.save(trained(nano_folder, 4, 2), tmp_path)
    with pytest.raises(UserError, match=r"trained with lora\.lora_alpha=2, not 8"):
        lora.load(trained(nano_folder, 4, 8), tmp_path)


def test_a_target_that_matches_nothing_is_named(nano_folder):
    transformer = Checkpoint(nano_folder, torch.device("cpu"), torch.float32).transformer()
    with pytest.raises(UserError, match=r"no linear layer is called to_w.*attn1.to_q"):
        lora.Lora(rank=4, lora_alpha=4, target_modules=["to_q", "to_w"]).attach(transformer, seed=0)
