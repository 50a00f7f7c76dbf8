"""Encodes prompts to embeddings, once: the results stay in the cache.

B prompts, S text tokens, D the size of a token's embedding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.data.cache import Cache, content_key
from cogvx.data.encode import VERSION, Encoder
from cogvx.data.listed import shortened
from cogvx.data.sharing import Share, make_missing
from cogvx.progress import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

# So many prompts go through a streamed text encoder together, if their hidden states fit. 36 of 226
# tokens in bf16 do: a pass of T5-XXL then computes for longer than its 8.6 GiB take on the bus.
HIDDEN_BYTES, MOST_PROMPTS = 64 * 2**20, 36
# Of prompts that are warned of: how many are named, and how many of their characters.
MOST_NAMED, SHOWN_OF_PROMPT = 3, 60


def encode_prompts(
    prompts: Iterable[str], cache: Cache, text: Encoder, max_length: int, say: Callable[[str], None]
) -> dict[str, Path]:
    """The cache's file for each prompt, with prompt_embeds [S, D], S = max_length.

    Processes share the work. text.load() returns the tokenizer and the encoder. Warnings name
    prompts of more than max_length tokens, of which the model sees only the beginning, in training
    as in the pipeline, and prompts with words that the tokenizer does not know.
    """
    paths = {
        prompt: cache.path(
            "prompts", content_key(VERSION, prompt, text.identity, str(text.dtype), max_length)
        )
        for prompt in dict.fromkeys(prompts)
    }
    prompt_of = {path: prompt for prompt, path in paths.items()}
    models = functools.cache(text.load)

    def encode(share: Share) -> None:
        tokenizer, model = models()
        group = share.take_group(prompts_at_once(model, text, max_length))
        found = prompt_embeds(tokenizer, model, map(prompt_of.get, group), text, max_length)
        for path, (embeds, about) in zip(group, found, strict=True):
            share.write(path, {"prompt_embeds": embeds}, about)

    make_missing(list(paths.values()), cache, encode, "prompt", say)
    about = {prompt: cache.about(path) for prompt, path in paths.items() if prompt}
    warn_of_long_prompts(about, max_length, say)
    warn_of_unknown_words(about, say)
    return paths


def warn_of_long_prompts(
    about: dict[str, dict], max_length: int, say: Callable[[str], None]
) -> None:
    """about: what facts_of_prompt() found of each prompt."""
    long = [prompt for prompt, facts in about.items() if facts["tokens"] > max_length]
    if not long:
        return
    say(
        f"warning {counted(len(long), 'prompt has', 'prompts have')} more tokens than the model "
        f"reads ({max_length}), of {len(about)}: it sees only the beginning"
    )
    long.sort(key=lambda prompt: -about[prompt]["tokens"])
    for prompt in long[:MOST_NAMED]:
        # The cache's files of earlier versions do not say it.
        cut = about[prompt].get("cut_off")
        unseen = "" if cut is None else f"; it does not see {shortened(cut, SHOWN_OF_PROMPT)!r}"
        tokens = about[prompt]["tokens"]
        say(f"        {tokens} tokens: {shortened(prompt, SHOWN_OF_PROMPT)!r}{unseen}")


def warn_of_unknown_words(about: dict[str, dict], say: Callable[[str], None]) -> None:
    """about: what facts_of_prompt() found of each prompt."""
    unknown = {prompt: words for prompt, facts in about.items() if (words := facts.get("unknown"))}
    if not unknown:
        return
    say(
        f"warning {len(unknown)} of {counted(len(about), 'prompt')} have words with letters that "
        f"the text encoder does not know. All of them look alike to it: write in English"
    )
    for prompt, words in [*unknown.items()][:MOST_NAMED]:
        named = ", ".join(shortened(word, 20) for word in words[:MOST_NAMED])
        more = " ..." if len(words) > MOST_NAMED else ""
        say(f"        {shortened(prompt, SHOWN_OF_PROMPT)!r}: {named}{more}")


def prompts_at_once(model: T5EncoderModel, text: Encoder, max_length: int) -> int:
    """How many prompts go through the encoder together.

    More than one saves time only where each pass copies the weights to the device.
    """
    if not text.streamed:
        return 1
    hidden_bytes = max_length * model.config.d_model * text.dtype.itemsize
    return max(1, min(MOST_PROMPTS, HIDDEN_BYTES // hidden_bytes))


def prompt_embeds(
    tokenizer: PreTrainedTokenizerBase,
    model: T5EncoderModel,
    prompts: Iterable[str],
    text: Encoder,
    max_length: int,
) -> list[tuple[Tensor, dict]]:
    """Each prompt's embedding [S, D], and what facts_of_prompt() finds.

    As the diffusers pipeline's encode_prompt() makes it for a single prompt: without an attention
    mask, and with the same bits, whichever prompts are encoded together.
    """

    prompts = list(prompts)
    about = [facts_of_prompt(tokenizer, prompt, max_length) for prompt in prompts]
    ids = tokenizer(
        prompts,
        padding="max_length",
        max_length=max_length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    ).input_ids
    embeds = hidden_states(model, ids.to(text.device))
    rows = [row.to(text.dtype).cpu().contiguous() for row in embeds]
    return list(zip(rows, about, strict=True))


def facts_of_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int) -> dict:
    """How many tokens it has, the end of it that the model does not see, and unknown words."""
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    # The last token that the model sees is always the one that ends a text.
    cut_off = tokenizer.decode(ids[max_length - 1 : -1]) if len(ids) > max_length else ""
    unknown = []
    if tokenizer.unk_token_id in ids:
        words = dict.fromkeys(prompt.split())
        unknown = [w for w in words if tokenizer.unk_token_id in tokenizer(w).input_ids]
    return {"tokens": len(ids), "cut_off": cut_off, "unknown": unknown}


def hidden_states(model: T5EncoderModel, ids: Tensor) -> Tensor:
    """[B, S] -> [B, S, D]. Each row has the bits that it has in a batch of one."""
    import torch

    stack = model.encoder
    with torch.no_grad(), row_by_row([*stack.block, stack.final_layer_norm]):
        return model(ids)[0]


@contextlib.contextmanager
def row_by_row(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within this context each module computes the rows of a batch one after the other.

    A larger batch may be rounded otherwise. What surrounds a module's forward(), such as the copy
    of its weights to the device, still happens once for all rows.
    """
    modules = list(modules)
    for module in modules:
        # In place of the method of its class, until it is deleted.
        module.forward = functools.partial(forward_rows, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def forward_rows(forward: Callable, hidden: Tensor, *others: object, **settings: object):
    """forward() for each row [1, S, D] of `hidden` [B, S, D], put together.

    A T5 block returns more than the hidden states: the position bias, which all rows share.
    """
    import torch

    def row_of(value: object, row: int) -> object:
        with_rows = isinstance(value, torch.Tensor) and len(value) == len(hidden)
        return value[row : row + 1] if with_rows else value

    results = [
        forward(
            row_of(hidden, row),
            *(row_of(value, row) for value in others),
            **{name: row_of(value, row) for name, value in settings.items()},
        )
        for row in range(len(hidden))
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.cat(results)
    return (torch.cat([result[0] for result in results]), *results[0][1:])
