"""Vision-language models on this machine: tiny random ones of real classes."""

import logging
import shutil

import pytest
import torch
import vision_models
from PIL import Image

from cogvx.errors import UserError
from cogvx.inference import chat as chats
from cogvx.inference.vision import opened_vision, quantization
from cogvx.options.tasks import ModelStorage

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=sorted(vision_models.FAMILIES))
def tiny(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return vision_models.FAMILIES[request.param](folder)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(chats, "MOST_TOKENS", 6)


def about(shade: int, words: str = "describe the clip"):
    pictures = [Image.new("RGB", (64, 48), (shade, shade // 2, 40 * k)) for k in range(3)]
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]


def test_it_looks_at_the_pictures_and_answers_alike_alone_and_beside_others(tiny, recwarn):
    chat = opened_vision(str(tiny), None, CPU, "task.captioner")
    [dark], [bright] = chat([about(10)]), chat([about(240)])
    assert dark.text and dark != bright
    longer = about(90, "describe the clip on the beach a dog runs")
    together = chat([about(10), longer, about(240)])
    assert [together[0], together[2]] == [dark, bright]
    assert not [each for each in recwarn if "do_sample" in str(each.message)]


def test_an_answer_says_whether_it_is_complete(tiny):
    chat = opened_vision(str(tiny), None, CPU, "task.captioner")
    model, first = chat.args[1], chat([about(10)])[0]
    assert not first.complete, "six tokens and no end"
    tokens = chat.args[0].tokenizer(first.text.split()[0]).input_ids
    model.generation_config.eos_token_id = [999, tokens[-1]]
    assert chat([about(10)])[0].complete


@pytest.mark.parametrize("storage", [ModelStorage.int8, ModelStorage.nf4])
def test_weights_are_loaded_in_fewer_bits(tiny, storage):
    pytest.importorskip("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    chat = opened_vision(str(tiny), None, CPU, "task.captioner", quantization(storage))
    kinds = {p.dtype for name, p in chat.args[1].named_parameters() if "q_proj.weight" in name}
    assert torch.float32 not in kinds and chat([about(10)])[0].text


def test_what_is_no_such_model_is_named(tiny, tmp_path):
    def refused(folder, text):
        with pytest.raises(UserError, match=text) as caught:
            opened_vision(str(folder), None, CPU, "task.captioner")
        assert "\n" not in str(caught.value)

    refused(tmp_path, "cannot be loaded as a model of transformers that sees pictures")
    plain = shutil.copytree(tiny, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    refused(plain, "it has no chat template")
    for error, said in (
        (ValueError("a.py: set the option `trust_remote_code=True`"), "brings code of its own"),
        (ImportError("\nX requires the Torchvision library"), "pip install torchvision"),
    ):
        assert said in chats.why_not_loaded(error)
