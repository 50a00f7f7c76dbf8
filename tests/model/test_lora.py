"""A saved LoRA loads in plain diffusers at the trained strength, or is refused."""

import pytest
import torch
from diffusers import CogVideoXPipeline

from cogvx.errors import UserError
from cogvx.model import lora, nano
from cogvx.model.pretrained import PretrainedModel

INPUTS = {
    "hidden_states": torch.randn((1, 3, 16, 16, 16), generator=torch.Generator().manual_seed(0)),
    "encoder_hidden_states": torch.randn(
        (1, nano.TEXT_TOKENS, nano.TEXT_WIDTH), generator=torch.Generator().manual_seed(1)
    ),
    "timestep": torch.tensor([500]),
}


def output(transformer):
    with torch.no_grad():
        return transformer(**INPUTS).sample


def settings(rank, alpha, **others) -> lora.Lora:
    usual = {
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        "use_rslora": False,
        "use_dora": False,
        "init_from": None,
    }
    return lora.Lora(rank, alpha, **usual | others)


def trained(nano_folder, rank, alpha, **others):
    """A transformer whose adapter has been moved away from doing nothing."""
    transformer = PretrainedModel(nano_folder, torch.device("cpu"), torch.float32).transformer()
    settings(rank, alpha, **others).attach(transformer, seed=0)
    generator = torch.Generator().manual_seed(2)
    for parameter in lora.trainable(transformer):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return transformer


@pytest.mark.parametrize(
    "variant",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"use_rslora": True, "use_dora": True}],
)
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (8, 4), (4, 16), (16, 1)])
def test_plain_diffusers_loads_it_at_the_trained_strength(
    nano_folder, tmp_path, rank, alpha, variant
):
    transformer = trained(nano_folder, rank, alpha, **variant)
    lora.save(transformer, tmp_path)
    pipeline = CogVideoXPipeline.from_pretrained(nano_folder)
    base = output(pipeline.transformer)
    pipeline.load_lora_weights(str(tmp_path))
    assert torch.allclose(output(pipeline.transformer), output(transformer), atol=1e-5)
    assert (output(pipeline.transformer) - base).abs().max() > 1e-3


def test_what_is_trained_is_the_adapter_in_fp32(nano_folder):
    transformer = PretrainedModel(nano_folder, torch.device("cpu"), torch.bfloat16).transformer()
    settings(4, 4).attach(transformer, seed=0)
    names = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    assert len(names) == 6 * 4 * 2 and all(
        "lora_" in name for name in names
    )  # blocks x modules x (A, B)
    assert {parameter.dtype for parameter in lora.trainable(transformer)} == {torch.float32}


def test_a_new_adapter_changes_nothing_and_follows_the_seed(nano_folder):
    pretrained = PretrainedModel(nano_folder, torch.device("cpu"), torch.float32)
    states = []
    for seed in (0, 0, 1):
        transformer = pretrained.transformer()
        base = output(transformer)
        torch.rand(3)  # the global generator's state does not matter
        settings(4, 8, target_modules=["to_q"]).attach(transformer, seed)
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
    with pytest.raises(UserError, match=r"trained with lora_alpha=2, not 8"):
        lora.load(trained(nano_folder, 4, 8), tmp_path)


def test_a_target_that_matches_nothing_is_named(nano_folder):
    transformer = PretrainedModel(nano_folder, torch.device("cpu"), torch.float32).transformer()
    with pytest.raises(UserError, match=r"no layer is called to_w.*attn1.to_q"):
        settings(4, 4, target_modules=["to_q", "to_w"]).attach(transformer, seed=0)


def test_targets_as_a_regular_expression(nano_folder, tmp_path):
    transformer = trained(
        nano_folder, 4, 4, target_modules=r"transformer_blocks\.[01]\.(ff\.net\.2|attn1\.to_q)"
    )
    assert lora.count_modules(lora.state(transformer)) == 4
    lora.save(transformer, tmp_path)
    assert lora.adapter_differences(transformer, tmp_path, values=True) == []


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("nothing.*", "no layer is called nothing"),
        (r".*norm_final", "matches norm_final, a LayerNorm"),
        (["attn1"], "a Attention: only linear"),
    ],
)
def test_targets_that_cannot_be_trained_are_named(nano_folder, targets, said):
    transformer = PretrainedModel(nano_folder, torch.device("cpu"), torch.float32).transformer()
    with pytest.raises(UserError, match=said):
        settings(4, 4, target_modules=targets).attach(transformer, seed=0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.target_modules='('", "is no regular expression"),
        ("lora.target_modules=3", "must be a list of names or a regular expression"),
        ("lora.target_modules=[]", "is empty"),
    ],
)
def test_wrong_lora_settings_are_refused_at_the_door(compose, override, said):
    with pytest.raises(UserError) as raised:
        compose(override)
    assert said in str(raised.value)


# -- starting from a file ------------------------------------------------------------------------


def begun(nano_folder, path, rank, alpha, **others):
    transformer = PretrainedModel(nano_folder, torch.device("cpu"), torch.float32).transformer()
    asked_for = settings(rank, alpha, **others)
    asked_for.attach(transformer, seed=3)
    return transformer, asked_for.start_from(transformer, path)


