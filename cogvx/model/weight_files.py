"""Files of weights that others wrote: which file of a folder, and the tensors in it.

Files of torch are read with weights_only=True alone, so no code in a file is ever run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.errors import UserError, first_line
from cogvx.files import LFS_POINTER

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name diffusers looks for in a folder
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# What trainers save beside the weights.
NOT_WEIGHTS = re.compile(r"^(optimizer|scheduler|scaler|sampler|random_states|training_args)")
# DeepSpeed's and SAT's file of the whole model, when nothing is divided over GPUs.
DEEPSPEED = "mp_rank_00_model_states.pt"


def weight_files(place: Path) -> list[Path]:
    """The file of a LoRA or of a model, or the files that a model is divided into.

    place: a file, or a folder. UserError if there is none, or if it is not clear which.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"{place} does not exist: give a file of weights, or the folder it is in")
    for folder in (place, place / "transformer"):
        for found in (folder / WEIGHTS, *deepspeed_files(folder)):
            if found.is_file():
                return [found]
        for index in sorted(folder.glob("*.index.json")):
            return indexed_files(index)
    folder = place / "transformer" if (place / "transformer").is_dir() else place
    return [only_candidate(folder)]


def deepspeed_files(folder: Path) -> list[Path]:
    """Where DeepSpeed and SAT put a checkpoint: in a folder that `latest` names, or here.

    UserError for ZeRO-3, which divides each tensor over the GPUs.
    """
    latest = folder / "latest"
    tag = "pytorch_model"
    if latest.is_file():
        tag = latest.read_bytes()[:255].decode("utf-8", errors="replace").strip()
    places = [folder / Path(tag).name, folder]
    divided = next((p for p in places if any(p.glob("zero_pp_rank_*_model_states.pt"))), None)
    if divided is not None:
        raise UserError(
            f"{divided} is a checkpoint of DeepSpeed ZeRO-3: each tensor is divided over the "
            f"GPUs. Join them with the script that DeepSpeed left there, and give the result: "
            f"python zero_to_fp32.py {folder} JOINED"
        )
    return [p / DEEPSPEED for p in places]


def indexed_files(index: Path) -> list[Path]:
    """The files that the index of a divided model names. UserError if one is missing."""
    try:
        names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is not the index of a divided model: {error!r}") from error
    if paths := [name for name in names if Path(str(name)).name != name]:
        raise UserError(f"{index} names {paths[0]!r}, and not a file beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent} lacks {missing[0]}, which {index.name} names "
            f"({len(missing)} of {len(names)} files are missing): download them again"
        )
    return [index.parent / name for name in names]


def only_candidate(folder: Path) -> Path:
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in ENDINGS and not NOT_WEIGHTS.match(path.name) and path.is_file()
    ]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"{folder} holds {len(found)} files of weights ({names}): give one of them, "
            f"such as {found[0]}"
        )
    if any(folder.glob("*.distcp")):
        raise UserError(
            f"{folder} is a distributed checkpoint of torch. Join it, and give the result: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} joined.pt"
        )
    below = sorted(path.parent for path in folder.rglob("*") if path.name in (WEIGHTS, DEEPSPEED))
    hint = f": give one of the folders in it, such as {below[-1]}" if below else ""
    raise UserError(f"{folder} holds no file of weights ({', '.join(ENDINGS)}){hint}")


# -- the tensors of a file -----------------------------------------------------------------------


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors by name, on the CPU, and the metadata of a safetensors file.

    They stay in the file until they are used. UserError says why a file cannot be read.
    """
    head = require_weights(path)
    try:
        # A safetensors file begins with the length of its header, then the header as JSON.
        if head[8:9] == b"{":
            return read_safetensors(path)
        return only_tensors(path, read_torch(path)), {}
    except UserError:
        raise
    # Damaged files raise errors of many kinds.
    except Exception as error:
        # torch would advise to load the file without its protection from foreign code.
        reason = "it is none" if "Weights only load" in str(error) else first_line(error)
        raise UserError(
            f"{path} cannot be read as weights: {reason.rstrip('.')}. Is it complete? It "
            f"has {path.stat().st_size:,} bytes"
        ) from error


def require_weights(path: Path) -> bytes:
    """The first bytes of a file. UserError if they are not those of weights."""
    head = head_of(path)
    if head.startswith(LFS_POINTER):
        raise UserError(
            f"{path} is a pointer of git LFS, not the weights: git lfs pull fetches them, or "
            f"hf download"
        )
    if not head.strip(b"\0"):
        raise UserError(f"{path} is empty: download or copy it again")
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise UserError(f"{path} is a web page, not weights: download the file itself")
    return head


def head_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def read_torch(path: Path) -> object:
    """What torch.save() wrote. UserError if more than tensors and numbers is needed for it."""
    import pickle
    import zipfile

    import torch

    how = {"map_location": "cpu", "weights_only": True, "mmap": zipfile.is_zipfile(path)}
    try:
        with torch.serialization.safe_globals(numpy_arrays()):
            return torch.load(path, **how)
    except pickle.UnpicklingError as error:
        lacking = re.search(r"GLOBAL (\S+)", str(error))
        if lacking is None:
            raise
        raise UserError(
            f"{path} holds more than tensors: reading it would run {lacking[1]}, and a file could "
            f"run anything that way. If you trust it, open it yourself with torch.load(..., "
            f"weights_only=False), and save its tensors as a .safetensors file"
        ) from error


def numpy_arrays() -> list:
    """What numpy's arrays of numbers need. SAT stores the state of numpy's random numbers."""
    import numpy
    from numpy._core.multiarray import _reconstruct

    dtypes = [type(numpy.dtype(name)) for name in ("uint32", "int64", "float64")]
    old = (_reconstruct, "numpy.core.multiarray._reconstruct")
    return [_reconstruct, old, numpy.ndarray, numpy.dtype, *dtypes]


def only_tensors(path: Path, loaded: object) -> dict[str, Tensor]:
    """The tensors of a model's state, which DeepSpeed, CogKit and others put into larger dicts."""
    import torch

    for name in ("app", "module", "model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    tensors = loaded if isinstance(loaded, dict) else {}
    tensors = {str(key): value for key, value in tensors.items() if torch.is_tensor(value)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name, so it is no LoRA and no model")
    return tensors
