"""What is traded for GPU memory. The values of each mode: conf/memory/. Explained in fast.yaml."""

import importlib.util
from dataclasses import dataclass
from enum import Enum

from cogvx.errors import lacking


class Recompute(Enum):
    """What gradient checkpointing computes again in the backward pass."""

    full = "full"
    selective = "selective"  # everything except the attention


class Storage(Enum):
    """How the blocks' frozen weights are stored. They are computed with in the run's precision."""

    own = "own"
    fp8 = "fp8"
    int8 = "int8"
    nf4 = "nf4"


@dataclass
class Memory:
    gradient_checkpointing: bool
    vae_tiling: bool
    recompute: Recompute
    offload_activations: bool
    base_storage: Storage
    stream_weights: bool
    stream_text_encoder: bool
    feed_forward_chunks: int
    frugal_videos: bool
    offload_optimizer: bool
    step_in_backward: bool

    def problems(self) -> list[str]:
        found = []
        if self.feed_forward_chunks < 1:
            found.append(
                f"memory.feed_forward_chunks={self.feed_forward_chunks}: must be 1 (whole) or more"
            )
        if self.base_storage is Storage.nf4:
            found += lacking("bitsandbytes", "memory.base_storage=nf4")
        if self.base_storage is Storage.nf4 and importlib.util.find_spec("bitsandbytes") is None:
            found.append(
                "memory.base_storage=nf4 needs the package bitsandbytes, which is not installed: "
                "pip install bitsandbytes; without it: memory.base_storage=int8"
            )
        return found
