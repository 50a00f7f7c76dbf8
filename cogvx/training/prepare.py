"""Before the first step: processes, base model and data. Everything is encoded here.

S text tokens, D their width, C channels, F H W latent frames, height and width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from safetensors import safe_open

from cogvx.config import Config
from cogvx.data.cache import Cache, content_key
from cogvx.data.cuts import Cut, divided
from cogvx.data.encode import (
    EncodedClip,
    EncodedCut,
    Encoder,
    Rejected,
    cache_of,
    encode_clips,
    encode_images,
    encode_prompts,
    frames_of,
    image_of,
)
from cogvx.data.index import collections_paused
from cogvx.data.inspect import (
    Inspected,
    Texts,
    inspected,
    write_contact_sheet,
    write_dataset,
    write_held_out,
    write_report,
)
from cogvx.data.looks import pairs_alike
from cogvx.data.phrasing import require_readable
from cogvx.data.sources import Data, Example
from cogvx.data.split import USED, Earlier, Split, earlier_split, split_clips
from cogvx.data.video import BadClip, to_bytes
from cogvx.errors import UserError
from cogvx.files import shown
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.sizes import with_sizes
from cogvx.options.memory import Memory
from cogvx.options.train import FP16_WITHOUT_GPU, Precision, Train
from cogvx.progress import counted, heartbeat
from cogvx.records import record
from cogvx.records.dataset import write_dataset_page
from cogvx.training import bucket_table
from cogvx.training.judging import what_is_judged
from cogvx.training.peaks import give_memory_back
from cogvx.training.ranks import LONGEST_WAIT, Ranks, host_group
from cogvx.training.shards import say_what_is_left
from cogvx.training.step import Batch, on_device
from cogvx.training.videos import RealClip, validation_images, validation_prompts

# -- processes -----------------------------------------------------------------------------------


def start_processes(config: Config) -> Ranks:
    """Accelerate on the devices present. UserError if they cannot do what is asked for."""
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    precision, processes = config.train.mixed_precision, config.parallel.num_processes
    require_precision(precision, gpu=gpu)
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise UserError(
            f"parallel.num_processes={processes}: torch sees "
            f"{counted(torch.cuda.device_count(), 'GPU')}, and each process needs its own"
        )
    # Buffers never change. Sending them would wait for processes that have no held-out clip.
    settings = [
        DistributedDataParallelKwargs(broadcast_buffers=False),
        InitProcessGroupKwargs(timeout=LONGEST_WAIT),
    ]
    accelerator = Accelerator(mixed_precision=precision.name, cpu=not gpu, kwargs_handlers=settings)
    # Accelerate falls back to one process silently, in several ways.
    if accelerator.num_processes != processes:
        raise UserError(
            f"parallel.num_processes={processes}, but accelerate runs "
            f"{accelerator.num_processes}: start it with python launch.py, "
            f"without torchrun or accelerate launch"
        )
    return Ranks(accelerator, host_group())


def require_precision(precision: Precision, *, gpu: bool) -> None:
    if precision is Precision.fp16 and not gpu:
        raise UserError(FP16_WITHOUT_GPU)
    cuda = torch.cuda.is_available()
    if precision is Precision.bf16 and cuda:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return
        raise UserError(
            f"train.mixed_precision=bf16: {torch.cuda.get_device_name()} does not have it; "
            f"2B trains in fp16, 5B needs a newer GPU"
        )


# -- data ----------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """The data, encoded. Neither of the two encoders is in memory any more."""

    pretrained: PretrainedModel
    train: list[EncodedClip]
    held_out: list[EncodedClip]
    prompts: dict[str, Path]  # the cached embedding of every caption, validation prompt and ""
    validation_prompts: list[str]
    example_prompt: str  # to show how the result is used
    images: dict[str, numpy.ndarray]  # image-to-video: first frame [H, W, 3] uint8 by prompt

    def embeds(self, prompt: str) -> torch.Tensor:
        """[S, D]."""
        return read_tensor(self.prompts[prompt], "prompt_embeds")

    def load_batch(self, clips: list[EncodedCut], prompts: list[str], images: list[int]) -> Batch:
        """A batch on the device. `images`: which encoding of its image each clip starts from.

        Encoding 0 is without noise.
        """
        device, image_moments = self.pretrained.device, None
        latents = [read_tensor(clip.path, "latent_moments") for clip in clips]
        if clips[0].image_path is not None:
            rows = [
                read_tensor(clip.image_path, "image_moments", row)
                for clip, row in zip(clips, images, strict=True)
            ]
            image_moments = on_device(torch.stack(rows), device)
        embeds = [self.embeds(prompt) for prompt in prompts]
        return Batch(
            latent_moments=on_device(torch.stack(latents), device),
            prompt_embeds=on_device(torch.stack(embeds), device),
            image_moments=image_moments,
        )

    def held_out_batch(self, index: int) -> Batch:
        clip = self.held_out[index]
        return self.load_batch([clip.first], [clip.example.prompt], [0])

    def real_clip(self, prompt: str, data: Data) -> RealClip:
        """The clip whose caption shares the most words with the prompt."""
        words = set(prompt.lower().split())
        titled = [("held-out clip", clip) for clip in self.held_out]
        titled += [("training clip", clip) for clip in self.train]
        title, clip = max(
            titled, key=lambda pair: len(words & set(pair[1].example.prompt.lower().split()))
        )
        return RealClip(title, to_bytes(frames_of(clip, data)))


def prepare(
    config: Config,
    folder: Path,
    ranks: Ranks,
    more_prompts: Iterable[str] = (),
    *,
    went_before: Iterable[Path] = (),
    trains: bool = False,
) -> Prepared:
    """Encodes clips and prompts, and reports on them in the run's folder.

    went_before: folders of runs. What these were trained on is not held out. trains: whether this
    run is one that later runs need to know of.
    """
    data = config.data
    # Blank prompts and missing images are reported before anything is encoded.
    prompts = validation_prompts(config.validation)
    images = validation_images(config.validation, 1 if prompts is None else len(prompts))

    cache = cache_of(data)
    earlier = earlier_split(went_before, cache)
    pretrained, files = fetch(config, cache, earlier, ranks)
    data = with_sizes(data, pretrained.geometry())
    examples = divided(data.own_part(files), data, cache, ranks.say)
    vae, text_encoder = encoders(pretrained, cache, config.memory)
    with ranks.peaks.phase("encode clips"):
        clips, rejected = encode(examples, data, cache, vae, pretrained, ranks)
        # Nothing refers to the VAE any more. The text encoder gets its memory.
        give_memory_back()
    split = split_of(clips, data, cache, earlier)
    train, held_out = ([clips[place] for place in split.places(use)] for use in USED)
    for line in split.said:
        ranks.say(line)
    if ranks.logs:
        if trains:
            split.write(folder)
        # What is known of captions comes when they have been read.
        texts = Texts.estimated_of(clips, pretrained.geometry().text_tokens)
        found = inspected(clips, split, rejected, data, texts, config.model.fps)
        report(folder, found, split)
        note_fingerprints(folder, config, pretrained, clips, cache, ranks)
        if data.shard is None:
            record.note(folder, judged=what_is_judged(held_out, config, cache))
    describe(folder, train, held_out, data, ranks)
    if data.buckets is None:
        require_equal_lengths(train, config.train)
    # A part of the clips says nothing of the steps of a run.
    elif data.shard is None:
        describe_buckets(config, train, held_out, pretrained, ranks)
    warn_of_lengths(clips, pretrained, ranks)

    first, own = (held_out or train)[0], {}
    if prompts is None:
        # One given image makes one video. Without it, each clip gives its own first frame.
        shown_clips = (held_out or train)[: 1 if images else data.shown_clips()]
        for clip in shown_clips:
            own.setdefault(clip.example.prompt, clip)
        prompts = list(own)
    example_prompt = [*prompts, first.example.prompt][0]
    pictures = {}
    if pretrained.geometry().image_to_video:
        own = {example_prompt: first} | own
        pictures = first_frames(own, prompts, images, first, data)

    captions = [clip.example.prompt for clip in clips]
    captions += [each for clip in train for pair in clip.example.pairs for each in pair]
    # The empty prompt is for caption dropout.
    needed = ["", config.validation.negative_prompt, *captions, *prompts, *more_prompts]
    text_tokens = pretrained.geometry().text_tokens
    with ranks.peaks.phase("encode prompts"):
        embeds = encode_prompts(needed, cache, text_encoder, text_tokens, ranks.say)
        # Nor to the text encoder.
        give_memory_back(collect=True)
    if ranks.logs:
        about = {clip.example.prompt: cache.about(embeds[clip.example.prompt]) for clip in clips}
        texts = Texts(about, text_tokens, estimated=False)
        found = inspected(clips, split, rejected, data, texts, config.model.fps)
        write_report(folder, found)
        write_dataset(folder, found)
        say_flags(folder, found, ranks)
        record.note(folder, cache_list=cache.keep_list([*files_in_cache(clips), *embeds.values()]))
    say_what_is_left(files, data, cache, vae, ranks)
    # 100,000 clips have 100 MB there.
    cache.index.forget()
    return Prepared(pretrained, train, held_out, embeds, prompts, example_prompt, pictures)


# -- step 1: read and encode ---------------------------------------------------------------------


def fetch(
    config: Config, cache: Cache, earlier: Earlier, ranks: Ranks
) -> tuple[PretrainedModel, list[Example]]:
    """The base model on this machine, and the list of clips."""
    # What the first process downloads or renders is there for the others.
    with ranks.accelerator.main_process_first():
        with collections_paused():
            examples = config.data.read()
        for line in config.data.said:
            ranks.say(line)
        own = [example.video for example in config.data.own_part(examples)]
        threshold = config.data.scene_threshold_used
        cache.look_at(own, facts=config.data.needs_facts, threshold=threshold)
        whole = config.data.shard is None and not config.data.divides_files
        if config.data.max_train_clips is not None and whole:
            # Raises an error if there are too few clips, before they are encoded.
            digests = [cache.fingerprint(video) for video in own if cache.knows(video)]
            split_clips(digests, config.data, earlier=earlier)
        pretrained = fetch_model(config, ranks)
    if words := config.data.id_tokens():
        require_readable(words, pretrained.tokenizer())
    return pretrained, examples


def fetch_model(config: Config, ranks: Ranks) -> PretrainedModel:
    model_folder = config.model.prepare(**config.asked_of_model())
    device = ranks.accelerator.device
    dtype = getattr(torch, config.train.mixed_precision.value)
    ranks.say(f"model   {shown(Path(config.model.path))}, {dtype} on {device}")
    return PretrainedModel(model_folder, device, dtype, cache=Cache(config.data.cache_dir))


def encoders(pretrained: PretrainedModel, cache: Cache, memory: Memory) -> tuple[Encoder, Encoder]:
    """The VAE and the text encoder. Each is loaded when there is something to encode."""
    parts = ("vae", "text_encoder", "tokenizer")
    with heartbeat("encode  still hashing the weights of the encoders"):
        vae, text, tokenizer = (cache.fingerprint(pretrained.folder / part) for part in parts)
    return (
        Encoder(
            lambda: pretrained.vae(tiling=memory.vae_tiling),
            f"{vae} tiling={memory.vae_tiling}",
            pretrained.dtype,
            pretrained.device,
        ),
        Encoder(
            lambda: pretrained.text_encoder(streamed=memory.stream_text_encoder),
            f"{text} {tokenizer}",
            pretrained.dtype,
            pretrained.device,
            streamed=memory.stream_text_encoder,
        ),
    )


def encode(
    examples: list[Example],
    data: Data,
    cache: Cache,
    vae: Encoder,
    pretrained: PretrainedModel,
    ranks: Ranks,
) -> tuple[list[EncodedClip], list[Rejected]]:
    clips, rejected = encode_clips(examples, data, cache, vae, ranks.say)
    if not pretrained.geometry().image_to_video:
        return clips, rejected
    clips, without_image = encode_images(clips, data, cache, vae, ranks.say)
    return clips, [*rejected, *without_image]


# -- step 2: split and report --------------------------------------------------------------------


def split_of(clips: list[EncodedClip], data: Data, cache: Cache, earlier: Earlier) -> Split:
    """What each clip is used for."""
    digests = [cache.fingerprint(clip.example.video) for clip in clips]
    alike = pairs_alike([clip.look() for clip in clips])
    if data.shard is not None:
        # max_train_clips counts the clips of all parts.
        data = replace(data, max_train_clips=None)
    sources = [clip.example.source for clip in clips]
    return split_clips(digests, data, alike=alike, earlier=earlier, sources=sources)


def report(folder: Path, found: Inspected, split: Split) -> None:
    write_report(folder, found)
    write_contact_sheet(folder, found.clips, split.uses)
    write_held_out(folder, found.clips, split.uses)


def note_fingerprints(
    folder: Path,
    config: Config,
    pretrained: PretrainedModel,
    clips: list[EncodedClip],
    cache: Cache,
    ranks: Ranks,
) -> None:
    """Records what the result depends on besides the settings; warns if a resumed run differs."""
    commit = pretrained.hub_commit()
    # A hub commit identifies the weights. Only a local folder of up to 20 GB must be read.
    with heartbeat("model   still hashing its weights"):
        fingerprint = cache.fingerprint(pretrained.folder) if commit is None else None
    record.note(
        folder,
        device=device_name(pretrained.device),
        processes=ranks.count,
        model_folder=str(pretrained.folder),
        model_commit=commit,
        data_fingerprint=content_key([fingerprint_of(clip.example, cache) for clip in clips]),
        model_fingerprint=fingerprint,
    )
    record.pin_revision(folder, commit)
    drift = record.drift(folder)
    if drift is not None:
        ranks.say(f"warning {drift}")


def fingerprint_of(example: Example, cache: Cache) -> list[str]:
    files = [example.video, *([] if example.image is None else [example.image])]
    captions = dict.fromkeys(each for pair in example.pairs for each in pair)
    return [*captions, *(cache.fingerprint(path) for path in files)]


def files_in_cache(clips: list[EncodedClip]) -> list[Path]:
    cuts = [cut for clip in clips for cut in clip.cuts]
    return [path for cut in cuts for path in (cut.path, cut.image_path) if path is not None]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"


def described_sources(
    train: list[EncodedClip], held_out: list[EncodedClip], data: Data
) -> Iterator[str]:
    """Of data=mix: how many clips each source has, and its share of the samples."""
    aside, shares = Counter(clip.example.source for clip in held_out), data.shares()
    for source, clips in Counter(clip.example.source for clip in train).items():
        if source:
            share = shares[source] / sum(shares.values()) if shares else clips / len(train)
            yield (
                f"source  {source}: {counted(clips, 'clip')} to train on, {share:.0%} of the "
                f"samples; {aside[source]} held out"
            )


def describe(
    folder: Path, train: list[EncodedClip], held_out: list[EncodedClip], data: Data, ranks: Ranks
) -> None:
    clips = [*train, *held_out]
    frames = sorted({clip.about["frames"] for clip in clips})
    lengths = f"{frames[0]}" if len(frames) == 1 else f"{frames[0]} to {frames[-1]}"
    shapes = {(clip.size.width, clip.size.height) for clip in clips}
    width, height = min(shapes)
    size = f"{width}x{height}" if len(shapes) == 1 else f"{len(shapes)} shapes"
    ranks.say(
        f"data    {counted(len(train), 'clip')} to train on, {len(held_out)} held out; "
        f"{lengths} frames of {size} at {data.fps or 'their own'} fps"
    )
    for line in described_sources(train, held_out, data):
        ranks.say(line)
    slow = [clip for clip in clips if clip.about["repeated"]]
    if slow:
        lowest = math.floor(min(clip.about["file_fps"] for clip in slow))
        ranks.say(
            f"warning {counted(len(slow), 'clip has', 'clips have')} a lower frame rate than "
            f"data.fps={data.fps}, so some frames are used twice (dataset_report.csv, column "
            f"repeated); data.fps={lowest} avoids this"
        )
    if not held_out and data.shard is None:
        ranks.say(
            "warning no clip is held out, so there is no held-out loss: "
            "add clips, or set data.validation_fraction"
        )
    sheet = shown(folder / "contact_sheet.png")
    ranks.say(f"clips   see {sheet} (pictures) and dataset_report.csv (table)")


def say_flags(folder: Path, found: Inspected, ranks: Ranks) -> None:
    page = write_dataset_page(folder)
    flagged = sum(bool(row["flags"]) for row in found.rows)
    those = ", ".join(f"{count} {kind}" for kind, count in found.counts().items())
    ranks.say(f"clips   {flagged} of {len(found.rows)} are flagged{': ' * bool(those)}{those}")
    ranks.say(f"        see {shown(page)}: they play there as the model sees them")


def require_equal_lengths(clips: list[EncodedClip], train: Train) -> None:
    """UserError if the clips of a batch cannot be stacked."""
    frames = sorted({clip.about["frames"] for clip in clips})
    size = train.train_batch_size
    if size == 1 or len(frames) == 1:
        return
    lengths = [
        f"{counted(sum(clip.about['frames'] == n for clip in clips), 'clip')} of {n} frames"
        for n in frames
    ]
    raise UserError(
        f"train.train_batch_size={size} needs clips of one length, "
        f"and there are {', '.join(lengths)}. "
        f"Either data.buckets=auto, or train.train_batch_size=1 "
        f"train.gradient_accumulation_steps={size}, or data.max_num_frames={frames[0]}, "
        f"or data.min_num_frames={frames[-1]} to leave the shorter ones out"
    )


def describe_buckets(
    config: Config,
    train: list[EncodedClip],
    held_out: list[EncodedClip],
    pretrained: PretrainedModel,
    ranks: Ranks,
) -> None:
    for line in bucket_table.lines_about_buckets(config, train, held_out, ranks.count):
        ranks.say(line)
    sizes = [clip.size for clip in (*train, *held_out)]
    caution = pretrained.geometry().caution_of_buckets(sizes)
    if caution is not None:
        ranks.say(f"warning {caution}")


def warn_of_lengths(clips: list[EncodedClip], pretrained: PretrainedModel, ranks: Ranks) -> None:
    for frames in sorted({clip.about["frames"] for clip in clips}):
        for caution in pretrained.geometry().cautions(frames):
            ranks.say(f"warning {caution}")


# -- step 3: first frames of validation videos, for image-to-video -------------------------------


def first_frames(
    own: dict[str, EncodedClip],
    prompts: list[str],
    images: list[Path] | None,
    first: EncodedClip,
    data: Data,
) -> dict[str, numpy.ndarray]:
    """By prompt, [H, W, 3] uint8. Without a given image: of the prompt's own clip, or of `first`.

    `own`: prompts that are captions of clips, with these clips.
    """
    found = {
        prompt: first_frame(clip.example, clip.first.cut, data) for prompt, clip in own.items()
    }
    for prompt, path in zip(prompts, images or [None] * len(prompts), strict=True):
        clip = own.get(prompt, first) if path is None else first
        example = clip.example if path is None else replace(clip.example, image=path)
        found[prompt] = first_frame(example, clip.first.cut, data)
    return found


def first_frame(example: Example, cut: Cut, data: Data) -> numpy.ndarray:
    """The image that a clip starts from, [H, W, 3] uint8. UserError if the file has none."""
    try:
        return to_bytes(image_of(example, cut, data))[0]
    except BadClip as bad:
        image = example.image is not None
        whose = f"the prompt {example.prompt!r}" if image else f"the clip {example.video}"
        raise UserError(f"{whose} {bad}") from bad


def read_tensor(path: Path, name: str, row: int | None = None) -> torch.Tensor:
    """A tensor of a safetensors file, or one row of it."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name) if row is None else file.get_slice(name)[row]
