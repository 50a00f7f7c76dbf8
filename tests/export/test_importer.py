"""What other trainers write means the same after an import, read by plain diffusers.

The files are written here as each trainer's source writes them, without this project's names.
"""

import json

import families
import numpy
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import save_file

from cogvx import config as configuration
from cogvx.errors import UserError
from cogvx.export import exporter, importer
from cogvx.model import layers, lora, naming, nano
from cogvx.model.released import RELEASED
from cogvx.records import record

WIDTH, BLOCKS, RANK = 128, 6, 4
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
ATTENTION = [f"transformer_blocks.{n}.attn1.{layer}" for n in range(BLOCKS) for layer in LAYERS]
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


def matrices(modules=ATTENTION, rank=RANK, width=WIDTH):
    """{module: (down, up)}, always the same."""
    generator = torch.Generator().manual_seed(5)
    return {
        module: (
            0.1 * torch.randn(rank, width, generator=generator),
            0.1 * torch.randn(width, rank, generator=generator),
        )
        for module in modules
    }


@pytest.fixture
def merged(nano_folder):
    """merged(matrices, 0.5): the output with the products added to the weights by hand."""

    def make(found, strength):
        transformer = CogVideoXTransformer3DModel.from_pretrained(nano_folder / "transformer")
        modules = dict(transformer.named_modules())
        with torch.no_grad():
            for name, (down, up) in found.items():
                scale = strength[name] if isinstance(strength, dict) else strength
                modules[name].weight += scale * (up @ down)
        return output(transformer)

    return make


@pytest.fixture
def imported(compose, nano_folder, tmp_path):
    """imported(file, "task.alpha=2"): the folder that the command writes."""

    def start(file, *overrides, name="run", model=("model=nano",)):
        where = [f"task.file='{file}'", f"output_dir='{tmp_path / name}'"]
        path = [] if model != ("model=nano",) else [f"model.path='{nano_folder}'"]
        config = compose("task=import", *model, *path, *where, *overrides)
        return importer.import_weights(config, config.task)

    return start


def through_diffusers(nano_folder, folder):
    pipeline = CogVideoXPipeline.from_pretrained(nano_folder)
    pipeline.load_lora_weights(str(folder))
    return output(pipeline.transformer)


def same(one, other):
    return torch.allclose(one, other, atol=2e-5)


# -- the forms in which trainers write a LoRA ------------------------------------------------------


def named(found, down, up, module=lambda name: name):
    tensors = {}
    for name, (a, b) in found.items():
        tensors |= {down.format(module(name)): a.clone(), up.format(module(name)): b.clone()}
    return tensors


def of_diffusers(found, path, **metadata):
    """CogVideoXPipeline.save_lora_weights: examples/cogvideo, finetrainers, CogVideo finetune."""
    tensors = named(found, "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight")
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


def with_settings(found, path, **settings):
    """As diffusers stores peft's settings."""
    settings = {f"transformer.{name}": value for name, value in settings.items()}
    return of_diffusers(found, path, lora_adapter_metadata=json.dumps(settings))


def of_finetrainers(found, path):
    settings = {"r": RANK, "lora_alpha": 2, "init_lora_weights": True, "target_modules": "to_q"}
    return of_diffusers(found, path, lora_config=json.dumps(settings, indent=4))


def of_older_diffusers(found, path):
    save_file(
        named(found, "transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight"), path
    )
    return path


def of_peft(found, path):
    """PeftModel.save_pretrained: the settings are in a file of their own."""
    start = "base_model.model.{}.lora_"
    save_file(named(found, start + "A.weight", start + "B.weight"), path)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "use_rslora": False}
    (path.parent / "adapter_config.json").write_text(json.dumps(settings))
    return path


def of_sat_converter(found, path):
    """CogVideo's tools/export_sat_lora_weight.py: no prefix."""
    save_file(named(found, "{}.lora_A.weight", "{}.lora_B.weight"), path)
    return path


def sat_stem(module):
    _, number, _, layer = module.split(".", 3)
    fused = "dense" if layer == "to_out.0" else "query_key_value"
    index = {"to_q": 0, "to_k": 1, "to_v": 2, "to_out.0": 0}[layer]
    stem = f"model.diffusion_model.transformer.layers.{number}.attention.{fused}"
    return stem + ".matrix_{}." + str(index)


