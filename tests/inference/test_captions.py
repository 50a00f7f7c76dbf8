"""task=caption: captions by a model behind a server or on this machine."""

import base64
import io
import json

import pytest
import scripted
import torch
import vision_models
from PIL import Image
from scripted import said

from cogvx.config import Wrong
from cogvx.data.written import RECORD
from cogvx.errors import UserError
from cogvx.inference import captions
from cogvx.inference import chat as chats
from cogvx.inference.answers import Fault, fault_of
from cogvx.inference.captions import write_captions
from cogvx.inference.chat import Answer


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
            # One after the other: the answers are given in order.
            "task.batch_size=1",
            *overrides,
        )
        write_captions(config, config.task)

    return start


def texts(clips):
    return {path.stem: path.read_text() for path in sorted((clips / "videos").glob("*.txt"))}


@pytest.mark.slow
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
    assert "warning left out: videos/2.mp4 cannot be opened as a video" in out
    path, body = server.asked[0]
    assert (path, body["model"]) == ("/v1/chat/completions", "small")
    *pictures, text = body["messages"][0]["content"]
    assert "50 to 100 words" in text["text"] and len(pictures) == 3
    shades = []
    for picture in pictures:
        head, _, code = picture["image_url"]["url"].partition(",")
        image = Image.open(io.BytesIO(base64.b64decode(code)))
        assert (head, image.size) == ("data:image/jpeg;base64", (64, 64))
        shades.append(image.resize((1, 1)).getpixel((0, 0))[0])
    assert shades == sorted(shades) and shades[0] < shades[2], "in order: the clips get brighter"


@pytest.mark.slow
def test_an_interrupted_task_goes_on_and_a_persons_caption_is_kept(caption, clips, server, capsys):
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
    (clips / "videos" / "1.txt").write_text("two, by a person\n")
    server.answers += [said("new")] * 5
    caption("task.overwrite=models")
    assert list(texts(clips).values()) == ["new\n", "two, by a person\n", *["new\n"] * 4]
    server.answers += [said("newest")] * 6
    caption("task.overwrite=all")
    assert set(texts(clips).values()) == {"newest\n"}
    lines = [json.loads(line) for line in (clips / RECORD).read_text().splitlines()]
    assert lines[0] | {"date": ""} == {
        "clip": "videos/0.mp4",
        "caption": "one",
        "model": "small",
        "date": "",
    }
    look = f"look    python launch.py task=inspect data=folder data.instance_data_root={clips}\n"
    assert capsys.readouterr().out.endswith(look)


@pytest.mark.slow
def test_an_answer_that_is_no_caption_is_asked_for_again_once_and_counted(
    caption, clips, server, capsys
):
    cut = (200, {"choices": [{"message": {"content": "A cat ru"}, "finish_reason": "length"}]})
    long = said("word " * 40)
    server.answers += [cut, said("A cat runs.")]
    server.answers += [said(" "), said("I'm sorry, but I can't help with that.")]
    server.answers += [long, long, said("Fine.")]
    server.answers += [
        said("As an AI model I see a dog."),
        said("A dog in the SNOW."),
        said("Good."),
    ]
    caption("task.most_words=30", "data.id_token=SNOW")
    assert texts(clips) == {
        "0": "A cat runs.\n",
        "3": "Fine.\n",
        "4": "A dog in the SNOW.\n",
        "5": "Good.\n",
    }
    again = server.asked[1][1]["messages"][0]["content"]
    assert again[-1]["text"] == Fault.cut_off.value and "50 to 100 words" in again[-2]["text"]
    out = capsys.readouterr().out
    assert "warning left out: videos/1.mp4 the model's answer is a refusal" in out
    assert "warning left out: videos/2.mp4 the model's answer is too long" in out
    assert "no caption: 1 cut off, 1 empty, 1 too long, 1 refusal" in out
    assert "OLLAMA_CONTEXT_LENGTH=16384 ollama serve" in out
    assert "1 caption has the word SNOW, which data.id_token puts before" in out
    server.answers += [said("Now."), said("Then.")]
    caption()
    assert len(texts(clips)) == 6, "the same command asks for those that are missing"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("A sorry-looking dog waits.", None),
        ("I can't believe", Fault.refusal),
        ("I\u2019m unable to see", Fault.refusal),
        ("Unfortunately, I cannot", Fault.refusal),
        ("word " * 151, Fault.too_long),
        (' "" ', Fault.empty),
    ],
)
def test_what_is_no_caption_is_told_from_one(text, fault):
    assert fault_of(Answer(text), most_words=150) is fault
    assert fault_of(Answer("A cat", complete=False), most_words=None) is Fault.cut_off


@pytest.mark.slow
def test_a_model_of_no_use_is_given_up(caption, server, monkeypatch):
    monkeypatch.setattr(captions, "FRUITLESS", 3)
    server.answers += [said(" ")] * 6
    with pytest.raises(UserError, match=r"no caption for the first 3 clips \(3 empty\). Take"):
        caption()
    assert len(server.asked) == 6


