"""Before the first step: base model and data. Everything is encoded here.

S text tokens, D their width, C channels, F H W latent frames, height and width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open

from cogvx.config import Config
from cogvx.data.buckets import size_for
from cogvx.data.cache import Cache, content_key
from cogvx.data.cuts import Cut, divided, look_at_files
from cogvx.data.encode import (
    EncodedClip,
    EncodedCut,
    Encoder,
    Rejected,
    cache_of,
    encode_clips,
    encode_images,
    frames_of,
    image_of,
)
from cogvx.data.inspect import (
    Inspected,
    Texts,
    inspected,
    write_dataset,
    write_report,
)
from cogvx.data.left_behind import tidy_cache
from cogvx.data.phrasing import require_readable
from cogvx.data.prompts import encode_prompts
from cogvx.data.sources import Data, Example
from cogvx.data.split import USED, Earlier, Split, earlier_split, split_clips, split_of
from cogvx.data.video import BadClip, to_bytes
from cogvx.errors import UserError, first_line
from cogvx.files import shown
from cogvx.libraries import collections_paused
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.sizes import with_sizes
from cogvx.options.memory import Memory
from cogvx.progress import counted, heartbeat
from cogvx.records import record
from cogvx.training.judging import what_is_judged
from cogvx.training.peaks import give_memory_back
from cogvx.training.ranks import Ranks
from cogvx.training.shards import say_what_is_left
from cogvx.training.step import Batch, on_device
from cogvx.training.told import (
    describe,
    describe_buckets,
    report,
    require_equal_lengths,
    say_flags,
    warn_of_lengths,
)
from cogvx.training.videos import RealClip, validation_images, validation_prompts

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
    # Blank prompts and missing images are reported before anything is encoded.
    prompts = validation_prompts(config.validation)
    images = validation_images(config.validation, 1 if prompts is None else len(prompts))
    cache = cache_of(config.data)
    if ranks.logs and (left := tidy_cache(cache.folder)):
        ranks.say(f"cache   removed {counted(left, 'file')} that killed processes had left")
    found = prepare_clips(config, cache, earlier_split(went_before, cache), ranks)
    tell_of_clips(config, folder, cache, found, ranks, trains=trains)
    own = found.shown_clips(images) if prompts is None else {}
    prompts = list(own) if prompts is None else prompts
    example_prompt = [*prompts, found.example.example.prompt][0]
    pictures = {}
    if found.pretrained.geometry().image_to_video:
        own = {example_prompt: found.example} | own
        pictures = first_frames(own, prompts, images, found.example, found.data)
    # The empty prompt is for caption dropout.
    needed = ["", config.validation.negative_prompt, *found.captions(), *prompts, *more_prompts]
    text_tokens = found.pretrained.geometry().text_tokens
    with ranks.peaks.phase("encode prompts"):
        embeds = encode_prompts(needed, cache, found.text_encoder, text_tokens, ranks.say)
        # Nothing refers to the text encoder's weights any more.
        give_memory_back(collect=True)
    if ranks.logs:
        tell_of_captions(config, folder, cache, found, embeds, ranks)
    for line in cache.said_of_refusal():
        ranks.say(line)
    say_what_is_left(found.files, found.data, cache, found.vae, ranks)
    # 100,000 clips have 100 MB there.
    cache.index.forget()
    return Prepared(
        found.pretrained, found.train, found.held_out, embeds, prompts, example_prompt, pictures
    )


@dataclass
class SplitClips:
    """The clips, encoded, and what each is used for."""

    pretrained: PretrainedModel
    vae: Encoder
    text_encoder: Encoder
    data: Data  # with the sizes of its buckets
    files: list[Example]  # as they are listed
    clips: list[EncodedClip]
    rejected: list[Rejected]
    split: Split

    def __post_init__(self) -> None:
        self.train, self.held_out = (
            [self.clips[place] for place in self.split.places(use)] for use in USED
        )

    @property
    def example(self) -> EncodedClip:
        """The clip that stands for all."""
        return (self.held_out or self.train)[0]

    def shown_clips(self, images: list[Path] | None) -> dict[str, EncodedClip]:
        """The clips, by caption, that give the validation videos their prompts, if none is set.

        One given image makes one video. Without it, each clip gives its own first frame.
        """
        found = {}
        for clip in (self.held_out or self.train)[: 1 if images else self.data.shown_clips()]:
            found.setdefault(clip.example.prompt, clip)
        return found

    def captions(self) -> list[str]:
        own = [clip.example.prompt for clip in self.clips]
        return own + [each for clip in self.train for pair in clip.example.pairs for each in pair]


# -- step 1: read and encode ---------------------------------------------------------------------


def prepare_clips(config: Config, cache: Cache, earlier: Earlier, ranks: Ranks) -> SplitClips:
    """Reads the list, encodes the clips and decides what each is used for."""
    pretrained, files = fetch(config, cache, earlier, ranks)
    data = with_sizes(config.data, pretrained.geometry())
    examples = divided(data.own_part(files), data, cache, ranks.say)
    vae, text_encoder = encoders(pretrained, cache, config.memory)
    with ranks.peaks.phase("encode clips"):
        clips, rejected = encode(examples, data, cache, vae, pretrained, ranks)
        # Nothing refers to the VAE's weights any more. The text encoder gets their memory.
        give_memory_back()
    split = split_of(clips, data, cache, earlier)
    return SplitClips(pretrained, vae, text_encoder, data, files, clips, rejected, split)


def fetch(
    config: Config, cache: Cache, earlier: Earlier, ranks: Ranks
) -> tuple[PretrainedModel, list[Example]]:
    """The base model on this machine, and the list of clips."""
    # What the first process downloads or renders is there for the others.
    with ranks.accelerator.main_process_first():
        # The cache may have all that is needed of a clip that has vanished.
        with config.data.knowing(cache.has_known), collections_paused():
            examples = config.data.read()
        for line in config.data.said:
            ranks.say(line)
        own = config.data.own_part(examples)
        look_at_files(own, config.data, cache)
        whole = config.data.shard is None and not config.data.divides_files
        if config.data.max_train_clips is not None and whole:
            # Raises an error if there are too few clips, before they are encoded.
            videos = [example.video for example in own if cache.knows(example.video)]
            digests = [cache.fingerprint(video) for video in videos]
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


def tell_of_clips(
    config: Config, folder: Path, cache: Cache, found: SplitClips, ranks: Ranks, *, trains: bool
) -> None:
    """In the terminal and in the run's folder. UserError if the clips do not make batches."""
    data, clips, pretrained = found.data, found.clips, found.pretrained
    for line in found.split.said:
        ranks.say(line)
    if ranks.logs:
        if trains:
            found.split.write(folder)
        # What is known of captions comes when they have been read.
        texts = Texts.estimated_of(clips, pretrained.geometry().text_tokens)
        report(folder, inspected_clips(config, found, texts), found.split)
        note_fingerprints(folder, config, pretrained, clips, cache, ranks)
        if data.shard is None:
            record.note(folder, judged=what_is_judged(found.held_out, config, cache))
    describe(folder, found.train, found.held_out, data, ranks)
    if data.buckets is None:
        require_equal_lengths(found.train, config.train)
    # A part of the clips says nothing of the steps of a run.
    elif data.shard is None:
        describe_buckets(config, found.train, found.held_out, pretrained, ranks)
    warn_of_lengths(clips, pretrained, ranks)


