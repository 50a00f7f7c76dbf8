"""task=caption: captions by a model behind a server, written beside the clips."""

import base64
import io

import pytest
import scripted
from PIL import Image
from scripted import said

from cogvx.config import Wrong
from cogvx.errors import UserError
from cogvx.inference.captions import write_captions


@pytest.fixture
def server(monkeypatch):
    with scripted.chat_server(monkeypatch) as found:
        yield found


@pytest.fixture
def caption(compose, clips, server):
    """caption("task.overwrite=true"): the task over the folder of clips, without text files."""
    for name in ("prompts.txt", "videos.txt"):
        (clips / name).unlink()

    def start(*overrides):
        config = compose(
            "task=caption",
            "data=folder",
            f"data.instance_data_root={clips}",
            "task.captioner=small",
            f"task.captioner_url={server.url}",
            *overrides,
        )
        write_captions(config, config.task)

    return start


def texts(clips):
    return {path.stem: path.read_text() for path in sorted((clips / "videos").glob("*.txt"))}


def test_clips_without_a_caption_get_one_and_others_keep_theirs(caption, clips, server, capsys):
    (clips / "videos" / "0.txt").write_text("by hand")
    (clips / "videos" / "1.txt").write_text(" \n")
    (clips / "videos" / "2.mp4").write_bytes(b"broken")
    server.answers += [said(f'"A  clip\n{n}. "') for n in (1, 3, 4, 5)]
    caption("task.frames=3")
    assert texts(clips) == {
        "0": "by hand",
        **{str(n): f"A clip {n}.\n" for n in (1, 3, 4, 5)},
    }
    out = capsys.readouterr().out
    assert "caption 5 clips; 1 of 6 have one" in out and "result  4 captions in" in out
    assert "warning left out: 2.mp4 cannot be opened as a video" in out
    path, body = server.asked[0]
    assert (path, body["model"]) == ("/v1/chat/completions", "small")
    text, *pictures = body["messages"][0]["content"]
    assert "50 to 100 words" in text["text"] and len(pictures) == 3
    shades = []
    for picture in pictures:
        head, _, code = picture["image_url"]["url"].partition(",")
        image = Image.open(io.BytesIO(base64.b64decode(code)))
        assert (head, image.size) == ("data:image/jpeg;base64", (64, 64))
        shades.append(image.resize((1, 1)).getpixel((0, 0))[0])
    assert shades == sorted(shades) and shades[0] < shades[2], "in order: the clips get brighter"


def test_an_interrupted_task_goes_on_and_a_second_writes_over_only_when_told(
    caption, clips, server
):
    server.answers += [said("one"), said("two"), (500, b"oops")]
    with pytest.raises(UserError, match=r"refuses task.captioner=small .500.: oops"):
        caption()
    assert texts(clips) == {"0": "one\n", "1": "two\n"}
    server.answers += [said("more")] * 4
    caption()
    assert list(texts(clips).values()) == ["one\n", "two\n", *["more\n"] * 4]
    asked = len(server.asked)
    caption()
    assert len(server.asked) == asked
    server.answers += [said("new")] * 6
    caption("task.overwrite=true")
    assert set(texts(clips).values()) == {"new\n"}


def test_what_cannot_be_captioned_is_said(caption, compose, server):
    server.answers += [said(" ")]
    with pytest.raises(UserError, match=r"answers nothing to the frames of .*0.mp4: take a model"):
        caption()
    with pytest.raises(Wrong, match=r"text file beside each clip: data=folder, not data=demo"):
        compose("task=caption", "task.captioner=small")
    with pytest.raises(Wrong, match=r"task.frames=0: must be from 1 to 64"):
        caption("task.frames=0")
    with pytest.raises(Wrong, match=r"task.captioner must be given"):
        compose("task=caption", "data=folder", "data.instance_data_root=/clips")