@pytest.mark.slow
def test_a_second_model_writes_the_description_out_and_goes_on_where_it_stopped(
    caption, clips, server, tmp_path
):
    (tmp_path / "examples.txt").write_text("A fox sleeps.\n\nA bird sings.\n")
    options = [
        f"task.expander_url={server.url}",
        "task.expander=writer",
        "task.style=like a log",
    ]
    options.append(f"task.examples_file={tmp_path / 'examples.txt'}")
    server.answers += [said(f"short {n}") for n in range(6)]
    server.answers += [said("Long 0."), (500, b"oops")]
    with pytest.raises(UserError, match=r"refuses task.expander=writer"):
        caption(*options)
    assert texts(clips) == {"0": "Long 0.\n"}
    first = server.asked[0][1]["messages"][0]["content"][-1]["text"]
    assert "A fox" not in first and "like" not in first
    asked = server.asked[6][1]
    assert asked["model"] == "writer" and asked["messages"][1]["content"] == "short 0"
    told = asked["messages"][0]["content"]
    assert told.endswith(
        "Style: like a log\n\nCaptions of other clips, to follow in their manner:\n"
        "- A fox sleeps.\n- A bird sings."
    )
    server.answers += [said(f"Long {n}.") for n in range(1, 6)]
    caption(*options)
    assert texts(clips) == {str(n): f"Long {n}.\n" for n in range(6)}
    assert len(server.asked) == 6 + 2 + 5, "no clip is described twice"
    line = json.loads((clips / RECORD).read_text().splitlines()[-1])
    assert (line["description"], line["model"], line["expander"]) == ("short 5", "small", "writer")


@pytest.mark.slow
def test_a_server_is_asked_for_several_clips_at_once(caption, clips, server):
    server.answers += [said("a clip")] * 6
    caption("task.batch_size=4")
    assert len(texts(clips)) == 6


@pytest.mark.slow
def test_a_table_gets_its_missing_captions_at_the_end_also_of_a_stopped_task(
    caption, clips, server, capsys
):
    table = clips / "metadata.csv"
    lines = ["file_name,other,text", "videos/0.mp4,x,by hand", 'videos/1.mp4,"a, b",']
    before = "\n".join([*lines, *(f"videos/{n}.mp4,," for n in (2, 3))]) + "\n"
    table.write_text(before)
    server.answers += [said("one"), (500, b"oops")]
    with pytest.raises(UserError, match="oops"):
        caption("data=table")
    server.answers += [said('two, "quoted"'), said("three")]
    caption("data=table")
    assert table.read_text() == (
        'file_name,other,text\nvideos/0.mp4,x,by hand\nvideos/1.mp4,"a, b",one\n'
        'videos/2.mp4,,"two, ""quoted"""\nvideos/3.mp4,,three\n'
    )
    assert (clips / "metadata.csv.before_captions").read_text() == before
    out = capsys.readouterr().out
    assert "result  2 captions in" in out and "metadata.csv, column text" in out
    server.answers += [said("new")] * 3
    caption("data=table", "task.overwrite=models")
    assert table.read_text().count("new\n") == 3 and "by hand" in table.read_text()


@pytest.mark.slow
def test_what_cannot_be_captioned_is_said(caption, compose, server, clips, tmp_path):
    for video in (clips / "videos").glob("*.mp4"):
        video.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"no clip has got a caption:\n  - videos/0.mp4 cannot be"):
        caption()
    with pytest.raises(UserError, match=r"examples_file=.*none.txt is not there"):
        caption(f"task.examples_file={tmp_path / 'none.txt'}")
    for overrides, text in (
        (["data=demo"], "data=folder or data=table, not data=demo"),
        (["task.frames=0"], "task.frames=0: must be from 1 to 64"),
        (["task.batch_size=0"], "task.batch_size=0: must be 1 or more"),
        (["task.overwrite=true"], "must be one of none, models, all"),
        (["task.captioner_url=null"], "task.captioner=small is no folder and no hub id"),
        (["task.captioner_url=ollama"], "must begin with http"),
        (["task.expander_url=http://x"], "task.expander_url without task.expander"),
    ):
        with pytest.raises(Wrong, match=text):
            caption(*overrides)
    with pytest.raises(Wrong, match=r"task.captioner must be given"):
        compose("task=caption", "data=folder", "data.instance_data_root=/clips")


@pytest.mark.slow
def test_a_lack_of_memory_is_said_and_what_is_there_is_kept(caption, clips, server, monkeypatch):
    server.answers += [said("one")]
    ask, asked = captions.Asking.answers, []

    def answers(self, conversations):
        asked.append(conversations)
        if len(asked) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return ask(self, conversations)

    monkeypatch.setattr(captions.Asking, "answers", answers)
    with pytest.raises(UserError, match=r"do not fit .* task.batch_size=1, .*CUDA out of memory"):
        caption()
    assert texts(clips) == {"0": "one\n"}


def test_no_question_is_no_conversation():
    assert captions.Asking(None, 150).answers([]) == []


@pytest.mark.slow
def test_a_model_on_this_machine_captions_a_folder(compose, clips, tmp_path, monkeypatch, capsys):
    """With an ending, as a random model never comes to one."""
    monkeypatch.setattr(chats, "MOST_TOKENS", 4)
    answers = captions.Asking.judged
    monkeypatch.setattr(
        captions.Asking, "judged", lambda self, answer: answers(self, Answer(answer.text))
    )
    model = vision_models.write_llava(tmp_path / "model")
    config = compose(
        "task=caption",
        "data=folder",
        f"data.instance_data_root={clips / 'videos'}",
        f"task.captioner={model}",
        "task.frames=2",
    )
    write_captions(config, config.task)
    assert len({*texts(clips)}) == 6 and all(texts(clips).values())
    assert "result  6 captions in" in capsys.readouterr().out
