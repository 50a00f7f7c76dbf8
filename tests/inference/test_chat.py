"""A language model writes prompts out: on this machine, and behind a server."""

import gc
import weakref

import pytest
import scripted
import torch
from scripted import said
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cogvx.errors import UserError
from cogvx.evaluation import enhancing
from cogvx.evaluation.enhancing import enhanced
from cogvx.evaluation.wanted import Wanted
from cogvx.inference import chat as chats
from cogvx.inference.chat import opened_chat

CPU = torch.device("cpu")
MARKS = ["<unk>", "</s>", "<system>", "<user>", "<answer>"]
WORDS = [*MARKS, "a", "cat", "dog", "runs", "on", "the", "beach"]
TEMPLATE = (
    "{% for each in messages %}<{{ each['role'] }}> {{ each['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory):
    """A random Llama with a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    settings = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(settings)
    # As many models ship: their own settings draw at random.
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.7
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def server(monkeypatch):
    with scripted.chat_server(monkeypatch) as found:
        yield found


def task_of(compose, *overrides):
    return compose("task=generate", "task.prompt=a", *overrides).task


def test_a_model_on_this_machine_answers_and_repeats_itself(tiny_chat, monkeypatch, recwarn):
    monkeypatch.setattr(chats, "MOST_TOKENS", 5)
    messages = [{"role": "user", "content": "a cat"}]
    answers = []
    for _ in range(2):
        chat = opened_chat(str(tiny_chat), None, CPU, "task.enhancer")
        answers += [answer.text for answer in chat([messages])]
    assert answers[0] == answers[1] and 1 <= len(answers[0].split()) <= 5
    other = [{"role": "user", "content": "the dog runs on the beach"}]
    assert [answer.text for answer in chat([other, messages])][1] == answers[0], (
        "beside a longer one"
    )
    assert chat([other])[0].text != answers[0]
    assert not [each for each in recwarn if "do_sample" in str(each.message)]


def test_a_server_is_asked_as_openai_is(compose, server):
    server.answers += [said("<think>hm</think>\n A  cat in\nthe snow. "), said("Snow falls.")]
    asked = [f"task.enhancer_url={server.url}/v1", "task.enhancer=small"]
    task = task_of(compose, *asked)
    found = enhanced(task, [Wanted("a cat"), Wanted("ZORB snow")], "ZORB", CPU)
    assert [(each.prompt, each.asked) for each in found] == [
        ("A cat in the snow.", "a cat"),
        ("ZORB Snow falls.", "ZORB snow"),
    ]
    path, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"]) == ("small", 0)
    assert [each["role"] for each in body["messages"]] == ["system", "user"]
    assert "50 to 100 words" in body["messages"][0]["content"]
    assert body["messages"][1]["content"] == "a cat"


def test_a_servers_key_is_read_from_the_environment(server, monkeypatch):
    for key, sent in (("abc", "Bearer abc"), (None, None)):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        if key is not None:
            monkeypatch.setenv("OPENAI_API_KEY", key)
        server.answers += [said("yes")]
        opened_chat("small", server.url, CPU, "task.enhancer")([[]])
        assert server.keys[-1] == sent


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (said(" "), "task.enhancer=small answers nothing to 'a'"),
        ((404, {"error": {"message": "no model small"}}), r"small .404.: no model small"),
        ((500, b"oops"), r".500.: oops"),
        ((200, b"<html>"), "does not answer in the form of OpenAI's chat completions"),
        ((200, {"choices": []}), "does not answer in the form of OpenAI's chat completions"),
    ],
)
def test_a_server_that_does_not_help_is_named(compose, server, answer, text):
    server.answers.append(answer)
    task = task_of(compose, f"task.enhancer_url={server.url}", "task.enhancer=small")
    with pytest.raises(UserError, match=text):
        enhanced(task, [Wanted("a")], None, CPU)


def test_no_server_and_no_model_are_named(compose, server, tiny_chat, tmp_path):
    free = f"http://127.0.0.1:{server.server_port + 1}"
    asked = task_of(compose, f"task.enhancer_url={free}", "task.enhancer=small")
    with pytest.raises(UserError, match=r"does not answer .*Is the server running there"):
        enhanced(asked, [Wanted("a")], None, CPU)
    with pytest.raises(UserError, match=r"task.enhancer=.*none is no folder and no hub id"):
        task_of(compose, f"task.enhancer={tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    asked = task_of(compose, f"task.enhancer={tmp_path / 'empty'}")
    with pytest.raises(UserError, match=r"task.enhancer=.*empty cannot be loaded as a chat model"):
        enhanced(asked, [Wanted("a")], None, CPU)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_chat)
    model = LlamaForCausalLM.from_pretrained(tiny_chat)
    tokenizer.chat_template = None
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "plain")
    asked = task_of(compose, f"task.enhancer={tmp_path / 'plain'}")
    with pytest.raises(UserError, match="it has no chat template"):
        enhanced(asked, [Wanted("a")], None, CPU)


def test_the_models_memory_is_free_before_the_text_encoder_comes(compose, tiny_chat, monkeypatch):
    models, loaded = [], chats.loaded_chat

    def watched(*given):
        tokenizer, model = loaded(*given)
        models.append(weakref.ref(model))
        return tokenizer, model

    def freed(*, collect):
        gc.collect()
        assert collect and [each() for each in models] == [None]
        models.append("asked")

    monkeypatch.setattr(chats, "MOST_TOKENS", 5)
    monkeypatch.setattr(chats, "loaded_chat", watched)
    monkeypatch.setattr(enhancing, "give_memory_back", freed)
    [found] = enhanced(task_of(compose, f"task.enhancer={tiny_chat}"), [Wanted("a")], None, CPU)
    assert models[-1] == "asked" and found.asked == "a" and found.prompt
