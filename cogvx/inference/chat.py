"""A language model that answers: one on this machine, or one behind a server of OpenAI's form.

Both are a function from conversations to answers. The same messages get the same answer: nothing
is drawn at random. Messages are those of transformers' chat templates. A picture in them is
{"type": "image", "image": PIL image}.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cogvx.errors import UserError, first_line
from cogvx.files import is_hub_id
from cogvx.hub_client import OnTheHub, split_revision
from cogvx.progress import heartbeat

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class Answer(NamedTuple):
    text: str
    complete: bool = True  # False: it was cut off


# [{"role": "user", "content": ...}]
Messages = list[dict[str, object]]
# Several conversations are answered at once.
Chat = Callable[[list[Messages]], list[Answer]]

KEY = "OPENAI_API_KEY"  # a server's key is read from the environment only
MOST_TOKENS = 1024  # of an answer
# Ollama's endpoint for OpenAI's API takes no length of the context, and says nothing when it cuts.
CONTEXT_OF_OLLAMA = (
    "Ollama cuts off what does not fit into its context, 4096 tokens by default, which eight "
    "pictures fill: OLLAMA_CONTEXT_LENGTH=16384 ollama serve"
)
# A model's own code is never run. Files of pickles (.bin) could run some too, and are not read.
NO_CODE = {"trust_remote_code": False}
NO_PICKLES = {"use_safetensors": True}
MOST_BYTES = 10_000_000  # of a server's answer
FILES_OF_A_MODEL = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
TIMEOUT = 600  # seconds that a server may take for an answer
# A text within one pair of quote marks.
QUOTED = re.compile('["\u201c]([^"\u201c\u201d]*)["\u201d]')
# Some models write down their thoughts before the answer.
THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


def opened_chat(
    path: str, url: str | None, device: torch.device, setting: str, storage: object = None
) -> Chat:
    """A model on this machine if url is None, else the one of this name on that server.

    path: a hub id or a folder, or the model's name on the server. setting: where the user gave it,
    for messages, such as task.enhancer. storage: the weights' quantization_config in transformers.
    A model is in memory as long as its Chat. UserError if there is no such model; the Chat raises
    it if there is no such server.
    """
    if url is not None:
        return functools.partial(asked_of_server, path, url, setting)
    return functools.partial(generated, *loaded_chat(path, device, setting, storage))


def loaded_chat(path: str, device: torch.device, setting: str, storage: object = None):
    """The tokenizer and the model. UserError if it is no chat model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = "a chat model of transformers"
    tokenizer, model = loaded(
        (AutoTokenizer, AutoModelForCausalLM), kind, path, device, setting, storage
    )
    require_template(tokenizer, path, setting)
    return tokenizer, model


def loaded(
    auto_classes: tuple, kind: str, path: str, device: torch.device, setting: str, storage: object
) -> tuple:
    """The reader (a tokenizer or a processor) and the model. kind: for the message.

    UserError if they cannot be loaded.
    """
    folder, (reader, model) = fetched_model(path, setting), auto_classes
    try:
        with heartbeat(f"load    still reading {path}"):
            found = reader.from_pretrained(folder, **NO_CODE)
            return found, on_this_device(model, folder, device, storage)
    # Missing and damaged files raise errors of many kinds.
    except Exception as error:
        raise UserError(
            f"{setting}={path} cannot be loaded as {kind}, from a folder or the hub: "
            f"{why_not_loaded(error)}. A model behind a server: {setting}_url=..."
        ) from error


def why_not_loaded(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it brings code of its own, which is not run here. vLLM and Ollama serve such models, "
            "MiniCPM-V 2.6 among them"
        )
    if "torchvision" in str(error).lower():
        return "it needs the package torchvision, which is not installed: pip install torchvision"
    return first_line(error).rstrip(".")


def require_template(reader: object, path: str, setting: str) -> None:
    """UserError if the tokenizer or processor has no chat template."""
    if getattr(reader, "chat_template", None) is None:
        raise UserError(
            f"{setting}={path} is no chat model: it has no chat template. Take one that was "
            f"trained to follow instructions"
        )


