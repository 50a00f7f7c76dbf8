"""What cannot be imported is refused in one line that says what it is. Nothing is written."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogvx.errors import UserError
from cogvx.export import importer, low_rank
from cogvx.model import lora
from cogvx.model.lora_file import read_lora

TO_Q = "transformer.transformer_blocks.{}.attn1.to_q.lora_{}.weight"


def pair(width, rank=2, number=0):
    return {
        TO_Q.format(number, "A"): torch.ones(rank, width),
        TO_Q.format(number, "B"): torch.ones(width, rank),
    }


def refused(compose, nano_folder, file, *overrides):
    """The message of an import of this file."""
    folder = file.parent / "refused"
    path = [] if any("model=" in o for o in overrides) else [f"model.path='{nano_folder}'"]
    config = compose(
        "task=import", f"task.file='{file}'", f"output_dir='{folder}'", *path, *overrides
    )
    with pytest.raises(UserError) as caught:
        importer.import_weights(config, config.task)
    assert not folder.exists()
    said = str(caught.value)
    assert str(file) in said and "\n" not in said
    return said


WRONG_TENSORS = {
    "another base": (
        pair(1920) | pair(1920, number=1),
        "2 of its 2 layers do not fit model=nano. The first is transformer_blocks.0.attn1.to_q: "
        "[1920, 1920] in the file, [128, 128] in the model. It fits model=2b",
    ),
    "no released base": (pair(64), "It fits none of the released CogVideoX models"),
    "a block too many": (
        pair(128, number=9),
        "transformer_blocks.9.attn1.to_q: [128, 128] in the file, not there in the model",
    ),
    "a matrix is missing": (
        {TO_Q.format(0, "A"): torch.ones(2, 128)},
        "transformer_blocks.0.attn1.to_q has down and no up matrix",
    ),
    "ranks that do not fit": (
        pair(128) | {TO_Q.format(0, "B"): torch.ones(128, 3)},
        "are [2, 128] and [128, 3], and their product does not exist",
    ),
    "not finite": (
        pair(128) | {TO_Q.format(0, "B"): torch.full((128, 2), torch.nan)},
        "holds numbers that are not finite",
    ),
    "twice": (
        pair(128) | {TO_Q.format(0, "A").removeprefix("transformer."): torch.ones(2, 128)},
        "has the down of transformer_blocks.0.attn1.to_q twice",
    ),
    "text encoder": (
        pair(128) | {"text_encoder.layers.0.q.lora_A.weight": torch.ones(2, 2)},
        "1 of 3 tensors are not of a LoRA for CogVideoX. The first is text_encoder.layers.0.q."
        "lora_A.weight: it is of a text encoder",
    ),
    "kohya's text encoder": (
        {"lora_te_encoder_block_0.lora_down.weight": torch.ones(2, 2)},
        "it is of a text encoder",
    ),
    "FLUX": (
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 2)},
        "such names are of FLUX",
    ),
    "Wan": (
        {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 2)},
        "such names are of Wan",
    ),
    "LTX-Video": (
        pair(128) | {"transformer.transformer_blocks.0.attn2.to_q.lora_A.weight": torch.ones(2, 2)},
        "such names are of LTX-Video",
    ),
    "unknown prefix": (
        {f"my.{name}": tensor for name, tensor in pair(128).items()},
        "its first tensor is my.transformer.transformer_blocks.0.attn1.to_q.lora_A.weight, and "
        "CogVideoX has no layer of this name",
    ),
    "LoKr": (
        {"lora_unet_transformer_blocks_0_attn1_to_q.lokr_w1": torch.ones(2, 2)},
        "it is of LoKr, which is not read here",
    ),
    "DoRA of kohya": (
        pair(128) | {"transformer.transformer_blocks.0.attn1.to_q.dora_scale": torch.ones(128, 1)},
        "a DoRA of kohya's tools (dora_scale)",
    ),
    "half a DoRA": (
        pair(128)
        | pair(128, number=1)
        | {"transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector": torch.ones(128)},
        "1 of its 2 layers have no magnitude, such as transformer_blocks.1.attn1.to_q",
    ),
    "a bias": (
        pair(128) | {"transformer.transformer_blocks.0.attn1.to_q.lora_B.bias": torch.ones(128)},
        "a LoRA with trained biases",
    ),
    "a VAE": ({"encoder.conv_in.conv.weight": torch.ones(2, 2)}, "it has no matrices of a LoRA"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_are_no_lora_for_this_model(compose, nano_folder, tmp_path, case):
    tensors, said = WRONG_TENSORS[case]
    file = tmp_path / "lora.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    assert said in refused(compose, nano_folder, file, "task.alpha=2")


@pytest.mark.parametrize(
    ("width", "model", "fits"),
    [
        (1920, "5b", "model=2b"),
        (3072, "2b", "model=5b and model=5b_i2v and model=1_5_5b and model=1_5_5b_i2v"),
    ],
)
def test_the_model_that_a_lora_fits_is_named_without_a_download(
    compose, nano_folder, tmp_path, width, model, fits
):
    file = tmp_path / "lora.safetensors"
    save_file(pair(width), file)
    said = refused(compose, nano_folder, file, f"model={model}", "task.alpha=2")
    assert f"do not fit model={model}" in said and said.endswith(f"It fits {fits}")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 123\n"
WRONG_BYTES = {
    "empty": (b"", "is empty"),
    "zeros": (b"\0" * 500, "is empty"),
    "pointer": (POINTER, "is a pointer of git LFS, not the weights: git lfs pull fetches them"),
    "page": (b"<!DOCTYPE html><html></html>", "is a web page, not weights"),
    "text": (b"no such thing", "cannot be read as weights"),
    "cut": (struct.pack("<Q", 400) + b'{"a":', "cannot be read as weights"),
}


@pytest.mark.parametrize("case", WRONG_BYTES)
def test_files_that_are_no_weights(compose, nano_folder, tmp_path, case):
    content, said = WRONG_BYTES[case]
    file = tmp_path / "lora.safetensors"
    file.write_bytes(content)
    assert said in refused(compose, nano_folder, file)
    for read in (low_rank.read_updates, lora.read_adapter):
        with pytest.raises(UserError, match=said.split(":")[0]):
            read(file)


def test_a_model_of_pointers_is_named(nano_folder, tmp_path, compose):
    """git clone without git LFS leaves such files."""
    folder = Path(shutil.copytree(nano_folder, tmp_path / "model"))
    [file] = (folder / "vae").glob("*.safetensors")
    file.write_bytes(POINTER)
    config = compose("model=2b", f"model.path='{folder}'", "data.height=64", "data.width=64")
    with pytest.raises(UserError, match=f"{file} is a pointer of git LFS"):
        config.model.prepare(frames=9, height=64, width=64, precision="no")


def test_a_file_that_was_cut_off(compose, nano_folder, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(pair(128), file)
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be read as weights" in refused(compose, nano_folder, file)


class Runs:
    def __reduce__(self):
        return (print, ("run!",))


def test_a_file_that_would_run_code(compose, nano_folder, tmp_path, capfd):
    file = tmp_path / "lora.pt"
    torch.save({"module": pair(128), "more": Runs()}, file)
    said = refused(compose, nano_folder, file)
    assert "holds more than tensors: reading it would run " in said and "print" in said
    assert "run!" not in capfd.readouterr().out
    torch.save([1, 2], file)
    assert "holds no tensors by name" in refused(compose, nano_folder, file)


@pytest.mark.slow
def test_folders(compose, nano_folder, tmp_path):
    place = tmp_path / "theirs"
    place.mkdir()
    assert "holds no file of weights" in refused(compose, nano_folder, place)
    (place / "checkpoint-500").mkdir()
    save_file(pair(128), place / "checkpoint-500" / "pytorch_lora_weights.safetensors")
    said = refused(compose, nano_folder, place)
    assert f"give one of the folders in it, such as {place / 'checkpoint-500'}" in said
    for name in ("a.safetensors", "b.safetensors"):
        save_file(pair(128), place / name)
    said = refused(compose, nano_folder, place)
    assert "holds 2 files of weights (a.safetensors, b.safetensors): give one of them" in said
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "c"}}))
    assert "lacks c, which model.safetensors.index.json names" in refused(
        compose, nano_folder, place
    )
    (place / "pytorch_model").mkdir()
    (place / "pytorch_model" / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    said = refused(compose, nano_folder, place)
    assert f"python zero_to_fp32.py {place} JOINED" in said
    assert "does not exist here" in refused(compose, nano_folder, tmp_path / "nothing")


def test_a_distributed_checkpoint_is_read_when_it_is_joined(compose, nano_folder, tmp_path):
    from torch.distributed.checkpoint import FileSystemWriter, save
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    # As CogKit saves it (finetune/base/base_trainer.py).
    names = {name.removeprefix("transformer."): tensor for name, tensor in pair(128).items()}
    # One thread would ask for streams of the second device, if a test before has made it.
    writer = FileSystemWriter(tmp_path / "theirs", thread_count=2)
    save({"app": {"model": names, "optim": {}}}, storage_writer=writer, no_dist=True)
    said = refused(compose, nano_folder, tmp_path / "theirs")
    joins = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
    assert f"{joins} {tmp_path / 'theirs'} joined.pt" in said
    dcp_to_torch_save(tmp_path / "theirs", tmp_path / "joined.pt")
    assert list(read_lora(tmp_path / "joined.pt").layers) == ["transformer_blocks.0.attn1.to_q"]


@pytest.mark.slow
def test_alphas_that_contradict_each_other(compose, nano_folder, tmp_path):
    file = tmp_path / "lora.safetensors"
    settings = {"lora_config": json.dumps({"r": 2, "lora_alpha": 4})}
    save_file(pair(128), file, metadata=settings)
    said = refused(compose, nano_folder, file, "task.alpha=2")
    assert "task.alpha=2, but" in said and "says that alpha is 4" in said
    save_file(pair(128), file, metadata={"lora_config": json.dumps({"peft_type": "LOHA"})})
    assert "is a LOHA of peft" in refused(compose, nano_folder, file)
    for settings, text in (
        (
            {"lora_alpha": 2, "init_lora_weights": "pissa_niter_4"},
            "init_lora_weights=pissa_niter_4",
        ),
        ({"lora_alpha": "64"}, "its settings have alpha '64'"),
        ({"lora_alpha": 2, "alpha_pattern": {"to_q": 0}}, "its settings have alpha 0: it must be"),
    ):
        save_file(pair(128), file, metadata={"lora_config": json.dumps(settings)})
        assert text in refused(compose, nano_folder, file)
    stem = "lora_unet_transformer_blocks_0_attn1_to_q"
    found = {f"{stem}.lora_down.weight": torch.ones(2, 128), f"{stem}.alpha": torch.tensor(0.0)}
    save_file(found | {f"{stem}.lora_up.weight": torch.ones(128, 2)}, file)
    assert "the alpha of transformer_blocks.0.attn1.to_q is [0.0]" in refused(
        compose, nano_folder, file
    )
    with pytest.raises(UserError, match="must be above 0"):
        compose("task=import", f"task.file='{file}'", "task.alpha=0")


def test_nothing_is_written_over_the_file(compose, nano_folder, tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(pair(128), file)
    where = [f"task.file='{file}'", f"output_dir='{tmp_path}'", f"model.path='{nano_folder}'"]
    config = compose("task=import", "task.alpha=2", *where)
    before = file.read_bytes()
    with pytest.raises(UserError, match="choose another output_dir"):
        importer.import_weights(config, config.task)
    assert file.read_bytes() == before and len([*tmp_path.iterdir()]) == 1


def test_a_transformer_of_another_model(compose, nano_folder, family_folder, tmp_path):
    file = tmp_path / "whole"
    transformer = family_folder("5b_i2v") / "transformer"
    file.symlink_to(transformer)
    said = refused(compose, nano_folder, file)
    assert "does not fit model=nano" in said and "have another shape. The first is" in said
    assert "task.alpha is for a LoRA" in refused(compose, nano_folder, file, "task.alpha=2")


def test_read_without_an_import(tmp_path, capfd):
    """task.add and lora.init_from: strength 1 for a file without alpha, and SAT's are refused."""
    file = tmp_path / "lora.safetensors"
    save_file(pair(128), file)
    [update] = low_rank.read_updates(file, 0.5).values()
    assert torch.equal(update.delta(), torch.full((128, 128), 1.0))
    assert "has no alpha: taken at strength 1, as diffusers does" in capfd.readouterr().out
    start = "model.diffusion_model.transformer.layers.0.attention.dense.matrix_"
    matrices = {f"{start}A.0": torch.ones(2, 128), f"{start}B.0": torch.ones(128, 2)}
    torch.save({"module": matrices}, tmp_path / "sat.pt")
    assert read_lora(tmp_path / "sat.pt").naming.title == "SAT"
    with pytest.raises(UserError, match=r"Import it first: python launch.py task=import"):
        low_rank.read_updates(tmp_path / "sat.pt")
