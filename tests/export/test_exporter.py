"""What task=export writes means the same to those who read it as the trained weights do."""

import json
import shutil

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from cogvx.errors import UserError
from cogvx.export import exporter, low_rank
from cogvx.model import full, lora, naming, nano
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.unread import read_weights

CPU = torch.device("cpu")
INPUTS = {
    "hidden_states": torch.randn((1, 3, 16, 16, 16), generator=torch.Generator().manual_seed(0)),
    "encoder_hidden_states": torch.randn(
        (1, nano.TEXT_TOKENS, nano.TEXT_WIDTH), generator=torch.Generator().manual_seed(1)
    ),
    "timestep": torch.tensor([500]),
}
EVERYWHERE = (
    r"transformer_blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|norm1\.linear)"
)


def output(transformer):
    with torch.no_grad():
        return transformer(**INPUTS).sample


def same(one, other):
    return torch.allclose(one, other, atol=2e-5)


@pytest.fixture(scope="module")
def a_run(compose, nano_folder, tmp_path_factory):
    """a_run("lora.rank=4", seed=1): a folder with a record and weights, and the trained output."""

    def make(*overrides, seed=2):
        folder = tmp_path_factory.mktemp("runs") / f"run{seed}"
        folder.mkdir()
        config = compose(f"model.path='{nano_folder}'", *overrides)
        (folder / "config.yaml").write_text("")
        base = PretrainedModel(nano_folder, CPU, torch.float32)
        weights = exporter.weights_of(config.lora)
        transformer = weights.attach(base, 0)
        read_weights(transformer, CPU)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in lora.trainable(transformer):
                scale = 0.1 if config.lora else 0.02
                parameter += scale * torch.randn(parameter.shape, generator=generator)
        weights.save(transformer, folder)
        return folder, output(transformer)

    return make


@pytest.fixture
def export(compose, nano_folder):
    """export(run, "task.format=comfyui"): what the command writes."""

    def start(run, *overrides):
        model = f"model.path='{nano_folder}'"
        config = compose("task=export", f"task.run='{run}'", model, *overrides)
        return exporter.export_result(config, config.task)

    return start


def through_diffusers(nano_folder, folder, **weights):
    pipeline = CogVideoXPipeline.from_pretrained(nano_folder)
    pipeline.load_lora_weights(str(folder))
    return output(pipeline.transformer)


ALPHA = ["lora.rank=4", "lora.lora_alpha=6"]


def test_unchanged_it_is_the_same_file(a_run, export):
    run, _ = a_run(*ALPHA)
    folder = export(run)
    assert (folder / lora.WEIGHTS).read_bytes() == (run / lora.WEIGHTS).read_bytes()
    assert folder == run / "export" / "diffusers"


@pytest.mark.slow
@pytest.mark.parametrize("variant", [[], ["lora.use_rslora=true"]])
def test_folded_has_the_trained_strength_with_and_without_metadata(
    a_run, export, nano_folder, tmp_path, variant
):
    run, trained = a_run(*ALPHA, *variant)
    folder = export(run, "task.format=folded")
    assert same(through_diffusers(nano_folder, folder), trained)
    save_file(load_file(folder / lora.WEIGHTS), tmp_path / lora.WEIGHTS)
    assert same(through_diffusers(nano_folder, tmp_path), trained)
    # The trained file itself needs its metadata.
    save_file(load_file(run / lora.WEIGHTS), tmp_path / lora.WEIGHTS)
    assert not same(through_diffusers(nano_folder, tmp_path), trained)


def merged_by(tensors, module_of, transformer):
    """As kohya's readers do: the strength is alpha / rank."""
    modules = dict(transformer.named_modules())
    for name in {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}:
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        strength = float(tensors[f"{name}.alpha"]) / len(down)
        with torch.no_grad():
            modules[module_of(name, modules)].weight += strength * (up @ down)
    return transformer


def by_walking(name, modules):
    """As CogVideoXWrapper finds a module: it tries the words of the name, longer and longer."""
    found, words, part = "", name.removeprefix("lora_unet_").split("_"), ""
    for word in words:
        part = f"{part}_{word}" if part else word
        path = f"{found}.{part}" if found else part
        if path in modules:
            found, part = path, ""
    assert part == "", name
    return found


