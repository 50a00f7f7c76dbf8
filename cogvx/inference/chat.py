"""A language model that answers: one on this machine, or one behind a server of OpenAI's form.

Both are a function from messages to text. The same messages get the same answer: nothing is drawn
at random.
"""

from __future__ import annotations

import functools
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING

from cogvx.errors import UserError, first_line
from cogvx.progress import heartbeat

if TYPE_CHECKING:
    import torch

# As OpenAI's API and transformers' chat templates have them: [{"role": "user", "content": ...}].
Messages = list[dict[str, object]]
Chat = Callable[[Messages], str]

KEY = "OPENAI_API_KEY"  # a server's key is read from the environment only
MOST_TOKENS = 1024  # of an answer
TIMEOUT = 600  # seconds that a server may take for an answer
# Some models write down their thoughts before the answer.
THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


def opened_chat(path: str, url: str | None, device: torch.device, setting: str) -> Chat:
    """A model on this machine if url is None, else the one of this name on that server.

    path: a hub id or a folder, or the model's name on the server. setting: where the user gave it,
    for messages, such as task.enhancer. A model is in memory as long as its Chat. UserError if
    there is no such model; the Chat raises it if there is no such server.
    """
    if url is not None:
        return functools.partial(asked_of_server, path, url, setting)
    return functools.partial(generated, *loaded_chat(path, device, setting))


def loaded_chat(path: str, device: torch.device, setting: str):
    """The tokenizer and the model. UserError if it is no chat model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with heartbeat(f"load    still reading {path}"):
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(device).eval()
    # Missing and damaged files raise errors of many kinds.
    except Exception as error:
        raise UserError(
            f"{setting}={path} cannot be loaded as a chat model of transformers, from a folder or "
            f"the hub: {first_line(error).rstrip('.')}. A model behind a server: {setting}_url=..."
        ) from error
    if tokenizer.chat_template is None:
        raise UserError(
            f"{setting}={path} is no chat model: its tokenizer has no chat template. Take one that "
            f"was trained to follow instructions"
        )
    return tokenizer, model


def generated(tokenizer, model, messages: Messages) -> str:
    """The model's answer: of all next tokens always the most likely one."""
    import torch

    # Qwen3's template has the model think first, unless it is told not to. Others ignore it.
    given = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        enable_thinking=False,
    ).to(model.device)
    with torch.no_grad():
        # Without these three a model's own settings for drawing at random are warned of.
        tokens = model.generate(
            **given,
            max_new_tokens=MOST_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    new = tokens[0, given["input_ids"].shape[1] :]
    return without_thoughts(tokenizer.decode(new, skip_special_tokens=True))


def asked_of_server(name: str, url: str, setting: str, messages: Messages) -> str:
    """The server's answer. UserError if it cannot be reached, or refuses."""
    base = url.rstrip("/")
    place = f"{base if base.endswith('/v1') else f'{base}/v1'}/chat/completions"
    asked = {
        "model": name,
        "messages": messages,
        "temperature": 0,
        "seed": 0,
        "max_tokens": MOST_TOKENS,
    }
    key = os.environ.get(KEY)
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(place, json.dumps(asked).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            said = json.loads(answer.read())
        return without_thoughts(said["choices"][0]["message"]["content"] or "")
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{setting}_url={url} refuses {setting}={name} ({error.code}): {reason_in(error)}"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, json.JSONDecodeError):
            raise UserError(not_openai(setting, place)) from error
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{setting}_url={url} does not answer ({reason}). Is the server running there? For "
            f"example: vllm serve {name}, or ollama serve"
        ) from error
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(not_openai(setting, place)) from error


def not_openai(setting: str, place: str) -> str:
    return f"{setting}_url: {place} does not answer in the form of OpenAI's chat completions"


def reason_in(error: urllib.error.HTTPError) -> str:
    """What the server says, in one line."""
    text = error.read().decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found)
        return first_line(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        return first_line(text or error.reason)


def in_one_line(answer: str) -> str:
    """Without line breaks, and without quote marks around it."""
    return " ".join(answer.split()).strip(' "')


def without_thoughts(text: str) -> str:
    return THOUGHTS.sub("", text).strip()
