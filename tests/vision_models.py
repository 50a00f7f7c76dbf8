"""Tiny random vision-language models of real classes, with tokenizers made here."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

WORDS = ["a", "cat", "dog", "runs", "on", "the", "beach", "describe", "clip", "answer", "<user>"]
TEMPLATE = (
    "{%% for each in messages %%}<user> {%% for part in each['content'] %%}"
    "{%% if part['type'] == 'image' %%} %s {%% else %%} {{ part['text'] }} {%% endif %%}"
    "{%% endfor %%}{%% endfor %%}{%% if add_generation_prompt %%} answer{%% endif %%}"
)


def tokenizer_with(*marks):
    """A few words, and marks that are tokens of their own."""
    every = ["<unk>", "</s>", *marks, *WORDS]
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(every)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=list(marks),
    )


def text_settings(tokenizer):
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }


def write_idefics3(folder):
    """As SmolVLM, which adds a reader of videos that needs torchvision."""
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    marks += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = tokenizer_with(*marks)
    size = {"longest_edge": 28}
    Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size=size, max_image_size=size, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=1,
        chat_template=TEMPLATE % "<image>",
    ).save_pretrained(folder)
    config = Idefics3Config(
        text_config={"model_type": "llama", **text_settings(tokenizer)},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return saved(Idefics3ForConditionalGeneration, config, folder)


def write_llava(folder):
    """Pictures of one size."""
    tokenizer = tokenizer_with("<image>")
    LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        image_token="<image>",
        chat_template=TEMPLATE % "<image>",
    ).save_pretrained(folder)
    config = LlavaConfig(
        text_config={"model_type": "llama", **text_settings(tokenizer)},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return saved(LlavaForConditionalGeneration, config, folder)


def saved(model_class, config, folder):
    torch.manual_seed(3)
    model = model_class(config)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    # As many models ship: their own settings draw at random.
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.7
    model.save_pretrained(folder)
    return folder


FAMILIES = {"idefics3": write_idefics3, "llava": write_llava}