def fetched_model(path: str, setting: str) -> Path:
    """The model's folder on this machine. path: a folder, or name/repo or name/repo@revision."""
    if not is_hub_id(path):
        return Path(path)
    repo, revision = split_revision(path)
    instead = f"{setting}=/models/{repo.rpartition('/')[2]}"
    return OnTheHub(repo, revision, setting, instead).download(FILES_OF_A_MODEL)


def on_this_device(auto_class, folder: Path, device: torch.device, storage: object):
    """In the precision of the file. Quantized weights are put on the device as they are read."""
    safe = NO_CODE | NO_PICKLES
    if storage is None:
        return auto_class.from_pretrained(folder, dtype="auto", **safe).to(device).eval()
    return auto_class.from_pretrained(
        folder, dtype="auto", quantization_config=storage, device_map={"": device}, **safe
    ).eval()


def generated(reader, model, conversations: list[Messages]) -> list[Answer]:
    """The model's answers: of all next tokens always the most likely one.

    reader: the tokenizer; of a model that sees pictures, the processor.
    """
    import torch

    tokenizer = getattr(reader, "tokenizer", reader)
    # New tokens follow the last one of each row.
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings = {"padding": len(conversations) > 1}
    settings = settings if reader is tokenizer else {"processor_kwargs": settings}
    # Qwen3's template has the model think first, unless it is told not to.
    if "enable_thinking" in str(reader.chat_template):
        settings["enable_thinking"] = False
    given = reader.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **settings,
    ).to(model.device)
    with torch.no_grad():
        # Without these three a model's own settings for drawing at random are warned of.
        tokens = model.generate(
            **in_dtype_of(model, given),
            max_new_tokens=MOST_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    new = tokens[:, given["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends])}
    return [
        Answer(without_thoughts(text), not ends.isdisjoint(row.tolist()))
        for text, row in zip(texts, new, strict=True)
    ]


def in_dtype_of(model, given: dict) -> dict:
    """Pictures in the model's precision; processors make fp32 of them."""
    import torch

    return {
        name: value.to(model.dtype)
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for name, value in given.items()
    }


def asked_of_server(
    name: str, url: str, setting: str, conversations: list[Messages]
) -> list[Answer]:
    """The server's answers; it is asked for all at once. UserError as in answer_of_server()."""
    ask = functools.partial(answer_of_server, name, url, setting)
    with ThreadPoolExecutor(max_workers=max(1, len(conversations))) as threads:
        return list(threads.map(ask, conversations))


def answer_of_server(name: str, url: str, setting: str, messages: Messages) -> Answer:
    """UserError if the server cannot be reached, or refuses."""
    base = url.rstrip("/")
    place = f"{base if base.endswith('/v1') else f'{base}/v1'}/chat/completions"
    asked = {
        "model": name,
        "messages": [as_openai(message) for message in messages],
        "temperature": 0,
        "seed": 0,
        "max_tokens": MOST_TOKENS,
    }
    key = os.environ.get(KEY)
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(place, json.dumps(asked).encode(), headers)
    if key:
        # Not for another server, to which this one may send on.
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            said = json.loads(answer.read(MOST_BYTES))["choices"][0]
        text = without_thoughts(said["message"]["content"] or "")
        return Answer(text, said.get("finish_reason") != "length")
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


def as_openai(message: dict[str, object]) -> dict[str, object]:
    """The message with its pictures as OpenAI's API takes them: within the text, as JPEG."""
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg(part['image'])}"}}
        if part["type"] == "image"
        else part
        for part in content
    ]
    return {**message, "content": parts}


def jpeg(picture: Image) -> str:
    """In base64."""
    written = io.BytesIO()
    picture.save(written, format="JPEG", quality=90)
    return base64.b64encode(written.getvalue()).decode()


def not_openai(setting: str, place: str) -> str:
    return f"{setting}_url: {place} does not answer in the form of OpenAI's chat completions"


def reason_in(error: urllib.error.HTTPError) -> str:
    """What the server says, in one line."""
    text = error.read(MOST_BYTES).decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found)
        return first_line(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        return first_line(text or error.reason)


def in_one_line(answer: str) -> str:
    """Without line breaks, and without a pair of quote marks around it."""
    text = " ".join(answer.split())
    marked = QUOTED.fullmatch(text)
    return marked[1].strip() if marked else text


def without_thoughts(text: str) -> str:
    return THOUGHTS.sub("", text).strip()