def test_comfyui_wrapper_reads_it(a_run, export, nano_folder):
    run, trained = a_run(*ALPHA, f"lora.target_modules='{EVERYWHERE}'")
    [file] = export(run, "task.format=comfyui_wrapper").glob("*.safetensors")
    base = PretrainedModel(nano_folder, CPU, torch.float32).transformer()
    assert file.name == f"{run.name}_comfyui_wrapper.safetensors"
    assert same(output(merged_by(load_file(file), by_walking, base)), trained)


# The linear layers of a block in comfy/ldm/cogvideo/model.py, beside those of diffusers.
OF_COMFYUI = {
    "norm1.linear": "norm1.linear",
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "attn_out": "attn1.to_out.0",
    "ff_proj": "ff.net.0.proj",
    "ff_out": "ff.net.2",
}


def test_comfyui_reads_it(a_run, export, nano_folder):
    run, trained = a_run(*ALPHA, f"lora.target_modules='{EVERYWHERE}'")
    [file] = export(run, "task.format=comfyui").glob("*.safetensors")

    def module_of(name, modules):
        _, blocks, number, rest = name.split(".", 3)
        assert blocks == "blocks"
        return f"transformer_blocks.{number}.{OF_COMFYUI[rest]}"

    base = PretrainedModel(nano_folder, CPU, torch.float32).transformer()
    assert same(output(merged_by(load_file(file), module_of, base)), trained)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("patch_embed.text_proj", "patch_embed.text_proj"),
        ("time_embedding.linear_1", "time_embedding_linear_1"),
        ("ofs_embedding.linear_2", "ofs_embedding_linear_2"),
        ("norm_out.linear", "norm_out.linear"),
        ("proj_out", "proj_out"),
    ],
)
def test_layers_outside_of_the_blocks(module, name):
    assert naming.COMFYUI.key(module, naming.ALPHA) == f"diffusion_model.{name}.alpha"


@pytest.mark.parametrize("variant", [[], ["lora.use_dora=true"], ["lora=null"]])
def test_merged_is_a_pipeline_of_its_own(a_run, export, nano_folder, variant):
    settings = variant if "lora=null" in variant else [*ALPHA, *variant]
    run, trained = a_run(*settings)
    folder = export(run, *settings, "task.format=merged", "task.dtype=no")
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    assert same(output(pipeline.transformer), trained)
    [weights] = (folder / "vae").glob("*.safetensors")
    assert weights.samefile(nano_folder / "vae" / weights.name), "linked, not copied"


def dtypes(folder):
    [file] = (folder / full.FOLDER).glob("*.safetensors")
    return {tensor.dtype for tensor in load_file(file).values()}


def test_merged_in_another_precision(a_run, export):
    run, _ = a_run(*ALPHA)
    folder = export(run, "task.format=merged", "task.dtype=bf16")
    assert dtypes(folder) == {torch.bfloat16}


@pytest.mark.slow
def test_several_loras_add_up(a_run, export, nano_folder):
    (run, _), (other, _) = a_run(*ALPHA), a_run("lora.rank=8", "lora.target_modules=[to_q]", seed=3)
    more = [f"task.add=['{other}']", "task.add_strengths=[0.5]", "task.strength=0.8"]
    pipeline = CogVideoXPipeline.from_pretrained(nano_folder)
    for name, folder in (("one", run), ("two", other)):
        pipeline.load_lora_weights(str(folder), adapter_name=name)
    pipeline.set_adapters(["one", "two"], [0.8, 0.5])
    expected = output(pipeline.transformer)
    folder = export(run, "task.format=folded", *more)
    assert same(through_diffusers(nano_folder, folder), expected)
    assert json.loads((folder / exporter.ABOUT).read_text())["rank"] == 12
    merged = export(run, "task.format=merged", "task.dtype=no", *more)
    found = CogVideoXTransformer3DModel.from_pretrained(merged / "transformer")
    assert same(output(found), expected)


