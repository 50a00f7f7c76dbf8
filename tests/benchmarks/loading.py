"""The RAM that loading takes in a real process, and its seconds, at full size with random weights.

python tests/benchmarks/loading.py [2b] [5b] [t5]      minutes; 24 GB of disk, 14 GB of RAM for 5b
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent.parent)]

import torch  # noqa: E402

from cogvx.progress import quiet_libraries  # noqa: E402

quiet_libraries()

from cogvx.compose import compose_config  # noqa: E402
from cogvx.data.cache import Cache  # noqa: E402
from cogvx.model import blocks, released, transfer  # noqa: E402
from cogvx.model.pretrained import PretrainedModel  # noqa: E402
from cogvx.model.trained_weights import weights_of  # noqa: E402

GIB, CPU = 2**30, torch.device("cpu")
SHARD = 10 * 10**9  # bytes in a file, as diffusers saves; T5's files are half as large
# Model, memory mode, and whether the device is another one than the CPU.
ROWS = {
    "2b": [
        ("2b", "memory=balanced", True),
        ("2b", "memory=low", False),
        ("2b", "memory=low", False),
        ("2b", "memory=minimal", False),
    ],
    "5b": [("5b", "memory=balanced", True), ("5b", "memory=minimal", False)],
    "t5": [("t5", "memory=minimal", False)],
}


# -- weights of the real sizes ---------------------------------------------------------------------


def write_random_model(folder: Path, name: str) -> None:
    """The part that a row loads, in the files' own layout."""
    if name == "t5":
        from transformers import T5Config, T5EncoderModel

        settings = T5Config(**released.T5_XXL)
        with torch.device("meta"):
            model = T5EncoderModel(settings)
        settings.save_pretrained(folder / "text_encoder")
        write_shards(model, folder / "text_encoder", "model", torch.bfloat16, SHARD // 2)
        return
    from diffusers import CogVideoXTransformer3DModel

    settings, _, _, stored = released.RELEASED[name]
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**settings)
    model.save_config(folder / "transformer")
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[stored]
    write_shards(model, folder / "transformer", "diffusion_pytorch_model", dtype, SHARD)


def write_shards(
    model: torch.nn.Module, folder: Path, stem: str, dtype: torch.dtype, most: int
) -> None:
    shards, size = [[]], 0
    for name, parameter in model.named_parameters():
        if size + 2 * parameter.numel() > most:
            shards.append([])
            size = 0
        size += 2 * parameter.numel()
        shards[-1].append((name, parameter.shape))
    noise = (0.02 * torch.randn(2**24, generator=torch.Generator().manual_seed(0))).to(dtype)
    files = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = f"{stem}.safetensors"
        sizes = dict(shard)
        files |= dict.fromkeys(sizes, file)
        # A file in RAM would be as large as the shard: the header first, then weight after weight.
        header, start = {}, 0
        for name, shape in sizes.items():
            end = start + 2 * shape.numel()
            kind = "F16" if dtype is torch.float16 else "BF16"
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for shape in sizes.values():
                left = shape.numel()
                while left:
                    part = noise[: min(left, len(noise))]
                    out.write(part.view(torch.uint8).numpy().data)
                    left -= len(part)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": files}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


# -- one load, in a process of its own -------------------------------------------------------------


def resident() -> dict[str, float]:
    """The process's RAM in GiB: its own, the pages of files, and what it shares."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {
        kind: int(values[kind].split()[0]) / 2**20 for kind in ("RssAnon", "RssFile", "RssShmem")
    }


class Watched(threading.Thread):
    """The most RAM of each kind, seen every 10 ms, above what the process had at the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before, self.most, self.ended = resident(), resident(), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.01):
            self.most = {kind: max(size, self.most[kind]) for kind, size in resident().items()}

    def more(self) -> dict[str, float]:
        self.ended.set()
        self.join()
        return {kind: size - self.before[kind] for kind, size in self.most.items()}


def gone(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As a copy to another device: all of the tensor is read, and nothing stays in RAM."""
    tensor.clone()
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def load(folder: Path, model: str, mode: str, elsewhere: bool) -> dict[str, float]:
    config = compose_config([f"model={'5b' if model == 't5' else model}", mode])
    if elsewhere:
        transfer.to_device = gone
    base = PretrainedModel(folder, CPU, torch.bfloat16, cache=Cache(folder / "cache"))
    import_what_loading_needs()
    watched, started = Watched(), time.monotonic()
    watched.start()
    if model == "t5":
        from transformers import T5EncoderModel

        from cogvx.model.pretrained import placed

        encoder = base.loaded(T5EncoderModel, "text_encoder", dtype=base.dtype)
        held = placed(encoder, CPU, True)
    else:
        held = weights_of(config.lora).attach(base, seed=0)
        blocks.arrange(held, config.memory, recompute=True, device=CPU)
    seconds = time.monotonic() - started
    del held
    return watched.more() | {"seconds": seconds}


def import_what_loading_needs() -> None:
    import diffusers
    import peft
    from transformers import T5EncoderModel

    assert diffusers.CogVideoXTransformer3DModel and peft.LoraConfig and T5EncoderModel


# -- what the plan says ----------------------------------------------------------------------------


def planned(model: str, mode: str) -> float:
    """GiB of RAM that the plan counts for this part's weights."""
    from cogvx.plan.phases import run_phases

    config = compose_config([f"model={'5b' if model == 't5' else model}", mode])
    phase = "encode prompts" if model == "t5" else "load"
    return run_phases(config, [phase]).most[True] / GIB


def in_a_process(*arguments: object) -> dict | float:
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def line(folder: Path, model: str, mode: str, elsewhere: bool) -> str:
    found = in_a_process("--load", folder, model, mode, int(elsewhere))
    own, file, shared = (found[kind] for kind in ("RssAnon", "RssFile", "RssShmem"))
    plan = in_a_process("--plan", model, mode)
    place = "another" if elsewhere else "the CPU"
    return (
        f"| {model} | `{mode}` | {place} | {plan:.2f} | **{own + shared:.2f}** | {file:.2f} "
        f"| {found['seconds']:.0f} |"
    )


HEAD = """# RAM while loading

A real process loads random weights of the real sizes from the released files' layout (5b and T5 in
two files), in bf16; 2b's files are fp16. `minimal` keeps the blocks in RAM, `low` as int8. GiB
above what the process had before. Own: the highest RssAnon + RssShmem. Files: the highest RssFile;
these pages are the files', and given up as soon as RAM is short. `another` device is simulated:
each weight is read, and leaves RAM. The second line of `low` is the second start, from the cache.
Made by `python tests/benchmarks/loading.py` on 2 cores.

| part | memory | device | planned | own | files | seconds |
|---|---|---|---|---|---|---|"""


def main(models: list[str]) -> None:
    print(HEAD)
    for model in models or list(ROWS):
        folder = Path(tempfile.mkdtemp(prefix="cogvx_loading_"))
        try:
            write_random_model(folder, model)
            for row in ROWS[model]:
                print(line(folder, *row), flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        _, _, folder, model, mode, elsewhere = sys.argv
        found = load(Path(folder), model, mode, elsewhere == "1")
        print(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)
    elif sys.argv[1:2] == ["--plan"]:
        print(planned(sys.argv[2], sys.argv[3]))
    else:
        main(sys.argv[1:])
