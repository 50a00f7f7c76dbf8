"""A server of OpenAI's protocol that others wrote: `transformers serve`, with a tiny model.

It needs packages that cogvx does not: pip install fastapi uvicorn openai
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import vision_models

from cogvx.data.written import RECORD
from cogvx.errors import UserError
from cogvx.inference import chat as chats
from cogvx.inference.captions import write_captions

PATIENCE = 120  # seconds


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The model's folder, and the address of a server that has it."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    model = vision_models.write_llava(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", model]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=os.environ)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + PATIENCE
        while not answers(url):
            assert process.poll() is None and time.monotonic() < until, (
                tmp_path / "log"
            ).read_text()
            time.sleep(0.5)
        yield model, url
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_frames_are_described_by_a_real_server(served, compose, clips, monkeypatch, capsys):
    model, url = served
    monkeypatch.setattr(chats, "MOST_TOKENS", 6)
    config = compose(
        "task=caption",
        "data=folder",
        f"data.instance_data_root={clips / 'videos'}",
        f"task.captioner={model}",
        f"task.captioner_url={url}",
        "task.frames=2",
        "task.batch_size=6",
    )
    # A random model never comes to an end, and the server says so.
    with pytest.raises(UserError, match=r"no clip has got a caption:") as caught:
        write_captions(config, config.task)
    assert str(caught.value).count("answer is cut off") == 6
    monkeypatch.setattr(chats.Answer, "complete", True)
    write_captions(config, config.task)
    assert len((clips / "videos" / RECORD).read_text().splitlines()) == 6
    config.task.captioner = "no-such-model"
    config.task.overwrite = type(config.task.overwrite).all
    with pytest.raises(UserError, match=r"refuses task.captioner=no-such-model"):
        write_captions(config, config.task)
