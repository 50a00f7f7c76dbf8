"""Memory ends, here by a planted error, in every phase of a run."""

import contextlib
import dataclasses
import gc
import json
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

import launch
from cogvx.data import encode, prompts
from cogvx.errors import UserError
from cogvx.evaluation import evaluate, gallery
from cogvx.files import read_json, read_json_lines, write_json
from cogvx.model import lora, offload, transfer
from cogvx.training import checkpoint as checkpoints
from cogvx.training import heldout, out_of_memory, state, trainer
from cogvx.training.heldout import heldout_loss
from cogvx.training.out_of_memory import Lack, LackElsewhere, said_of_lack
from cogvx.training.peaks import MemoryPeaks

TEXT = (
    "CUDA out of memory. Tried to allocate 1.19 GiB. GPU 0 has a total capacity of 23.64 GiB of "
    "which 803.81 MiB is free. Including non-PyTorch memory, this process has 22.84 GiB memory in "
    "use. Of the allocated memory 21.44 GiB is allocated by PyTorch, and 973.46 MiB is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
GIB = 2**30


def no_memory(*given, **settings):
    raise torch.OutOfMemoryError(TEXT)


# -- what is said --------------------------------------------------------------------------------


@pytest.fixture
def on_a_card(monkeypatch):
    """What torch tells of a card whose memory has just ended."""
    for name, value in (("memory_allocated", 21.44), ("memory_reserved", 22.39)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: int(value * GIB))
    for name in ("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    about = SimpleNamespace(total_memory=int(23.64 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)


def said(phase: str, config, folder, *, error=no_memory) -> list[str]:
    with pytest.raises(Exception) as raised, MemoryPeaks().phase(phase, "backward pass of step 9"):
        error()
    return said_of_lack(raised.value, config, folder).splitlines()


def test_one_message_has_phase_step_figures_command_and_what_is_kept(compose, on_a_card, tmp_path):
    (tmp_path / "checkpoints/step_000008").mkdir(parents=True)
    (tmp_path / "checkpoints/step_000009.partial").mkdir()
    write_json(tmp_path / "plan.json", {"phases": {"train": {"reserved_gib": 22.1}}})
    config = compose("memory=balanced", "data.max_num_frames=9")
    assert [line.strip() for line in said("train", config, tmp_path)] == [
        "the GPU's memory is too small for this: it ended while training (backward pass of step "
        "9).",
        "In use: 21.44 GiB allocated, 22.39 GiB reserved, of 23.64 GiB. Planned: 22.10 GiB "
        "reserved.",
        f"Type:  python launch.py train.resume={tmp_path} memory=low",
        "Not enough? Try memory=minimal, then data.max_num_frames=5, then a smaller data.height "
        "and data.width.",
        "That goes on after step 8, in a new folder. This run's files stay.",
        f"The error: {TEXT.partition(' If ')[0]}",
    ]


@pytest.mark.parametrize(
    ("phase", "settings", "first"),
    [
        ("encode clips", [], "memory.vae_tiling=true"),
        ("encode prompts", [], "memory.stream_text_encoder=true"),
        ("load", ["train.train_batch_size=4"], "memory=balanced"),
        ("train", [], "memory=balanced"),
        ("train", ["memory=low"], "memory=minimal"),
        ("train", ["lora=null", "memory=balanced"], "memory=low_full"),
        (
            "train",
            ["train.train_batch_size=4", "train.gradient_accumulation_steps=2"],
            "train.train_batch_size=1 train.gradient_accumulation_steps=8",
        ),
        ("held-out loss", ["train.train_batch_size=4"], "memory=balanced"),
        ("video", [], "memory.vae_tiling=true"),
        ("video", ["memory=balanced"], "memory.frugal_videos=true"),
        ("video", ["memory=low"], "memory=minimal"),
        ("save", [], "memory=balanced"),
    ],
)
def test_what_is_to_be_typed_is_allowed_and_changes_something(
    compose, tmp_path, phase, settings, first
):
    config = compose(*settings)
    changes = out_of_memory.cheaper(config, phase)
    assert changes[0] == first
    own = [s for s in settings if not (first.startswith("memory=") and s.startswith("memory="))]
    changed = compose(*own, *first.split())
    assert (changed.memory, changed.train) != (config.memory, config.train)
    typed = next(line for line in said(phase, config, tmp_path) if "Type:" in line)
    assert typed.endswith(f"python launch.py --config-dir {tmp_path} --config-name config {first}")


def test_where_nothing_is_left_to_type_smaller_clips_are_named(compose, tmp_path):
    lines = said("train", compose("memory=minimal", "data.max_num_frames=49"), tmp_path)
    assert "Type:" not in "".join(lines) and "Try data.max_num_frames=25, then" in lines[1]
    streamed = compose("memory=balanced")
    assert "Try a card with more memory" in "".join(said("encode prompts", streamed, tmp_path))


def test_ram_is_told_apart_with_what_is_in_use(compose, tmp_path):
    def fail():
        raise MemoryError

    lines = said("encode clips", compose(), tmp_path, error=fail)
    assert lines[0] == (
        "this machine's memory (RAM) is too small for this: it ended while encoding clips "
        "(backward pass of step 9)."
    )
    assert "by this process" in lines[1] and "memory=low keeps less there" in lines[2]


def test_a_task_without_a_run_says_it_in_one_line_too(monkeypatch, capsys):
    for error in (MemoryError(), torch.OutOfMemoryError(TEXT)):
        monkeypatch.setattr(
            launch, "start_task", lambda *given, error=error: (_ for _ in ()).throw(error)
        )
        assert launch.entry(["task=list"]) == 2
        assert "is too small for this" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["held-out loss", "video"])
def test_an_evaluation_says_which_model_it_was(compose, monkeypatch, tmp_path, part):
    variants = [evaluate.Variant("base", None), evaluate.Variant("result", tmp_path)]
    model, now = SimpleNamespace(transformer=None), []

    def models(config, data, variants, ranks):
        for variant in variants:
            now[:] = [variant.name]
            yield variant, model

    def at_result(result):
        return lambda *given: no_memory() if now == ["result"] else result

    videos = at_result([]) if part == "video" else lambda *given: []
    loss = at_result(None) if part == "held-out loss" else lambda *given: None
    data = SimpleNamespace(
        pretrained=SimpleNamespace(device=torch.device("cpu")), held_out=[], held_out_batch=None
    )
    task = compose().task
    task.run = tmp_path
    config = dataclasses.replace(compose("memory=low"), task=task)
    monkeypatch.setattr(evaluate, "models", models)
    monkeypatch.setattr(evaluate, "heldout_loss", loss)
    monkeypatch.setattr(evaluate, "make_videos", videos)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        evaluate.measure_variants(config, data, variants, [], [], tmp_path, None)
    message = said_of_lack(raised.value, config, tmp_path)
    assert f"{out_of_memory.DOING_IN[part]} (of result)." in message
    assert f"python launch.py --config-dir {tmp_path} --config-name config memory=min" in message


def test_a_generated_video_says_which_one_it_was(compose, monkeypatch, tmp_path):
    model = SimpleNamespace(transformer=None)
    row = SimpleNamespace(
        path=lambda folder, variant: tmp_path / "001_seed42.mp4", start=SimpleNamespace(beside=None)
    )
    monkeypatch.setattr(
        gallery, "models", lambda *given: iter([(gallery.Variant("x", None), model)])
    )
    maker = SimpleNamespace(vae=lambda: object(), config=compose())
    monkeypatch.setattr(gallery, "VideoGenerator", lambda *given: maker)
    monkeypatch.setattr(gallery, "make_video", no_memory)
    data = SimpleNamespace(pretrained=None, embeds=None, images={})
    variants = [gallery.Variant("x", None)]
    with pytest.raises(torch.OutOfMemoryError) as raised:
        gallery.make_videos_not_there(None, data, variants, [row], tmp_path, None)
    assert "making a video (x 001_seed42)." in said_of_lack(raised.value, compose(), tmp_path)


def test_a_checkpoint_that_memory_does_not_suffice_for_is_not_called_a_full_disk(tmp_path):
    broken = SimpleNamespace(save=no_memory, optimizer_name=str)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoints.write_checkpoint(tmp_path, broken, 4, [], limit=None)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    broken.save = lambda folder: (_ for _ in ()).throw(OSError("No space left"))
    with pytest.raises(UserError, match="Free some space"):
        checkpoints.write_checkpoint(tmp_path, broken, 4, [], limit=None)


# -- what is freed -------------------------------------------------------------------------------


def working(kept: list) -> None:
    """Runs out of memory with a tensor in its hands."""
    held = torch.zeros(1000)
    kept.append(weakref.ref(held))
    no_memory(held)


def test_nothing_that_failed_stays_in_memory(tmp_path, compose):
    kept = []
    ranks = SimpleNamespace(logs=False)
    run = SimpleNamespace(step=4, ranks=ranks, metrics=None, config=compose(), folder=tmp_path)
    gc.disable()
    try:
        assert trainer.Trainer.unless_memory_ends(run, "videos", lambda: working(kept)) is None
        assert kept[0]() is None
    finally:
        gc.enable()
    with pytest.raises(ZeroDivisionError):
        trainer.Trainer.unless_memory_ends(run, "videos", lambda: 1 / 0)


def test_weights_come_back_only_after_what_failed_is_freed(monkeypatch):
    """Otherwise their own place would be taken, and a second error would leave half of them."""
    model, kept = torch.nn.Linear(4, 4).requires_grad_(False), []

    def back(tensor, device):
        assert kept[0]() is None
        return tensor

    monkeypatch.setattr(transfer, "to_device", back)
    with pytest.raises(torch.OutOfMemoryError), offload.offloaded(model, torch.device("cpu")):
        working(kept)


# -- one of several processes --------------------------------------------------------------------


@pytest.mark.parametrize("mine", [True, False])
def test_all_processes_learn_that_memory_ended_in_one(monkeypatch, compose, mine):
    """Otherwise the others would wait for it for ever."""
    elsewhere = pickle.loads(pickle.dumps(LackElsewhere(Lack.gpu, TEXT)))
    others = [(1, 250, 0, 0.5)] if mine else [elsewhere]
    monkeypatch.setattr(heldout, "gather_object", lambda own: [*own, *others])
    monkeypatch.setattr(
        heldout, "training_losses", no_memory if mine else lambda *given: (torch.ones(1), None)
    )
    model = SimpleNamespace(num_timesteps=1000, device=torch.device("cpu"))
    ranks, validation = SimpleNamespace(index=0, count=2), compose().validation
    with pytest.raises(LackElsewhere) as raised:
        heldout_loss(model, 2, lambda index: None, validation, ranks)
    assert out_of_memory.lack_of(raised.value) is Lack.gpu and str(raised.value) == TEXT


# -- whole runs ----------------------------------------------------------------------------------

SHORT = [
    "train.max_train_steps=6",
    "train.checkpointing_steps=2",
    "train.logging_steps=2",
    "validation.heldout_steps=2",
]
VIDEOS = [
    "validation.num_validation_videos=1",
    "validation.validation_prompt=a circle",
    "validation.num_inference_steps=2",
    "validation.validation_steps=2",
]


@pytest.fixture
def plant(monkeypatch):
    """plant((phase, place), ...): attention runs out of memory there."""
    now, real = [], torch.nn.functional.scaled_dot_product_attention
    phase_of = MemoryPeaks.phase

    @contextlib.contextmanager
    def phase(self, name, place=""):
        now.append((name, place))
        with phase_of(self, name, place):
            yield
        now.pop()

    def start(*where):
        def attention(*given, **settings):
            if now and now[-1] in where:
                now.pop()
                no_memory()
            return real(*given, **settings)

        monkeypatch.setattr(MemoryPeaks, "phase", phase)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)

    return start


