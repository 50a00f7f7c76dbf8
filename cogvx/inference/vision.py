"""A model that sees pictures and answers, on this machine, through transformers.

Any model that transformers loads by itself as image-text-to-text, with a chat template: Qwen2-VL to
Qwen3-VL, SmolVLM, LLaVA-OneVision, InternVL3, Gemma 3, MiniCPM-V 4.6 and others.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from cogvx.errors import UserError
from cogvx.inference.chat import Chat, asked_of_server, generated, loaded, require_template
from cogvx.options.tasks import ModelStorage

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

    kind = "a model of transformers that sees pictures"
    processor, model = loaded(
        (AutoProcessor, AutoModelForImageTextToText), kind, path, device, setting, storage
    )
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{setting}={path} sees no pictures: take a vision-language model")
    require_template(processor, path, setting)
    return processor, model


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
