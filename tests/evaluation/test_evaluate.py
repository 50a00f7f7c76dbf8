"""task=evaluate compares models on the same prompts and seeds, and writes all it measures."""

import csv
import json
import sys
import types

import numpy
import pytest
import torch

from cogvx.errors import UserError
from cogvx.evaluation import evaluate
from cogvx.model import full
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.trained_weights import FullWeights
from cogvx.model.unread import read_weights

FEW = ["task=evaluate", "task.count=2", "validation.num_inference_steps=2"]
SHORT = ["train.max_train_steps=6", "train.checkpointing_steps=3"]


def written(folder) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


@pytest.mark.slow
def test_base_result_strengths_and_checkpoints_are_compared(run, trained, capfd):
    first = trained(*SHORT)
    folder = run(
        "e", *FEW, f"task.run={first}", "task.strengths=[1.0,0.5]", "task.checkpoints=true"
    )
    found, rows = written(folder), list(csv.DictReader((folder / "evaluation.csv").open()))
    names = [
        "base",
        "step_000003",
        "step_000003 x 0.5",
        "step_000006",
        "step_000006 x 0.5",
        "result",
        "result x 0.5",
    ]
    assert list(found["heldout_loss"]) == names and list(found["comparisons"]) == names[1:]
    assert len(rows) == 7 * 4 and {(row["kind"], row["seed"]) for row in rows} == {
        ("taught", "0"),
        ("taught", "1"),
        ("other", "2"),
        ("other", "3"),
    }
    assert (
        len(list((folder / "videos").rglob("*.mp4"))) == 28
        and (folder / "evaluation.png").is_file()
    )
    losses, summary = found["heldout_loss"], json.loads((first / "summary.json").read_text())
    assert losses["base"] == pytest.approx(summary["heldout_loss_before"], abs=1e-6)
    assert (
        losses["result"]
        == losses["step_000006"]
        == pytest.approx(summary["heldout_loss_after"], abs=1e-6)
    )
    assert len(set(losses.values())) == 5, "the result is the last checkpoint"
    said = capfd.readouterr().out
    assert "new concept   colour" in said and "result  " in said and "score   new concept: " in said
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "distance to the nearest training clip" in page


@pytest.mark.slow
def test_in_bf16_too_the_held_out_loss_is_the_one_of_training(run, trained):
    """Training runs under autocast. Without it the same weights would get another loss."""
    first = trained(*SHORT, "train.mixed_precision=bf16", "optimizer.learning_rate=1e-2")
    losses = written(run("e", *FEW, f"task.run={first}", "train.mixed_precision=bf16"))
    summary = json.loads((first / "summary.json").read_text())
    assert losses["heldout_loss"]["base"] == summary["heldout_loss_before"]
    assert losses["heldout_loss"]["result"] == summary["heldout_loss_after"]


def test_full_weights_are_judged_in_one_transformer(nano_folder, tmp_path):
    base = PretrainedModel(nano_folder, torch.device("cpu"), torch.float32)
    changed = base.transformer()
    with torch.no_grad():
        changed.proj_out.bias += 1
    full.save_transformer(changed, tmp_path)
    wanted, arranged = [(None, 1.0), (tmp_path, 1.0)], []

    def arrange(transformer):
        arranged.append(transformer)
        read_weights(transformer, torch.device("cpu"))

    found = [
        (transformer, transformer.proj_out.bias.clone())
        for transformer in FullWeights().variants(base, 0, wanted, arrange)
    ]
    assert [transformer for transformer, _ in found] == arranged
    assert torch.equal(found[0][1] + 1, found[1][1])
    in_memory = [
        sum(weight.numel() for weight in each.parameters() if weight.device.type == "cpu")
        for each in arranged
    ]
    assert in_memory[0] == 0 and in_memory[1] > 10**6


def test_full_weights_of_another_model_are_refused(nano_folder, family_folder, tmp_path):
    base = PretrainedModel(nano_folder, torch.device("cpu"), torch.float32)
    other = PretrainedModel(family_folder("2b"), torch.device("cpu"), torch.float32)
    full.save_transformer(other.transformer(), tmp_path)
    with pytest.raises(UserError, match="does not fit this model"):
        next(FullWeights().variants(base, 0, [(tmp_path, 1.0)], lambda transformer: None))


@pytest.mark.slow
def test_a_model_that_learned_nothing_differs_in_nothing(run, trained):
    first = trained(*SHORT, "optimizer.learning_rate=0")
    for comparison in written(run("e", *FEW, f"task.run={first}"))["comparisons"]["result"]:
        assert (comparison["difference"], comparison["low"], comparison["high"]) == (0, 0, 0)