def result(folder):
    lines = read_json_lines(folder / "metrics.jsonl")
    return lora.read_adapter(folder)[0], [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [[], ["memory=minimal", "train.ema_decay=0.9"]], ids=["fast", "streamed, averaged"]
)
def test_validation_without_memory_is_skipped_and_changes_no_bit(run, trained, plant, capsys, kind):
    whole = trained(*SHORT, *VIDEOS, *kind)
    plant(("video", "after step 2"), ("held-out loss", "after step 4"), ("video", "after step 6"))
    folder = run("a", *SHORT, *VIDEOS, *kind)
    (weights, losses), (expected, expected_losses) = result(folder), result(whole)
    assert lora.compare(weights, expected, values=True) == [] and losses == expected_losses
    summary = read_json(folder / "summary.json")
    assert (
        summary["status"] == "done"
        and summary["objective"] == read_json(whole / "summary.json")["objective"]
    )
    assert summary["skipped_validation"] == {"videos": [2, 6], "held-out loss": [4]}
    out = capsys.readouterr().out
    assert "warning videos of step 2 skipped, training goes on: the GPU's memory" in out
    assert f"task=generate task.run={folder} memory=low" in out
    assert "skipped held-out loss after step 4: memory ended" in out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Memory ended: no held-out loss after step" in page
    assert (folder / "validation/step_000004").is_dir()
    assert not (folder / "validation/step_000002/01_seed42.mp4").exists()


