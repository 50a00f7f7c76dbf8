"""A checkpoint is whole or it is none."""

import json

import pytest
import torch

from cogvx.errors import UserError
from cogvx.model import lora
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.trained_weights import LoraWeights
from cogvx.options import optimizers
from cogvx.training import checkpoint as checkpoints
from cogvx.training.state import OPTIMIZER, TrainingState

LORA = lora.Lora(4, 2, ["to_q"], use_rslora=False, use_dora=False, init_from=None)
ADAMW = optimizers.AdamW(1e-3, 0.9, 0.95, 1e-8, 1e-2)


@pytest.fixture(scope="module")
def state(nano_folder):
    transformer = PretrainedModel(nano_folder, torch.device("cpu"), torch.float32).transformer()
    LORA.attach(transformer, seed=0)
    return state_of(transformer, torch.optim.AdamW(lora.trainable(transformer)))


def state_of(transformer, optimizer):
    weights = LoraWeights(LORA)
    return TrainingState(
        transformer, weights, lora.trainable(transformer), optimizer, ADAMW, None, None
    )


def test_the_oldest_go_only_after_the_newest_is_there(state, tmp_path):
    for step in (1, 2, 3, 4):
        checkpoints.write_checkpoint(tmp_path, state, step, [], limit=2)
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == [
        "step_000003",
        "step_000004",
    ]
    assert checkpoints.newest_checkpoint(tmp_path).name == "step_000004"


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(state, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(folder, **settings):
        if folder.is_dir():
            (folder / "optimizer.pt").unlink()
            raise Killed

    for step in (1, 2):
        checkpoints.write_checkpoint(tmp_path, state, step, [], limit=2)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoints.shutil, "rmtree", killed)
        checkpoints.write_checkpoint(tmp_path, state, 3, [], limit=2)
    newest = checkpoints.resume_source(None, tmp_path, print)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_000002", "step_000003"] and newest.name == "step_000003"


