"""Seconds to quantise the 5B's blocks on the CPU, and to take them from the cache instead.

python tests/benchmarks/quantising.py       a minute; one block of random weights, times 42
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent.parent)]

import torch  # noqa: E402

from cogvx.progress import quiet_libraries  # noqa: E402

quiet_libraries()

from cogvx.model import kept, stored  # noqa: E402
from cogvx.model.released import RELEASED  # noqa: E402
from cogvx.options.memory import Storage  # noqa: E402

LAYERS = RELEASED["5b"][0]["num_layers"]


def random_block() -> list[torch.nn.Parameter]:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    with torch.device("meta"):
        block = CogVideoXBlock(3072, 48, 64, 512, attention_bias=True)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter((0.02 * torch.randn(p.shape, generator=generator)).bfloat16(), False)
        for p in block.parameters()
    ]


def seconds(run: Callable[[], object]) -> float:
    """The shortest of three."""
    found = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return LAYERS * min(found)


def line(storage: Storage, block: list[torch.nn.Parameter], folder: Path) -> str:
    store = kept.BlockStore(None, storage, torch.device("cpu"), streamed=False)
    in_parts, stored.AT_ONCE_ON_CPU = stored.AT_ONCE_ON_CPU, 2**40
    whole = seconds(lambda: store(block))
    stored.AT_ONCE_ON_CPU = in_parts
    parts = seconds(lambda: store(block))
    names, path = [str(number) for number in range(len(block))], folder / f"{storage.value}"
    store.keep(path, dict(zip(names, store(block), strict=True)))

    def again() -> None:
        for form in store.found(path, names, block):
            form.moved(torch.Tensor.clone)

    size = LAYERS * path.stat().st_size / 1e9
    return f"| {storage.value} | {whole:.0f} | {parts:.0f} | {seconds(again):.1f} | {size:.1f} |"


HEAD = """# Quantising the blocks of 5B on a CPU

Seconds, from one block of random weights, times 42. "Whole weights" is how it was done before.
Made by `python tests/benchmarks/quantising.py > tests/golden/quantising.md` on 2 cores.

| form | whole weights | in parts | from the cache, read before | GB there |
|---|---|---|---|---|"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    block = random_block()
    print(HEAD)
    with tempfile.TemporaryDirectory() as scratch:
        for storage in (Storage.fp8, Storage.int8, Storage.nf4):
            print(line(storage, block, Path(scratch)), flush=True)
