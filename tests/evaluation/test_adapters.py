"""task.add: LoRAs that are no run. The videos are those of diffusers' set_adapters()."""

import json
import shutil

import diffusers
import numpy
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from cogvx.errors import UserError
from cogvx.evaluation.adapters import require_low_rank
from cogvx.evaluation.gallery import VideoGenerator
from cogvx.model import lora

PROMPT = "A red circle moves up."
SHORT = ["data.max_num_frames=5", "validation.num_inference_steps=2"]
ASKED = ["task=generate", f"task.prompt='{PROMPT}'", "task.seeds=[3]", *SHORT]


@pytest.fixture(scope="session")
def write_lora(nano_folder):
    """write_lora(folder, rank, alpha, layers, seed): a random LoRA for nano; its folder."""

    def write(folder, rank, alpha, layers, seed, base=nano_folder, **others):
        transformer = CogVideoXTransformer3DModel.from_pretrained(
            base, subfolder="transformer", torch_dtype=torch.float32
        )
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, **others)
        transformer.add_adapter(settings)
        generator = torch.Generator().manual_seed(seed)
        for tensor in lora.state(transformer).values():
            tensor.data.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        folder.mkdir(parents=True)
        lora.save(transformer, folder)
        return folder

    return write


@pytest.fixture(scope="session")
def loras(write_lora, tmp_path_factory):
    """Of different ranks, strengths and layers: alpha / rank is 2 and 0.5."""
    base = tmp_path_factory.mktemp("loras")
    one = write_lora(base / "one", 4, 8, ["to_q", "to_v"], 1)
    return one, write_lora(base / "two", 2, 1, ["to_v", "to_out.0"], 2)


@pytest.fixture
def frames_of(monkeypatch):
    """The frames of every video that is made, before they are compressed to mp4."""
    made, generate = [], VideoGenerator.generate

    def watched(self, *given, **named):
        made.append(generate(self, *given, **named))
        return made[-1]

    monkeypatch.setattr(VideoGenerator, "generate", watched)
    return made


def made_by_diffusers(folder, loras, strengths) -> numpy.ndarray:
    pipe = diffusers.CogVideoXPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    names = [f"lora{number}" for number, _ in enumerate(loras)]
    for name, place in zip(names, loras, strict=True):
        pipe.load_lora_weights(place, adapter_name=name)
    pipe.set_adapters(names, strengths)
    frames = pipe(
        prompt=PROMPT,
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    return (frames * 255).round().clip(0, 255).astype("uint8")


def apart(one, other) -> int:
    """The largest difference of a pixel."""
    return int(numpy.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.slow
def test_two_loras_on_the_base_model(run, loras, frames_of, nano_folder, capfd):
    one, two = loras
    asked = [f"task.add=[{one},{two}]", "task.add_strengths=[0.5,-0.4]", "task.strengths=[1,0.5]"]
    folder = run("g", *ASKED, *asked)
    base, whole, half = frames_of
    assert apart(whole, made_by_diffusers(nano_folder, loras, [0.5, -0.4])) <= 1
    assert apart(half, made_by_diffusers(nano_folder, loras, [0.25, -0.2])) <= 1
    assert apart(whole, base) > 20 and apart(whole, half) > 5, "the LoRAs show"
    assert f"lora    {one} x 0.5 + {two} x -0.4: rank 6 on 18 layers" in capfd.readouterr().out
    [row] = json.loads((folder / "videos.json").read_text())
    assert [label for label, _ in row["videos"]] == ["base", "added", "added x 0.5"]
    # The sum that was written is a LoRA for plain diffusers.
    assert apart(whole, made_by_diffusers(nano_folder, [folder / "added" / "added"], [1.0])) <= 1


@pytest.mark.slow
def test_the_folder_makes_its_videos_without_the_added_files(run, loras, frames_of, tmp_path):
    mine = shutil.copytree(loras[0], tmp_path / "mine")
    asked = [*ASKED, f"task.add=[{mine}]", "task.base=false"]
    folder = run("g", *asked)
    shutil.rmtree(mine)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "videos")
    run("g", *asked)
    assert numpy.array_equal(*frames_of)


@pytest.mark.slow
def test_a_lora_on_top_of_a_runs_lora(run, trained, loras, frames_of, nano_folder):
    first = trained("train.max_train_steps=4", "optimizer.learning_rate=1e-2", *SHORT)
    folder = run("g", *ASKED, f"task.run={first}", f"task.add=[{loras[1]}]", "task.base=false")
    [both] = frames_of
    assert apart(both, made_by_diffusers(nano_folder, [first, loras[1]], [1.0, 1.0])) <= 1
    assert apart(both, made_by_diffusers(nano_folder, [loras[1]], [1.0])) > 1
    [row] = json.loads((folder / "videos.json").read_text())
    assert [label for label, _ in row["videos"]] == ["result and added"]


@pytest.mark.slow
def test_loras_that_cannot_be_added_are_named(
    run, loras, write_lora, family_folder, tmp_path, capfd
):
    other = write_lora(tmp_path / "o", 2, 2, ["to_q"], 1, family_folder("2b"))
    dora = write_lora(tmp_path / "d", 2, 2, ["to_q"], 1, use_dora=True)
    (tmp_path / "text.safetensors").write_text("no")
    (tmp_path / "text.json").write_text('{"step": 1, "loss": 0.5}\n' * 40)
    half = load_file(loras[0] / lora.WEIGHTS)
    lost = next(name for name in half if ".lora_B." in name)
    save_file({n: t for n, t in half.items() if n != lost}, tmp_path / "half.safetensors")
    save_file({f"x.{n}": t for n, t in half.items()}, tmp_path / "prefix.safetensors")
    said = {
        tmp_path / "half.safetensors": " has down and no up matrix",
        tmp_path / "prefix.safetensors": "is no LoRA for CogVideoX: its first tensor is x.",
        other: "The first is transformer_blocks.0.attn1.to_q: [64, 64] in the file, [128, 128] in "
        "the model",
        dora: f"{dora} is a DoRA",
        tmp_path / "text.json": "text.json cannot be read as weights: it is none.",
        tmp_path / "text.safetensors": "text.safetensors cannot be read as weights",
        tmp_path / "nothing": "task.add=",
    }
    for number, (place, text) in enumerate(said.items()):
        run(f"x{number}", *ASKED, f"task.add=[{place}]", expect=2)
        errors = capfd.readouterr().err
        assert text in errors and str(place) in errors and "Traceback" not in errors


def test_a_lora_on_top_of_a_full_fine_tuning_needs_a_whole_model(compose):
    task = compose("task=generate", "task.run=outputs/RUN", "task.add=[a.safetensors]").task
    require_low_rank(compose(), task)
    with pytest.raises(UserError, match=r"trained every weight .*task.format=merged"):
        require_low_rank(compose("lora=null"), task)


def test_a_file_as_task_run_is_sent_to_task_add(launch, loras):
    for place in (loras[0] / lora.WEIGHTS, "me/my-lora"):
        ran = launch("task=generate", "task.prompt=a", f"task.run={place}")
        assert ran.returncode == 2 and f"task.add=[{place}]" in ran.stderr


def test_strengths_without_loras_are_refused(compose):
    with pytest.raises(Exception, match="give one number for each"):
        compose("task=generate", "task.prompt=a", "task.add_strengths=[1.0]")