def test_no_limit_keeps_all(state, tmp_path):
    for step in (1, 2, 3):
        checkpoints.write_checkpoint(tmp_path, state, step, [], limit=None)
    assert len(checkpoints.complete_checkpoints(tmp_path)) == 3


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "it has no manifest.json": lambda newest: (newest / checkpoints.MANIFEST).unlink(),
    "its manifest.json cannot be read": lambda newest: (newest / checkpoints.MANIFEST).write_text(
        '{"step": 2, "fil'
    ),
    "pytorch_lora_weights.safetensors has 3 bytes instead of": lambda newest: (
        newest / lora.WEIGHTS
    ).write_bytes(b"123"),
    "optimizer.pt is missing": lambda newest: (newest / OPTIMIZER).unlink(),
    "the bytes of optimizer.pt are not those that were written": lambda newest: flip_a_bit(
        newest / OPTIMIZER
    ),
    "the bytes of pytorch_lora_weights.safetensors are not": lambda newest: flip_a_bit(
        newest / lora.WEIGHTS
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(state, tmp_path, damage):
    checkpoints.write_checkpoint(tmp_path, state, 1, [], limit=None)
    newest = checkpoints.write_checkpoint(tmp_path, state, 2, [], limit=None)
    DAMAGES[damage](newest)
    said = []
    assert checkpoints.newest_checkpoint(tmp_path, said.append).name == "step_000001"
    assert damage in said[0] and newest.is_dir(), "another run's folder is left as it is"
    assert checkpoints.resume_source(None, tmp_path, said.append).name == "step_000001"
    assert damage in said[1] and len(said) == 2
    # It is out of the way of the next checkpoint of this step.
    checkpoints.write_checkpoint(tmp_path, state, 2, [], limit=None)
    assert checkpoints.resume_source("auto", tmp_path, said.append).name == "step_000002"
    assert (tmp_path / "checkpoints" / "step_000002.damaged").is_dir()


def test_a_damaged_checkpoint_that_is_asked_for_by_name_is_refused(state, tmp_path):
    only = checkpoints.write_checkpoint(tmp_path, state, 1, [], limit=None)
    flip_a_bit(only / lora.WEIGHTS)
    with pytest.raises(UserError, match=r"is damaged: the bytes of pytorch_lora_weights"):
        checkpoints.newest_checkpoint(only)
    said = []
    assert checkpoints.resume_source(None, tmp_path, said.append) is None and len(said) == 1


def test_a_manifest_of_an_earlier_version_has_only_sizes(state, tmp_path):
    folder = checkpoints.write_checkpoint(tmp_path, state, 1, [], limit=None)
    manifest = checkpoints.read_manifest(folder)
    manifest["files"] = {name: facts["size"] for name, facts in manifest["files"].items()}
    (folder / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    assert checkpoints.newest_checkpoint(tmp_path) == folder
    (folder / lora.WEIGHTS).write_bytes(b"123")
    assert checkpoints.damage_of(folder).endswith(
        "has 3 bytes instead of " + str(manifest["files"][lora.WEIGHTS])
    )


def test_a_step_that_is_kept_is_not_written_again(state, tmp_path, monkeypatch):
    """A stop signal that comes while a checkpoint is written asks for the same one again."""
    folder = checkpoints.write_checkpoint(tmp_path, state, 3, [], limit=1)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *some, **more: pytest.fail("removed"))
    assert checkpoints.write_checkpoint(tmp_path, state, 3, [], limit=1) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_whole_checkpoint_that_only_lacks_its_name_gets_it(state, tmp_path):
    """A kill between the last byte and the new name loses nothing."""
    place = tmp_path / "checkpoints"
    for step in (1, 2):
        checkpoints.write_checkpoint(tmp_path, state, step, [], limit=None)
    (place / "step_000002").rename(place / "step_000002.partial")
    (place / "step_000003.partial").mkdir()
    (place / "step_000003.partial" / lora.WEIGHTS).write_bytes(b"half")
    (place / "rehearsal.partial").mkdir()
    assert checkpoints.resume_source(None, tmp_path, print).name == "step_000002"
    assert sorted(path.name for path in place.iterdir()) == ["step_000001", "step_000002"]


def test_a_folder_without_a_whole_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.newest_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    with pytest.raises(UserError, match="only step_000001, not complete"):
        checkpoints.newest_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        checkpoints.newest_checkpoint(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_older_checkpoint_and_says_how_to_go_on(
    state, tmp_path, monkeypatch
):
    checkpoints.write_checkpoint(tmp_path, state, 1, [], limit=1)
    monkeypatch.setattr(
        torch, "save", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match=r"No space left on device.*train.resume="):
        checkpoints.write_checkpoint(tmp_path, state, 2, [], limit=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_a_resumed_optimizer_has_the_settings_asked_for(state, tmp_path):
    folder = checkpoints.write_checkpoint(tmp_path, state, 3, [], limit=None)
    parameters = lora.trainable(state.transformer)
    other = state_of(
        state.transformer, torch.optim.AdamW(parameters, betas=(0.8, 0.9), weight_decay=0.5)
    )
    other.load(folder)
    assert checkpoints.read_manifest(folder)["step"] == 3
    assert (
        other.optimizer.param_groups[0]["betas"],
        other.optimizer.param_groups[0]["weight_decay"],
    ) == (
        (0.8, 0.9),
        0.5,
    )


def test_a_rehearsal_that_was_killed_does_not_stop_the_next(state, tmp_path):
    (tmp_path / "checkpoints" / "rehearsal.partial").mkdir(parents=True)
    checkpoints.rehearse(tmp_path, state, kept=1)


def test_the_rehearsal_leaves_nothing_and_finds_what_cannot_be_saved(state, tmp_path, monkeypatch):
    checkpoints.rehearse(tmp_path, state, kept=2)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    save = lora.save

    def save_without_alpha(transformer, folder):
        save(transformer, folder)
        tensors, _ = lora.read_adapter(folder)
        from safetensors.torch import save_file

        save_file(
            {f"transformer.{name}": tensor for name, tensor in tensors.items()},
            folder / lora.WEIGHTS,
        )

    monkeypatch.setattr(lora, "save", save_without_alpha)
    with pytest.raises(UserError, match="trained with lora_alpha=None, not 2"):
        checkpoints.rehearse(tmp_path, state, kept=2)


def test_the_rehearsal_looks_at_the_free_space(state, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(
        UserError, match=r"MiB free; 3 checkpoints of this run and its result need up to"
    ):
        checkpoints.rehearse(tmp_path, state, kept=3)


def test_a_resumed_run_does_not_need_the_space_twice(state, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    folder = checkpoints.write_checkpoint(tmp_path, state, 1, [], limit=None)
    weights = (folder / lora.WEIGHTS).stat().st_size
    # Two checkpoints of three times the weights, one more while it is written, the best one, and
    # the result: 13. With two of them on the disk: 7.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 9 * weights))
    with pytest.raises(UserError, match="MiB free; 2 checkpoints of this run"):
        checkpoints.rehearse(tmp_path, state, kept=2)
    checkpoints.write_checkpoint(tmp_path, state, 2, [], limit=None)
    checkpoints.rehearse(tmp_path, state, kept=2)


def test_the_manifest_names_step_and_files(state, tmp_path):
    manifest = json.loads(
        (
            checkpoints.write_checkpoint(tmp_path, state, 12, [], limit=None) / checkpoints.MANIFEST
        ).read_text()
    )
    assert manifest["step"] == 12 and set(manifest["files"]) == {
        lora.WEIGHTS,
        OPTIMIZER,
    }
