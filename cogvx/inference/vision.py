"""A model that sees pictures and answers, on this machine, through transformers.

Any model that transformers loads by itself as image-text-to-text, with a chat template: Qwen2-VL to
Qwen3-VL, SmolVLM, LLaVA-OneVision, InternVL3, Gemma 3, MiniCPM-V 4.6 and others.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from cogvx.errors import UserError, first_line
from cogvx.inference.chat import Chat, asked_of_server, fetched_model, generated, on_this_device
from cogvx.options.tasks import ModelStorage
from cogvx.progress import heartbeat

if TYPE_CHECKING:
    import torch


def opened_vision(
    path: str, url: str | None, device: torch.device, setting: str, storage: object = None
) -> Chat:
    """As opened_chat(), for a model that sees pictures."""
    if url is not None:
        return functools.partial(asked_of_server, path, url, setting)
    return functools.partial(generated, *loaded_vision(path, device, setting, storage))


def loaded_vision(path: str, device: torch.device, setting: str, storage: object = None):
    """The processor and the model. UserError if it is no chat model that sees pictures."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = fetched_model(path, setting)
    try:
        with heartbeat(f"load    still reading {path}"):
            processor = AutoProcessor.from_pretrained(folder)
            model = on_this_device(AutoModelForImageTextToText, folder, device, storage)
    # Missing and damaged files raise errors of many kinds.
    except Exception as error:
        raise UserError(
            f"{setting}={path} cannot be loaded as a model of transformers that sees pictures, "
            f"from a folder or the hub: {why_not_loaded(error)}. A model behind a server: "
            f"{setting}_url=..."
        ) from error
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{setting}={path} sees no pictures: take a vision-language model")
    if getattr(processor, "chat_template", None) is None:
        raise UserError(
            f"{setting}={path} is no chat model: its processor has no chat template. Take one that "
            f"was trained to follow instructions"
        )
    return processor, model


def why_not_loaded(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it brings code of its own, which is not run here. vLLM and Ollama serve such models, "
            "MiniCPM-V 2.6 among them"
        )
    if "torchvision" in str(error).lower():
        return "it needs the package torchvision, which is not installed: pip install torchvision"
    return first_line(error).rstrip(".")


def quantization(storage: ModelStorage) -> object:
    """transformers' settings to load weights in fewer bits; None: as they are."""
    import torch
    from transformers import BitsAndBytesConfig

    if storage is ModelStorage.own:
        return None
    if storage is ModelStorage.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
