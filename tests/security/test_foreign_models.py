"""Models, LoRAs and states that others made: no code in them runs, whatever file it hides in."""

import json
import os
import pickle
import types
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from cogvx.data import tables
from cogvx.errors import UserError
from cogvx.evaluation.evaluate import clip_similarity
from cogvx.inference.chat import loaded_chat
from cogvx.inference.vision import loaded_vision
from cogvx.model.lora_file import read_lora
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.unread import tensor_files
from cogvx.model.weight_files import ENDINGS, read_tensors, weight_files
from cogvx.records.cached import damage
from cogvx.training import autoencoder, videos

CPU = torch.device("cpu")


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, ran):
        self.ran = str(ran)

    def __reduce__(self):
        return os.mkdir, (self.ran,)


@pytest.fixture
def ran(tmp_path):
    """The folder that evil code makes. It is not there after the test."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


def written(path, ran, how):
    """An evil file of weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    evil = {"to_q.lora_A.weight": torch.ones(2, 2), "x": Evil(ran)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(Evil(ran)))
    elif how == "old":
        torch.save(evil, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(evil, path)
    return path


def test_the_evil_files_are_evil(tmp_path):
    for how in ("pickle", "old", "zip"):
        path = written(tmp_path / how / "x.pt", tmp_path / f"{how}_ran", how)
        if how == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert (tmp_path / f"{how}_ran").is_dir()


@pytest.mark.parametrize("how", ["pickle", "old", "zip"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_files_of_weights(tmp_path, ran, ending, how):
    path = written(tmp_path / f"lora{ending}", ran, how)
    for read in (read_tensors, read_lora):
        with pytest.raises(UserError) as refused:
            read(path)
        assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_state_of_training_and_frames_of_videos(tmp_path, ran):
    written(tmp_path / autoencoder.STATE, ran, "zip")
    with pytest.raises(UserError, match="cannot be read"):
        autoencoder.resume(tmp_path, None, None)
    path = tmp_path / "base.npz"
    frames = numpy.array([Evil(ran)], dtype=object)
    numpy.savez(path, frames=frames)
    place = types.SimpleNamespace(base_frames=lambda name: path)
    assert videos.ValidationVideos.kept_base(place, "x") is None


@pytest.mark.parametrize("how", ["pickle", "zip"])
def test_files_of_the_cache(tmp_path, ran, how):
    path = written(tmp_path / "a.safetensors", ran, how)

    assert "it cannot be read" in damage(path)


def test_a_table_with_a_type_of_python(tmp_path, ran):
    """pyarrow before 14 unpickled it."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    about = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Evil(ran)),
    }
    field = pyarrow.field("text", pyarrow.string(), metadata=about)
    table = pyarrow.table({"text": ["a cat"]}, schema=pyarrow.schema([field]))
    parquet.write_table(table, tmp_path / "metadata.parquet")
    assert tables.parquet_rows(tmp_path / "metadata.parquet") == [(1, {"text": "a cat"})]


# -- whole models ------------------------------------------------------------------------------

CODE = "import os\nos.mkdir({ran!r})\n"


@pytest.fixture
def model_with_code(tmp_path, ran):
    """A chat model whose every part has code of its own beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil", "processing_evil"):
        (folder / f"{name}.py").write_text(CODE.format(ran=str(ran)))
    classes = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModel": "modeling_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoModelForImageTextToText": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", None],
        "AutoProcessor": "processing_evil.Evil",
    }
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        about = {"model_type": "evil", "tokenizer_class": "Evil", "processor_class": "Evil"}
        (folder / name).write_text(json.dumps(about | {"auto_map": classes}))
    (folder / "generate.py").write_text(CODE.format(ran=str(ran)))
    return folder


def test_the_code_of_a_model_is_not_run_and_nobody_is_asked(model_with_code, monkeypatch):
    def ask(*_):
        raise AssertionError("transformers asks whether to run the code")

    monkeypatch.setattr("builtins.input", ask)
    for load, setting in ((loaded_chat, "task.enhancer"), (loaded_vision, "task.captioner")):
        with pytest.raises(UserError, match="it brings code of its own, which is not run here"):
            load(str(model_with_code), CPU, setting)
    with pytest.raises(UserError, match="cannot be loaded as a CLIP model"):
        clip_similarity(str(model_with_code), CPU)
    model_with_code.rename(model_with_code.with_name("tokenizer"))
    with pytest.raises(UserError, match="cannot be read"):
        PretrainedModel(model_with_code.parent, CPU, torch.float32).tokenizer()


def test_pickles_in_the_place_of_a_models_weights(tmp_path, ran, family_folder):
    (tmp_path / "chat").mkdir()
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    ).save_pretrained(tmp_path / "chat")
    (tmp_path / "chat" / "model.safetensors").unlink()
    written(tmp_path / "chat" / "pytorch_model.bin", ran, "zip")
    from cogvx.inference.chat import on_this_device

    with pytest.raises(OSError, match="safetensors"):
        on_this_device(LlamaForCausalLM, tmp_path / "chat", CPU, None)
    import shutil

    folder = shutil.copytree(family_folder("2b"), tmp_path / "2b")
    for part, name in (("text_encoder", "pytorch_model"), ("vae", "diffusion_pytorch_model")):
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
        written(folder / part / f"{name}.bin", ran, "zip")
    pretrained = PretrainedModel(folder, CPU, torch.float32)
    with pytest.raises(UserError, match="cannot be loaded as T5EncoderModel"):
        pretrained.text_encoder()
    with pytest.raises(UserError, match="cannot be loaded as AutoencoderKLCogVideoX"):
        pretrained.vae(tiling=False)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('RAN') }}",
    "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
    "{% set x = raise_exception.__globals__ %}{{ x.__builtins__.__import__('os').mkdir('RAN') }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(ran, template):
    from jinja2.exceptions import SecurityError, UndefinedError
    from transformers.utils.chat_template_utils import render_jinja_template

    with pytest.raises((SecurityError, UndefinedError)):
        render_jinja_template(
            [[{"role": "user", "content": "x"}]],
            chat_template=template.replace("RAN", str(ran)),
        )


def test_an_index_names_files_beside_it_alone(tmp_path):
    secret, folder = tmp_path / "secret.safetensors", tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, secret)
    for name in ("../secret.safetensors", str(secret)):
        index = folder / "x.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="and not a file beside it"):
            weight_files(folder)
        with pytest.raises(ValueError, match="and not a file beside it"):
            tensor_files(folder, "x")
    index.unlink()
    (folder / "latest").write_text("../..")
    with pytest.raises(UserError, match="holds no file of weights"):
        weight_files(folder)


def test_a_zip_of_members_that_lead_elsewhere_is_no_file_of_weights(tmp_path):
    path = tmp_path / "in" / "lora.pt"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../out", b"x")
        file.writestr("archive/data.pkl", pickle.dumps({}))
    with pytest.raises(UserError, match=r"cannot be read as weights|holds no tensors"):
        read_tensors(path)
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["in", "lora.pt"]