def of_sat(found, path):
    """SAT through DeepSpeed: the whole model, the states of random numbers, and the matrices."""
    module = {sat_stem(name).format("A"): a for name, (a, _) in found.items()}
    module |= {sat_stem(name).format("B"): b for name, (_, b) in found.items()}
    start = "model.diffusion_model."
    module[start + "transformer.layers.0.attention.dense.original.weight"] = torch.zeros(3, 3)
    module["first_stage_model.decoder.conv_in.conv.weight"] = torch.zeros(3, 3)
    states = {"module": module, "iteration": 5, "np_rng_state": numpy.random.get_state()}
    states |= {"param_shapes": [torch.Size([3])], "ds_version": "0.15", "optimizer": None}
    torch.save(states, path)
    return path


def kohya(found, path, prefix, module, alpha=2.0):
    tensors = named(found, prefix + "{}.lora_down.weight", prefix + "{}.lora_up.weight", module)
    tensors |= {f"{prefix}{module(name)}.alpha": torch.tensor(alpha) for name in found}
    save_file(tensors, path)
    return path


def flat(module):
    return module.replace(".", "_")


def of_comfyui_module(module):
    names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "attn_out"}
    _, number, _, layer = module.split(".", 3)
    return f"blocks.{number}.{names[layer]}"