def tell_of_captions(
    config: Config,
    folder: Path,
    cache: Cache,
    found: SplitClips,
    embeds: dict[str, Path],
    ranks: Ranks,
) -> None:
    """The report and the page of the clips, with what the text encoder sees of their captions."""
    prompts = [clip.example.prompt for clip in found.clips]
    about = {prompt: cache.about(embeds[prompt]) for prompt in prompts}
    texts = Texts(about, found.pretrained.geometry().text_tokens, estimated=False)
    seen = inspected_clips(config, found, texts)
    write_report(folder, seen)
    write_dataset(folder, seen)
    say_flags(folder, seen, ranks)
    files = [*files_in_cache(found.clips), *embeds.values()]
    record.note(folder, cache_list=cache.keep_list(files))


def inspected_clips(config: Config, found: SplitClips, texts: Texts) -> Inspected:
    return inspected(found.clips, found.split, found.rejected, found.data, texts, config.model.fps)


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
    found = {prompt: own_first_frame(clip, data) for prompt, clip in own.items()}
    for prompt, path in zip(prompts, images or [None] * len(prompts), strict=True):
        if path is None:
            found[prompt] = own_first_frame(own.get(prompt, first), data)
        else:
            found[prompt] = first_frame(replace(first.example, image=path), first.first.cut, data)
    return found


def own_first_frame(clip: EncodedClip, data: Data) -> numpy.ndarray:
    """first_frame() of a clip; of one that has vanished, from its preview."""
    if clip.has_vanished():
        return to_bytes(clip.remembered_frames(size_for(data))[:1])[0]
    return first_frame(clip.example, clip.first.cut, data)


def first_frame(example: Example, cut: Cut, data: Data) -> numpy.ndarray:
    """The image that a clip starts from, [H, W, 3] uint8, at the size of a validation video.

    UserError if the file has none.
    """
    cut = replace(cut, size=size_for(data))
    try:
        return to_bytes(image_of(example, cut, data))[0]
    except BadClip as bad:
        image = example.image is not None
        whose = f"the prompt {example.prompt!r}" if image else f"the clip {example.video}"
        raise UserError(f"{whose} {bad}") from bad


def read_tensor(path: Path, name: str, row: int | None = None) -> torch.Tensor:
    """A tensor of a file of the cache, or one row of it. UserError if the file is gone."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name) if row is None else file.get_slice(name)[row]
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the cache's {path} cannot be read ({first_line(error)}): it was removed or damaged "
            f"while the run used it. Checkpoints are kept. Go on with: python launch.py "
            f"train.resume=RUN (the run's folder). What is missing is encoded again"
        ) from error