@pytest.mark.parametrize(
    ("ours", "others"),
    [
        ((4, 2), {}),
        ((8, 2), {}),
        ((16, 1), {}),
        ((8, 2), {"use_rslora": True}),
        ((8, 8), {"use_dora": True}),
    ],
)
def test_a_run_starts_at_the_strength_the_file_was_trained_at(nano_folder, tmp_path, ours, others):
    """Whatever its rank and alpha are, and ours. A lower rank is filled up with idle columns."""
    source = trained(nano_folder, 4, 2, **{"use_dora": others.get("use_dora", False)})
    lora.save(source, tmp_path)
    transformer, said = begun(nano_folder, tmp_path, *ours, **others)
    assert torch.allclose(output(transformer), output(source), atol=1e-5)
    assert said.startswith("24 of 24 modules start from") and f"rank 4 of {ours[0]}" in said
    added = [p for n, p in lora.state(transformer).items() if "lora_A" in n and ours[0] > 4]
    assert all(a[4:].abs().min() > 0 for a in added), "the new columns can learn"


def test_a_file_for_some_of_the_modules_starts_those(nano_folder, tmp_path):
    source = trained(nano_folder, 4, 2, target_modules=["to_q"])
    lora.save(source, tmp_path)
    transformer, said = begun(nano_folder, tmp_path / lora.WEIGHTS, 4, 2)
    assert said.startswith("6 of 24 modules") and torch.allclose(
        output(transformer), output(source), atol=1e-5
    )


def test_a_file_without_settings_is_taken_as_diffusers_takes_it(nano_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    lora.save(trained(nano_folder, 4, 2), tmp_path)
    save_file(load_file(tmp_path / lora.WEIGHTS), tmp_path / "bare.safetensors")
    pipeline = CogVideoXPipeline.from_pretrained(nano_folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="bare.safetensors")
    transformer, said = begun(nano_folder, tmp_path / "bare.safetensors", 8, 8)
    assert torch.allclose(output(transformer), output(pipeline.transformer), atol=1e-5)
    assert "taken at strength 1" in said


def test_names_of_other_programs_and_an_alpha_for_each_layer(nano_folder, tmp_path):
    from safetensors.torch import save_file

    source = trained(nano_folder, 4, 2)
    found = {}
    for number, (name, tensor) in enumerate(sorted(lora.state(source).items())):
        module, _, part = name.partition(".lora_")
        stem = "lora_unet_" + module.replace(".", "_")
        alpha = 1.0 + number // 2 % 3
        # up @ down * alpha / 4 is what the source has: up @ down * 2 / 4.
        found[f"{stem}.alpha"] = torch.tensor(alpha)
        found[f"{stem}.lora_{'down' if part == 'A.weight' else 'up'}.weight"] = (
            tensor.detach() if part == "A.weight" else tensor.detach() * 2 / alpha
        )
    save_file(found, tmp_path / "kohya.safetensors")
    transformer, said = begun(nano_folder, tmp_path / "kohya.safetensors", 8, 8)
    assert torch.allclose(output(transformer), output(source), atol=1e-5)
    assert said.startswith("24 of 24 modules") and "strength 1" not in said


@pytest.mark.slow
def test_a_file_that_does_not_fit_is_refused_with_the_reason(nano_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    lora.save(trained(nano_folder, 4, 2), tmp_path)
    tensors = load_file(tmp_path / lora.WEIGHTS)
    files = {
        "prefix": {name.replace("transformer.", "unet."): t for name, t in tensors.items()},
        "half": {name: t for name, t in tensors.items() if "2.attn1.to_q.lora_B" not in name},
        "base": {
            name: torch.zeros(4, 96) if "lora_A" in name else t for name, t in tensors.items()
        },
    }
    for name, changed in files.items():
        save_file({k: t.contiguous() for k, t in changed.items()}, tmp_path / f"{name}.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no such thing")
    for name, said, overrides in (
        ("prefix", "is no LoRA for CogVideoX: its first tensor is unet.transformer_blocks", {}),
        ("half", r"transformer_blocks.2.attn1.to_q has down and no up matrix", {}),
        ("base", r"is \[4, 96\] and here \[4, 128\]: another base model", {}),
        (
            lora.WEIGHTS.removesuffix(".safetensors"),
            "has rank 4: set lora.rank=4 or higher",
            {"rank": 2},
        ),
        (
            lora.WEIGHTS.removesuffix(".safetensors"),
            "none of the layers of lora.target_modules",
            {"target_modules": ["to_q"]},
        ),
        (
            lora.WEIGHTS.removesuffix(".safetensors"),
            "it is no DoRA: lora.use_dora=false",
            {"use_dora": True},
        ),
        ("broken", "broken.safetensors cannot be read as weights", {}),
    ):
        with pytest.raises(UserError, match=said):
            begun(
                nano_folder, tmp_path / f"{name}.safetensors", **{"rank": 4, "alpha": 2} | overrides
            )


def test_a_lora_is_attached_without_touching_a_gpu(nano_folder, monkeypatch):
    """Reading a GPU's random state would initialise CUDA, also where only a plan is made."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *given: pytest.fail("asked for a GPU"))
    transformer = PretrainedModel(nano_folder, torch.device("cpu"), torch.float32).transformer()
    settings(4, 4).attach(transformer, seed=0)
    assert lora.trainable(transformer)
