"""task=caption: a vision-language model writes a caption for each clip that has none.

A second model, the expander, may write the description out. The models are in memory one after the
other. Every caption is written at once, so the same command goes on after a stop.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy
import torch

from cogvx.config import Config
from cogvx.data.cache import content_key
from cogvx.data.caption_places import CaptionPlace, ClipToCaption, caption_place
from cogvx.data.listed import read_lines
from cogvx.data.phrasing import as_a_word
from cogvx.data.sources import Data
from cogvx.data.video import BadClip, read_clip, to_bytes
from cogvx.errors import UserError, first_line, listed
from cogvx.inference.answers import Asking, Fault
from cogvx.inference.chat import CONTEXT_OF_OLLAMA, Chat, Messages, opened_chat
from cogvx.inference.vision import opened_vision, quantization
from cogvx.options.tasks import CaptionTask, Overwrite
from cogvx.progress import bar, counted

# After so many clips, none of which has a caption, the model is of no use.
FRUITLESS = 8


def write_captions(config: Config, task: CaptionTask) -> None:
    """Writes a caption for each clip that has none, and for those that task.overwrite says.

    A clip that cannot be read, or gets no usable answer, is named and left out. UserError if the
    model or its server is not there: the captions so far are kept, and the same command goes on.
    """
    captioning = Captioning(config, task, caption_place(config.data), style_of(task))
    clips = captioning.place.clips()
    wanted = [clip for clip in clips if captioning.is_wanted(clip)]
    there = len(clips) - len(wanted)
    print(f"caption {counted(len(wanted), 'clip')}; {there} of {len(clips)} have one", flush=True)
    try:
        captioning.run(wanted)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the models do not fit into the memory of the device: task.batch_size=1, fewer "
            f"task.frames, or task.storage=nf4 ({first_line(error)})"
        ) from error
    finally:
        where = captioning.place.finish()
    for line in captioning.report(where):
        print(line)
    captioning.require_some(wanted)
    for line in how_to_look(config):
        print(line)


def how_to_look(config: Config) -> Iterator[str]:
    data = config.data
    words = ["task=inspect", f"data={config.choices['data']}"]
    words.append(f"data.instance_data_root={data.instance_data_root}")
    table = getattr(data, "dataset_name", None)
    words += [] if table is None else [f"data.dataset_name={table}"]
    yield "        Read them, and change what is wrong: what you change is yours, and is kept"
    yield f"look    {shlex.join(['python', 'launch.py', *words])}"


def style_of(task: CaptionTask) -> str:
    """What the model that writes the caption is told about its style."""
    parts = [] if task.style is None else [f"Style: {task.style}"]
    if task.examples_file is not None:
        if not task.examples_file.is_file():
            raise UserError(f"task.examples_file={task.examples_file} is not there, or is no file")
        examples = [f"- {line}" for line in read_lines(task.examples_file) if line]
        if not examples:
            raise UserError(f"task.examples_file={task.examples_file} is empty: one caption a line")
        parts.append("\n".join(["Captions of other clips, to follow in their manner:", *examples]))
    return "".join(f"\n\n{part}" for part in parts)


@dataclass
class Captioning:
    """One task. `style` is for the model that writes the captions."""

    config: Config
    task: CaptionTask
    place: CaptionPlace
    style: str
    written: int = 0
    left_out: list[str] = field(default_factory=list)
    asked_again: list[str] = field(default_factory=list)
    with_id_token: int = 0

    def is_wanted(self, clip: ClipToCaption) -> bool:
        if not clip.caption or self.task.overwrite is Overwrite.all:
            return True
        own = self.place.record.is_a_models(clip.name, clip.caption)
        return own and self.task.overwrite is Overwrite.models

    def run(self, wanted: list[ClipToCaption]) -> None:
        if not wanted:
            return
        if self.task.expander is None:
            self.describe(wanted)
            return
        known = {clip: self.place.record.unfinished(clip.name, self.asked) for clip in wanted}
        described = {clip: text for clip, text in known.items() if text is not None}
        described |= self.describe([clip for clip in wanted if clip not in described])
        self.expand(described)

    @property
    def asked(self) -> str:
        """Who describes the clips, and how: a description of another kind is not used."""
        task = self.task
        return content_key(task.captioner, task.frames, task.instructions)

    # -- the first model -----------------------------------------------------------------------

    def describe(self, clips: list[ClipToCaption]) -> dict[ClipToCaption, str]:
        """A text for each clip. Without an expander it is the caption, and is written."""
        if not clips:
            return {}
        task, found = self.task, {}
        last = task.expander is None
        chat = opened_vision(
            task.captioner, task.captioner_url, here(), "task.captioner", quantization(task.storage)
        )
        asking = Asking(chat, task.most_words if last else None)
        for batch in batches(clips, task.batch_size, "caption"):
            seen = self.frames_of_each(batch)
            texts = asking.answers([self.question(frames) for frames in seen.values()])
            for clip, text in zip(seen, texts, strict=True):
                if isinstance(text, Fault):
                    self.leave_out(clip, f"the model's answer is {text.said}")
                    continue
                found[clip] = text
                if last:
                    self.write(clip, text)
                else:
                    self.place.record.add(clip=clip.name, description=text, asked=self.asked)
            require_use(asking, len(found), "task.captioner", task.captioner)
        self.asked_again += asking.counts()
        return found

    def frames_of_each(self, clips: list[ClipToCaption]) -> dict[ClipToCaption, list]:
        """Of the clips that can be read."""
        found = {}
        for clip in clips:
            try:
                found[clip] = pictures_of(clip, self.config.data, self.task.frames)
            except BadClip as bad:
                self.leave_out(clip, str(bad))
        return found

    def question(self, frames: list) -> Messages:
        style = self.style if self.task.expander is None else ""
        pictures = [{"type": "image", "image": frame} for frame in frames]
        text = {"type": "text", "text": f"{self.task.instructions}{style}"}
        return [{"role": "user", "content": [*pictures, text]}]

    # -- the second model ----------------------------------------------------------------------

    def expand(self, described: dict[ClipToCaption, str]) -> None:
        """Writes the caption of each description."""
        if not described:
            return
        task = self.task
        if task.captioner_url is None:
            # Nothing refers to the first model any more. The second one gets its memory.
            give_memory_of_models_back()
        chat: Chat = opened_chat(
            task.expander, task.expander_url, here(), "task.expander", quantization(task.storage)
        )
        asking = Asking(chat, task.most_words)
        for batch in batches(list(described), task.batch_size, "expand "):
            told = [self.order(described[clip]) for clip in batch]
            for clip, text in zip(batch, asking.answers(told), strict=True):
                if isinstance(text, Fault):
                    self.leave_out(clip, f"the expander's answer is {text.said}")
                else:
                    self.write(clip, text, description=described[clip], expander=task.expander)
            require_use(asking, self.written, "task.expander", task.expander)
        self.asked_again += asking.counts()

    def order(self, description: str) -> Messages:
        instructions = f"{self.task.expander_instructions}{self.style}"
        return [
            {"role": "system", "content": instructions},
            {"role": "user", "content": description},
        ]

    # -- what comes of it ----------------------------------------------------------------------

    def write(self, clip: ClipToCaption, caption: str, **more: str) -> None:
        self.place.write(clip, caption)
        self.place.record.add(clip=clip.name, caption=caption, model=self.task.captioner, **more)
        self.written += 1
        tokens = self.config.data.id_tokens()
        if any(as_a_word(token).search(caption) for token in tokens):
            self.with_id_token += 1

    def leave_out(self, clip: ClipToCaption, reason: str) -> None:
        self.left_out.append(f"{clip.name} {reason}")

    def require_some(self, wanted: list[ClipToCaption]) -> None:
        if wanted and not self.written:
            raise UserError(listed("no clip has got a caption:", self.left_out))

    def report(self, where: str) -> Iterator[str]:
        yield from (f"warning left out: {line}" for line in self.left_out)
        if self.asked_again:
            yield f"asked   again, because an answer was no caption: {', '.join(self.asked_again)}"
            by_server = self.task.captioner_url or self.task.expander_url
            if by_server and any("cut off" in said for said in self.asked_again):
                yield f"        {CONTEXT_OF_OLLAMA}"
        if self.with_id_token:
            yield (
                f"warning {counted(self.with_id_token, 'caption has', 'captions have')} the word "
                f"{self.config.data.id_token}, which data.id_token puts before every caption"
            )
        yield f"result  {counted(self.written, 'caption')} in {where}"


def require_use(asking: Asking, useful: int, setting: str, model: str) -> None:
    """UserError if the model's first answers are all of no use: others would be too."""
    if useful or asking.failed < FRUITLESS:
        return
    faults = ", ".join(asking.counts())
    raise UserError(
        f"{setting}={model} gives no caption for the first {asking.failed} clips ({faults}). Take "
        f"another model; task.captioner must be one that sees pictures"
    )


def batches(clips: list[ClipToCaption], size: int, doing: str) -> Iterator[list[ClipToCaption]]:
    with bar(total=len(clips), desc=doing, unit="clip", leave=False) as progress:
        for first in range(0, len(clips), size):
            batch = clips[first : first + size]
            yield batch
            progress.update(len(batch))


def pictures_of(clip: ClipToCaption, data: Data, count: int) -> list:
    """Frames as training will see them, evenly spread, as pictures of PIL."""
    from PIL import Image

    frames = to_bytes(read_clip(clip.video, data).frames)
    chosen = frames[numpy.linspace(0, len(frames) - 1, count).round().astype(int)]
    return [Image.fromarray(frame) for frame in chosen]


def here() -> torch.device:
    """Where accelerate would train."""
    from accelerate import PartialState

    return PartialState().device


def give_memory_of_models_back() -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