@pytest.mark.slow
def test_full_fine_tuning_and_image_to_video_are_judged_too(run, trained, capfd):
    first = trained(*SHORT, "lora=null", "optimizer.learning_rate=1e-3")
    losses = written(run("e", *FEW, "lora=null", f"task.run={first}"))["heldout_loss"]
    assert losses["base"] != losses["result"]
    run("f", *FEW, "lora=null", f"task.run={first}", "task.strengths=[0.5]", expect=2)
    assert "task.strengths is for a LoRA" in capfd.readouterr().err
    first = trained(*SHORT, "model=nano_i2v")
    found = written(run("g", *FEW, "model=nano_i2v", f"task.run={first}"))
    assert {c["kind"] for c in found["comparisons"]["result"]} == {"taught"}


@pytest.mark.slow
def test_prompts_of_ones_own(run, trained, tmp_path):
    first = trained(*SHORT)
    (tmp_path / "p.txt").write_text(
        "a rabbit, (hopping)\n\nA red circle moves up over a blue background.\n", encoding="utf-8"
    )
    found = written(run("e", *FEW, f"task.run={first}", f"task.prompts_file={tmp_path / 'p.txt'}"))
    videos = {c["measure"]: c["videos"] for c in found["comparisons"]["result"]}
    assert videos["motion"] == 2 and videos["shape"] == 1, (
        "judged where the prompt has the world's form"
    )


def test_a_run_without_a_result_says_so(run, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    run("e", *FEW, f"task.run={tmp_path / 'empty'}", expect=2)
    assert (
        "has no result (pytorch_lora_weights.safetensors) and no checkpoint"
        in capfd.readouterr().err
    )


@pytest.mark.slow
def test_a_training_clip_is_at_no_distance_from_itself(run, trained):
    frames = numpy.random.default_rng(0).integers(0, 256, (9, 64, 64, 3)).astype(numpy.uint8)
    assert evaluate.distance(evaluate.small(frames), evaluate.small(frames)) == 0
    assert evaluate.distance(evaluate.small(frames), evaluate.small(255 - frames)) > 0.01
    first = trained(*SHORT)
    assert 0 < written(run("e", *FEW, f"task.run={first}"))["nearest_clip_of_held_out_clips"] < 1


@pytest.mark.slow
def test_a_clip_model_judges_text_and_frames(run, trained, tmp_path):
    """A tiny random CLIP in transformers' format."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz."),
    ]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=77
    )
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**size, "vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16})
    )
    model.save_pretrained(tmp_path / "clip")
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(tmp_path / "clip")
    first = trained(*SHORT)
    found = written(run("e", *FEW, f"task.run={first}", f"task.clip_path={tmp_path / 'clip'}"))
    values = [c for c in found["comparisons"]["result"] if c["measure"] == "clip"]
    assert len(values) == 2 and all(-1 <= c["base"] <= 1 and c["base"] != 0 for c in values)


@pytest.mark.slow
def test_a_clip_model_that_is_not_there_is_named(run, trained, tmp_path, capfd):
    first = trained(*SHORT)
    run("e", *FEW, f"task.run={first}", f"task.clip_path={tmp_path / 'nowhere'}", expect=2)
    assert "cannot be loaded as a CLIP model" in capfd.readouterr().err


@pytest.mark.slow
def test_vbench_is_given_the_videos_or_its_absence_is_said(run, trained, monkeypatch, capfd):
    first = trained(*SHORT)
    run("e", *FEW, f"task.run={first}", "task.vbench=[motion_smoothness]", expect=2)
    assert "task.vbench needs the package vbench" in capfd.readouterr().err
    calls = []

    class VBench:  # with the package's own signature
        def __init__(self, device, full_info_dir, output_path):
            self.place = output_path

        def evaluate(self, videos_path, name, dimension_list, mode):
            calls.append((videos_path, dimension_list, mode))

    monkeypatch.setitem(sys.modules, "vbench", types.SimpleNamespace(VBench=VBench))
    folder = run("f", *FEW, f"task.run={first}", "task.vbench=[motion_smoothness]")
    assert calls == [
        (str(folder / "videos" / name), ["motion_smoothness"], "custom_input")
        for name in ("base", "result")
    ]


@pytest.mark.slow
def test_a_run_is_judged_by_its_record(launch, trained, tmp_path):
    first = trained(*SHORT, "lora.rank=3")
    ran = launch(*FEW, f"task.run={first}", f"output_dir={tmp_path / 'e'}")
    assert ran.returncode == 0, ran.stderr
    assert "lora:\n  rank: 3" in (tmp_path / "e" / "config.yaml").read_text()
    nowhere = launch(*FEW, f"task.run={tmp_path / 'nowhere'}")
    assert (
        nowhere.returncode == 2
        and "task.run=" in nowhere.stderr
        and "is not the folder of a run" in nowhere.stderr
    )
