"""task=inspect: what the model will see, before it is there. Nothing is loaded or downloaded."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.config import Config
from cogvx.data.buckets import AUTO
from cogvx.data.cuts import divided, look_at_files
from cogvx.data.encode import NO_VAE, EncodedClip, cache_of, encode_clips
from cogvx.data.inspect import (
    Inspected,
    Texts,
    inspected,
    write_contact_sheet,
    write_dataset,
    write_held_out,
    write_report,
)
from cogvx.data.prompts import facts_of_prompt
from cogvx.data.sources import Data
from cogvx.data.split import USED, Split, split_of
from cogvx.errors import UserError
from cogvx.files import shown
from cogvx.model.sizes import with_sizes
from cogvx.progress import counted, quiet_libraries
from cogvx.records.dataset import write_dataset_page
from cogvx.records.present import telling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of all checkpoints but 1.5, whose transformer sees 224.
USUAL_TOKENS = 226


def inspect_clips(config: Config, folder: Path) -> dict:
    """Returns the run's summary. UserError if no clip can be used."""
    quiet_libraries()
    started = time.monotonic()
    with telling(folder, lambda: ([], {})):
        found, split = look_at_clips(config)
        write_report(folder, found)
        write_contact_sheet(folder, found.clips, split.uses)
        write_held_out(folder, found.clips, split.uses)
        write_dataset(folder, found)
    page = write_dataset_page(folder)
    for line in [*split.said, *lines_of_flags(found), *lines_of_buckets(config, found, split)]:
        print(line)
    print(f"page    {shown(page)}", flush=True)
    return {
        "status": "done",
        "clips": len(found.clips),
        "flags": found.counts(),
        "seconds": round(time.monotonic() - started, 1),
    }


def look_at_clips(config: Config) -> tuple[Inspected, Split]:
    # All that is wrong is shown on the page.
    data = copy.copy(sized(config))
    data.max_bad_fraction = 1.0
    cache = cache_of(data)
    listed = data.own_part(data.read())
    for line in data.said:
        print(line)
    look_at_files(listed, data, cache)
    examples = divided(listed, data, cache, print)
    clips, rejected = encode_clips(examples, data, cache, NO_VAE, say_look)
    split = split_of(clips, data, cache)
    found = inspected(clips, split, rejected, data, texts_of(clips, config), config.model.fps)
    return found, split


def sized(config: Config) -> Data:
    """data.buckets=auto becomes the model's sizes. UserError if these are not known."""
    geometry = config.model.expected_geometry()
    if geometry is not None:
        return with_sizes(config.data, geometry)
    if config.data.buckets == AUTO:
        raise UserError(
            f"data.buckets=auto: the sizes of {config.model.path} are not known before it is on "
            f"this machine. Give a list, such as data.buckets=[49x480x720,25x720x480]"
        )
    return config.data


def lines_of_buckets(config: Config, found: Inspected, split: Split) -> list[str]:
    """As training says them."""
    if config.data.buckets is None:
        return []
    from cogvx.training import bucket_table  # torch

    train, held_out = ([found.clips[n] for n in split.places(use)] for use in USED)
    return bucket_table.lines_about_buckets(config, train, held_out, config.parallel.num_processes)


def say_look(line: str) -> None:
    # The words of task=encode, which does the same and encodes.
    print(line.replace("encode  ", "look    ", 1), flush=True)


def texts_of(clips: list[EncodedClip], config: Config) -> Texts:
    geometry = config.model.expected_geometry()
    most = USUAL_TOKENS if geometry is None else geometry.text_tokens
    tokenizer = tokenizer_at_hand(config)
    if tokenizer is None:
        return Texts.estimated_of(clips, most)
    prompts = dict.fromkeys(clip.example.prompt for clip in clips)
    about = {prompt: facts_of_prompt(tokenizer, prompt, most) for prompt in prompts}
    return Texts(about, most, estimated=False)


def tokenizer_at_hand(config: Config) -> PreTrainedTokenizerBase | None:
    """The model's, if its folder is on this machine; nothing is downloaded."""
    model = config.model
    if model.is_built_in:
        folder = model.local_folder()
    elif model.is_local():
        folder = Path(model.path)
    else:
        folder = cached_folder(model.path, model.revision)
    if folder is None or not (folder / "tokenizer").is_dir():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        folder / "tokenizer", local_files_only=True, trust_remote_code=False
    )


def cached_folder(repo: str, revision: str | None) -> Path | None:
    """Of a model that was downloaded earlier."""
    from huggingface_hub import try_to_load_from_cache

    file = "tokenizer/tokenizer_config.json"
    found = try_to_load_from_cache(repo, file, revision=revision)
    return Path(found).parent.parent if isinstance(found, str) else None


def lines_of_flags(found: Inspected) -> list[str]:
    """How many clips, and how many flags of each kind."""
    uses = [row["use"].partition(":")[0] for row in found.rows]
    by_use = ", ".join(f"{uses.count(use)} {use}" for use in dict.fromkeys(uses))
    flagged = sum(bool(row["flags"]) for row in found.rows)
    lines = [f"clips   {counted(len(found.rows), 'clip')}: {by_use}; {flagged} with flags"]
    counts = found.counts()
    width = max(map(len, counts), default=0)
    return [*lines, *(f"        {kind:{width}}  {count}" for kind, count in counts.items())]