@pytest.mark.slow
def test_a_result_that_cannot_be_judged_says_so(run, plant, capsys):
    plant(("held-out loss", "after step 6"), ("video", "before the first step"))
    folder = run("a", *SHORT, *VIDEOS)
    summary, out = read_json(folder / "summary.json"), capsys.readouterr().out
    assert summary["status"] == "done" and summary["objective"] is None
    assert summary["skipped_validation"] == {"videos": [0], "held-out loss": [6]}
    assert "that of the result is not known" in out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "it is not known. The last one is that after step 4" in page and "After step 4" in page
    assert not list((folder / "validation").glob("step_*")), "nothing to stand beside"
    assert (
        json.loads((folder / "checkpoints/step_000006/manifest.json").read_text())["heldout_loss"]
        is None
    )


ENDS = {
    "encoding clips": (encode, "latent_moments", ["data.height=40", "data.width=40"]),
    "encoding prompts": (prompts, "hidden_states", ["data.id_token=QXZ"]),
    "computing the held-out loss (before the first step)": (heldout, "training_losses", []),
    "training (forward pass of step 1)": (trainer, "training_losses", []),
    "training (backward pass of step 1)": (Accelerator, "backward", []),
    "training (optimizer of step 1)": (torch.optim.AdamW, "step", []),
    "saving (a rehearsal before the first step)": (state.torch, "save", []),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ENDS)
def test_a_run_that_ends_says_where_and_how_to_go_on(run, monkeypatch, capsys, where):
    owner, name, settings = ENDS[where]
    monkeypatch.setattr(owner, name, no_memory)
    folder = run("a", *SHORT, *settings, expect=2)
    error = capsys.readouterr().err
    assert f"is too small for this: it ended while {where}." in error
    assert "Traceback" not in error and f"--config-dir {folder}" in error
    assert read_json(folder / "summary.json")["status"] == "out_of_memory"