@pytest.mark.slow
def test_another_rank(a_run, export, nano_folder, tmp_path, capfd):
    run, trained = a_run(*ALPHA)
    higher = export(run, "task.rank=8", f"task.to='{tmp_path / 'higher'}'")
    assert same(through_diffusers(nano_folder, higher), trained)
    lower = export(run, "task.rank=2", f"task.to='{tmp_path / 'lower'}'")
    about = json.loads((lower / exporter.ABOUT).read_text())
    assert about["rank"] == 2 and 0.5 < about["kept"] < 1
    assert f"rank    2 keeps {about['kept']:.1%} of the LoRA" in capfd.readouterr().out


def test_the_nearest_of_a_rank_is_that_of_the_whole_decomposition():
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=generator) for shape in ((40, 6), (6, 30)))
    delta = up @ down
    sizes = torch.linalg.svdvals(delta)
    for found, kept, before in (
        low_rank.at_rank(low_rank.Update(down, up), 3),
        low_rank.nearest_update(delta, 3),
    ):
        left = float((delta - found.delta()).square().sum())
        assert left == pytest.approx(float(sizes[3:].square().sum()), rel=1e-3)
        assert (kept, before) == pytest.approx(
            (float(sizes[:3].square().sum()), float(sizes.square().sum())), rel=1e-3
        )


def test_a_convolution_is_a_matrix_too():
    delta = torch.randn((8, 4, 2, 2), generator=torch.Generator().manual_seed(0))
    update, _, _ = low_rank.nearest_update(delta, 8)
    assert update.up.shape == (8, 8, 1, 1) and update.down.shape == (8, 4, 2, 2)
    assert torch.allclose(update.delta(), delta, atol=1e-5)


@pytest.mark.slow
def test_a_lora_of_a_full_fine_tuning(a_run, export, nano_folder, tmp_path, capfd):
    run, trained = a_run("lora=null")
    folder = export(run, "lora=null", "task.rank=128", "task.format=folded")
    base = output(PretrainedModel(nano_folder, CPU, torch.float32).transformer())
    found = through_diffusers(nano_folder, folder)
    # Biases and norms are not in it.
    assert (found - trained).norm() < 0.5 * (base - trained).norm()
    assert "is in biases and norms, which no LoRA holds" in capfd.readouterr().out
    whole = export(run, "lora=null", f"task.to='{tmp_path / 'whole'}'", "task.dtype=fp16")
    assert dtypes(whole) == {torch.float16}


def test_a_checkpoint_delivers_its_average(a_run, export, tmp_path):
    run, _ = a_run(*ALPHA)
    other, _ = a_run(*ALPHA, seed=5)
    checkpoint = run / "checkpoints" / "step_000004"
    (checkpoint / "averaged").mkdir(parents=True)
    shutil.copy(other / lora.WEIGHTS, checkpoint / "averaged")
    folder = export(checkpoint, f"task.to='{tmp_path / 'out'}'")
    assert (folder / lora.WEIGHTS).read_bytes() == (other / lora.WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("made", "asked", "said"),
    [
        (["lora=null"], ["lora=null", "task.format=comfyui"], "task.rank=64 makes a LoRA"),
        (["lora=null"], ["lora=null", "task.strength=0.5"], "task.strength and task.add are for"),
        (["lora.use_dora=true"], ["lora.use_dora=true", "task.format=comfyui"], "is a DoRA"),
    ],
)
def test_what_a_format_cannot_hold_is_said(a_run, export, made, asked, said):
    run, _ = a_run(*made)
    with pytest.raises(UserError, match=said):
        export(run, *asked)
    assert not (run / "export").exists() or not list((run / "export").iterdir())


@pytest.mark.slow
def test_no_result_another_model_and_a_folder_that_exists(a_run, export, tmp_path):
    run, _ = a_run(*ALPHA)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="has no result"):
        export(tmp_path / "empty")
    export(run, "task.format=folded")
    with pytest.raises(UserError, match="exists already: remove it"):
        export(run, "task.format=folded")
    small = {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 7)}
    small["transformer.transformer_blocks.0.attn1.to_q.lora_B.weight"] = torch.zeros(9, 2)
    save_file(small, tmp_path / "small.safetensors")
    with pytest.raises(UserError, match="these LoRAs are for different models"):
        export(run, "task.format=comfyui", f"task.add=['{tmp_path / 'small.safetensors'}']")