FORMS = {
    "diffusers": lambda found, path: with_settings(found, path, r=RANK, lora_alpha=2),
    "rslora": lambda found, path: with_settings(found, path, r=RANK, lora_alpha=1, use_rslora=True),
    "finetrainers": of_finetrainers,
    "peft": of_peft,
    "kohya": lambda found, path: kohya(found, path, "lora_unet_", flat),
    "cogvideox_fun": lambda found, path: kohya(found, path, "lora_unet__", flat),
    "comfyui": lambda found, path: kohya(found, path, "diffusion_model.", of_comfyui_module),
    "comfyui_flat": lambda found, path: kohya(
        found, path, "lora_unet_", lambda module: flat(of_comfyui_module(module))
    ),
    "prefix of ComfyUI": lambda found, path: kohya(
        found, path, "diffusion_model.", lambda module: module
    ),
}
WITHOUT_ALPHA = {
    "diffusers' script": of_diffusers,
    "older diffusers": of_older_diffusers,
    "SAT's converter": of_sat_converter,
    "SAT": of_sat,
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_lora_with_its_strength(imported, merged, nano_folder, tmp_path, form):
    file = FORMS[form](matrices(), tmp_path / "lora.safetensors")
    folder = imported(file)
    assert same(through_diffusers(nano_folder, folder), merged(matrices(), 0.5))
    config = configuration.read(folder / record.CONFIG)
    assert config.lora.rank == RANK and config.lora.scale == 0.5
    assert config.lora.target_modules == list(LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("form", WITHOUT_ALPHA)
def test_an_alpha_that_the_file_lacks_is_asked_for(imported, merged, nano_folder, tmp_path, form):
    ending = "pt" if form == "SAT" else "safetensors"
    file = WITHOUT_ALPHA[form](matrices(), tmp_path / f"lora.{ending}")
    with pytest.raises(
        UserError, match=r"does not hold the alpha .* task.alpha=4, the rank, means"
    ):
        imported(file)
    assert not (tmp_path / "run").exists()
    folder = imported(file, "task.alpha=3")
    assert same(through_diffusers(nano_folder, folder), merged(matrices(), 0.75))


@pytest.mark.slow
def test_the_record_names_the_file_and_every_tensor_is_counted(imported, tmp_path, capfd):
    file = of_sat(matrices(), tmp_path / "mp_rank_00_model_states.pt")
    folder = imported(file, "task.alpha=4", "validation.validation_prompt=a cat")
    said = capfd.readouterr().out
    assert "match   48 of 48 tensors of the LoRA: 24 layers of model=nano, names of SAT" in said
    assert "; 2 weights of the base model in it are not needed" in said
    summary = json.loads((folder / "summary.json").read_text())
    [(path, digest)] = summary["imported_from"].items()
    assert path == str(file) and digest == importer.sha256_of(file)
    assert summary["status"] == "done" and summary["imported_form"] == "LoRA, names of SAT"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "LoRA of rank 4 on nano, imported: LoRA, names of SAT" in page
    how = json.loads((folder / "inference.json").read_text())
    assert how["call"]["prompt"] == "a cat" and how["lora_scale"] == 1.0
    assert imported(file, "task.alpha=4", "validation.validation_prompt=a cat") == folder
    assert "holds this import already" in capfd.readouterr().out
    other = of_diffusers(matrices(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"holds weights imported from .*: choose another"):
        imported(other, "task.alpha=4", "validation.validation_prompt=a cat")


@pytest.mark.slow
def test_layers_of_other_ranks_and_alphas(imported, merged, nano_folder, tmp_path, capfd):
    found = matrices(ATTENTION[:12], 2) | matrices(ATTENTION[12:], 6)
    pattern = {r"transformer_blocks\.[0-2]\..*": 6}
    settings = {"r": 6, "lora_alpha": 3, "alpha_pattern": pattern, "rank_pattern": {}}
    file = with_settings(found, tmp_path / "lora.safetensors", **settings)
    strength = dict.fromkeys(ATTENTION[:12], 3.0) | dict.fromkeys(ATTENTION[12:], 0.5)
    folder = imported(file)
    assert "its layers differ: ranks 2/6, strengths 0.5 to 3" in capfd.readouterr().out
    assert same(through_diffusers(nano_folder, folder), merged(found, strength))
    assert configuration.read(folder / record.CONFIG).lora.rank == 6


@pytest.mark.slow
def test_layers_that_others_have_are_named(imported, merged, nano_folder, tmp_path, capfd):
    found = matrices(ATTENTION[1:])
    folder = imported(with_settings(found, tmp_path / "l.safetensors", r=RANK, lora_alpha=RANK))
    said = capfd.readouterr().out
    assert (
        "1 layer of the same kinds has no LoRA in the file: transformer_blocks.0.attn1.to_q" in said
    )
    assert same(through_diffusers(nano_folder, folder), merged(found, 1.0))
    targets = configuration.read(folder / record.CONFIG).lora.target_modules
    assert targets[:3] == ["to_k", "to_v", "to_out.0"] and len(targets) == 3 + BLOCKS - 1


@pytest.mark.slow
def test_a_dora_of_peft(imported, nano_folder, tmp_path, compose):
    transformer = CogVideoXTransformer3DModel.from_pretrained(nano_folder / "transformer")
    lora.Lora(RANK, 2, ["to_q"], False, True, None).attach(transformer, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora.trainable(transformer):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    (tmp_path / "dora").mkdir()
    lora.save(transformer, tmp_path / "dora")
    folder = imported(tmp_path / "dora")
    assert configuration.read(folder / record.CONFIG).lora.use_dora
    assert same(through_diffusers(nano_folder, folder), output(transformer))


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["comfyui", "comfyui_wrapper", "folded", "diffusers"])
def test_what_was_exported_comes_back(
    imported, merged, nano_folder, tmp_path, compose, file_format
):
    first = imported(FORMS["kohya"](matrices(), tmp_path / "lora.safetensors"), name="first")
    config = compose("task=export", f"task.run='{first}'", f"task.format={file_format}")
    out = exporter.export_result(config, config.task)
    assert same(through_diffusers(nano_folder, imported(out)), merged(matrices(), 0.5))


# Inputs and outputs of layers that are not square.
MORE_LAYERS = {
    "transformer_blocks.0.ff.net.0.proj": (128, 512),
    "transformer_blocks.3.ff.net.2": (512, 128),
    "transformer_blocks.5.norm1.linear": (128, 768),
    "patch_embed.text_proj": (64, 128),
    "time_embedding.linear_1": (128, 128),
    "norm_out.linear": (128, 256),
    "proj_out": (128, 64),
}


@pytest.mark.slow
def test_every_kind_of_layer_goes_out_and_comes_back(imported, nano_folder, tmp_path, compose):
    generator = torch.Generator().manual_seed(1)
    found = {
        module: (
            0.1 * torch.randn(RANK, inputs, generator=generator),
            0.1 * torch.randn(outputs, RANK, generator=generator),
        )
        for module, (inputs, outputs) in MORE_LAYERS.items()
    }
    # A convolution: the matrix on the side of the input has its size.
    found["patch_embed.proj"] = (
        0.1 * torch.randn(RANK, 16, 2, 2, generator=generator),
        0.1 * torch.randn(128, RANK, 1, 1, generator=generator),
    )
    first = imported(kohya(found, tmp_path / "l.safetensors", "lora_unet_", flat), name="first")
    transformer = CogVideoXTransformer3DModel.from_pretrained(nano_folder / "transformer")
    modules = dict(transformer.named_modules())
    with torch.no_grad():
        for name, (down, up) in found.items():
            delta = (up.flatten(1) @ down.flatten(1)).reshape(modules[name].weight.shape)
            modules[name].weight += 0.5 * delta
    assert same(through_diffusers(nano_folder, first), output(transformer))
    targets = configuration.read(first / record.CONFIG).lora.target_modules
    assert "proj_out" in targets and "transformer_blocks.0.ff.net.0.proj" in targets
    config = compose("task=export", f"task.run='{first}'", "task.format=comfyui")
    again = imported(exporter.export_result(config, config.task), name="again")
    assert same(through_diffusers(nano_folder, again), output(transformer))


@pytest.mark.slow
def test_an_export_adds_a_foreign_file(imported, merged, nano_folder, tmp_path, compose):
    first = imported(FORMS["kohya"](matrices(), tmp_path / "lora.safetensors"))
    other = FORMS["comfyui"](matrices(), tmp_path / "other.safetensors")
    add = [f"task.add=['{other}']", "task.add_strengths=[0.5]", "task.format=folded"]
    config = compose("task=export", f"task.run='{first}'", *add)
    folder = exporter.export_result(config, config.task)
    assert same(through_diffusers(nano_folder, folder), merged(matrices(), 0.75))


# -- whole transformers ----------------------------------------------------------------------------


@pytest.fixture
def tuned(nano_folder):
    """The state of a fully fine-tuned transformer, and its output."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(nano_folder / "transformer")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return transformer


def equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def as_a_folder(transformer, place):
    """finetrainers' model_weights/000500/, and diffusers' from_pretrained."""
    transformer.save_pretrained(place / "transformer", max_shard_size="300KB")
    return place


def as_accelerate_saves(transformer, place):
    """CogVideo's finetune on one GPU: accelerator.save_state()."""
    save_file(transformer.state_dict(), place / "model.safetensors")
    torch.save({}, place / "optimizer.bin")
    return place


def as_deepspeed_saves(transformer, place):
    """CogVideo's finetune with ZeRO-2: the model is in one file, in a folder beside `latest`."""
    (place / "pytorch_model").mkdir()
    (place / "latest").write_text("pytorch_model")
    states = {"module": transformer.state_dict(), "ds_config": {}, "global_steps": 5}
    torch.save(states, place / "pytorch_model" / "mp_rank_00_model_states.pt")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("save", [as_a_folder, as_accelerate_saves, as_deepspeed_saves])
def test_a_transformer(imported, tuned, tmp_path, capfd, save):
    (tmp_path / "theirs").mkdir()
    folder = imported(save(tuned, tmp_path / "theirs"))
    found = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert equal_states(found, tuned) and same(output(found), output(tuned))
    assert configuration.read(folder / record.CONFIG).lora is None
    count = len(tuned.state_dict())
    assert f"match   {count} of {count} weights of model=nano" in capfd.readouterr().out


def sat_state(transformer):
    """CogVideo's sat/dit_video_concat.py: the names and the layout of the weights."""
    state, found = transformer.state_dict(), {}
    base = "model.diffusion_model."

    def put(theirs, *ours):
        for end in ("weight", "bias"):
            if f"{ours[0]}.{end}" in state:
                found[f"{base}{theirs}.{end}"] = torch.cat([state[f"{o}.{end}"] for o in ours])

    for n in range(transformer.config.num_layers):
        block, layer = f"transformer_blocks.{n}", f"transformer.layers.{n}"
        put(f"{layer}.attention.query_key_value", *(f"{block}.attn1.to_{x}" for x in "qkv"))
        put(f"{layer}.attention.dense", f"{block}.attn1.to_out.0")
        put(f"{layer}.mlp.dense_h_to_4h", f"{block}.ff.net.0.proj")
        put(f"{layer}.mlp.dense_4h_to_h", f"{block}.ff.net.2")
        put(f"{layer}.input_layernorm", f"{block}.norm1.norm")
        put(f"{layer}.post_attention_layernorm", f"{block}.norm2.norm")
        put(f"mixins.adaln_layer.query_layernorm_list.{n}", f"{block}.attn1.norm_q")
        put(f"mixins.adaln_layer.key_layernorm_list.{n}", f"{block}.attn1.norm_k")
        for end in ("weight", "bias"):
            one, two = (state[f"{block}.norm{i}.linear.{end}"].chunk(6) for i in (1, 2))
            # shift, scale, gate of attention and of the MLP: for the video, then for the text
            rows = [*one[:3], *two[:3], *one[3:], *two[3:]]
            found[f"{base}mixins.adaln_layer.adaLN_modulations.{n}.1.{end}"] = torch.cat(rows)
    put("transformer.final_layernorm", "norm_final")
    for kind in ("time", "ofs"):
        put(f"{kind}_embed.0", f"{kind}_embedding.linear_1")
        put(f"{kind}_embed.2", f"{kind}_embedding.linear_2")
    put("mixins.patch_embed.proj", "patch_embed.proj")
    put("mixins.patch_embed.text_proj", "patch_embed.text_proj")
    put("mixins.final_layer.norm_final", "norm_out.norm")
    put("mixins.final_layer.adaLN_modulation.1", "norm_out.linear")
    put("mixins.final_layer.linear", "proj_out")
    if "patch_embed.pos_embedding" in state:
        found[f"{base}mixins.pos_embed.pos_embedding"] = state["patch_embed.pos_embedding"]
    return found


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_transformer_of_sat(imported, family_folder, tmp_path, family):
    base = family_folder(family)
    transformer = CogVideoXTransformer3DModel.from_pretrained(base / "transformer")
    state = sat_state(transformer)
    flat_proj = state["model.diffusion_model.mixins.patch_embed.proj.weight"].flatten(1)
    # Newer versions of SAT have a linear layer there for all models.
    state["model.diffusion_model.mixins.patch_embed.proj.weight"] = flat_proj
    state["model.diffusion_model.mixins.pos_embed.freqs_sin"] = torch.zeros(2)
    state["first_stage_model.decoder.weight"] = torch.zeros(2)
    (tmp_path / "latest").write_text("500")
    (tmp_path / "500").mkdir()
    torch.save({"module": state}, tmp_path / "500" / "mp_rank_00_model_states.pt")
    size = ("data.height=48", "data.width=64")
    folder = imported(tmp_path, *size, model=(f"model={family}", f"model.path='{base}'"))
    found = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert equal_states(found, transformer)


# -- the table of layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_layers_are_those_of_the_model(family):
    import diffusers
    from accelerate import init_empty_weights

    settings = RELEASED[family][0] | {"num_layers": 2}
    with init_empty_weights(include_buffers=True):
        model = diffusers.CogVideoXTransformer3DModel(**settings)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    found = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, kinds)}
    assert layers.layer_shapes(settings) == found
    assert found.keys() <= {*layers.possible_layers()}
    assert layers.fitting_models(layers.layer_shapes(RELEASED[family][0])) == [family]


@pytest.mark.parametrize("each", naming.NAMINGS, ids=lambda each: each.title)
def test_each_naming_reads_what_it_writes(each):
    for module in ("transformer_blocks.41.attn1.to_out.0", "transformer_blocks.7.attn1.to_q"):
        for part in (naming.DOWN, naming.UP):
            assert each.read(each.key(module, part)) == (module, part)
            assert naming.naming_of([each.key(module, part)]) is each
