"""task=caption: a vision-language model writes a caption beside each clip that has none."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy

from cogvx.config import Config
from cogvx.data.folder import Folder
from cogvx.data.footage import BadClip
from cogvx.data.video import read_clip, to_bytes
from cogvx.errors import UserError
from cogvx.files import shown, write_text
from cogvx.inference.chat import Chat, Messages, asked_of_server, in_one_line
from cogvx.options.tasks import CaptionTask
from cogvx.progress import bar, counted


def write_captions(config: Config, task: CaptionTask) -> None:
    """Writes a text file beside each clip that has none, or beside each if task.overwrite.

    A clip that cannot be read is named and left out. UserError if the server does not answer: the
    captions so far are kept, and the same command goes on.
    """
    data: Folder = config.data
    clips = data.clips(data.files())
    wanted = [clip for clip in clips if task.overwrite or not has_caption(data, clip)]
    there = len(clips) - len(wanted)
    print(f"caption {counted(len(wanted), 'clip')}; {there} of {len(clips)} have one", flush=True)

    def chat(messages: Messages) -> str:
        return asked_of_server(task.captioner, task.captioner_url, "task.captioner", messages)

    left_out = []
    for clip in bar(wanted, desc="caption", unit="clip", leave=False):
        try:
            caption = caption_of_clip(clip, config, task, chat)
        except BadClip as bad:
            left_out.append(f"{clip.name} {bad}")
            continue
        write_text(data.caption_file(clip), f"{caption}\n")
    for line in left_out:
        print(f"warning left out: {line}")
    root = shown(data.instance_data_root)
    print(f"result  {counted(len(wanted) - len(left_out), 'caption')} in {root}")
    print("        Read them, and change what is wrong. Then train with the same data=folder")


def has_caption(data: Folder, clip: Path) -> bool:
    """A blank file is none."""
    path = data.caption_file(clip)
    return path.is_file() and bool(path.read_bytes().strip())


def caption_of_clip(clip: Path, config: Config, task: CaptionTask, chat: Chat) -> str:
    """One line. The model sees the frames that training will see."""
    frames = to_bytes(read_clip(clip, config.data).frames)
    chosen = frames[numpy.linspace(0, len(frames) - 1, task.frames).round().astype(int)]
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg(frame)}"}}
        for frame in chosen
    ]
    text = {"type": "text", "text": task.instructions}
    answer = in_one_line(chat([{"role": "user", "content": [text, *pictures]}]))
    if not answer:
        raise UserError(
            f"task.captioner={task.captioner} answers nothing to the frames of {clip}: take a "
            f"model that sees pictures"
        )
    return answer


def jpeg(frame: numpy.ndarray) -> str:
    """[H, W, C] uint8 as base64."""
    from PIL import Image

    written = io.BytesIO()
    Image.fromarray(frame).save(written, format="JPEG", quality=90)
    return base64.b64encode(written.getvalue()).decode()
