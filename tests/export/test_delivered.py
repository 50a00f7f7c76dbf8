"""What a run delivers is on the disk before anything says that the run is done."""

from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from cogvx.export import result
from cogvx.model.nano import NANO


def written_to(name: str, monkeypatch, folder: Path, config) -> list[str]:
    """What was on the disk, in this order, after weights of this name were delivered."""
    flushed = []

    def save_result(transformer, place, dtype):
        for path in [place / name] if "." in name else [place / name / "a", place / name / "b"]:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"weights")

    monkeypatch.setattr(result, "flush_to_disk", lambda path: flushed.append(path))
    weights = SimpleNamespace(result=name, save_result=save_result, inference_settings=dict)
    base = SimpleNamespace(
        dtype=torch.float32, geometry=lambda: NANO.geometry, hub_commit=lambda: None
    )
    image = numpy.zeros((8, 8, 3), numpy.uint8)
    result.deliver(folder, None, weights, config, "a circle", image, base)
    return [str(path.relative_to(folder)) for path in flushed]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("lora.safetensors", ["lora.safetensors"]),
        ("transformer", ["transformer", "transformer/a", "transformer/b"]),
    ],
)
def test_every_file_of_the_result_is_on_the_disk(compose, tmp_path, monkeypatch, name, files):
    flushed = written_to(name, monkeypatch, tmp_path, compose())
    assert sorted(flushed[:-1]) == sorted([*files, "first_frame.png", "inference.json"])
    assert flushed[-1] == ".", "the folder's names come last"
