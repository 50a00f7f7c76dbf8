"""Encoding: clips read ahead and prompts in groups, beside one after the other.

python tests/benchmarks/encoding.py      5 minutes on 2 quiet cores; writes tests/golden/encoding.md

Both ways run in turn, several times, in one session. Every figure is a ratio of medians.
"Before" reads a clip, encodes it and only then reads the next one, and passes each prompt through
the whole text encoder. Nothing here has a GPU: there the VAE does not share the CPU with the
threads that read, and the copy of a block's weights is a transfer over the bus.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

PROJECT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(PROJECT)]

import numpy  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKLCogVideoX  # noqa: E402
from transformers import T5Config, T5EncoderModel  # noqa: E402

from cogvx.compose import compose_config  # noqa: E402
from cogvx.data import encode  # noqa: E402
from cogvx.data.cache import Cache  # noqa: E402
from cogvx.data.encode import Encoder, encode_clips, hidden_states  # noqa: E402
from cogvx.data.mp4 import write_video  # noqa: E402
from cogvx.data.sharing import Share  # noqa: E402
from cogvx.model import nano  # noqa: E402
from cogvx.model.pretrained import PretrainedModel, placed  # noqa: E402
from cogvx.progress import quiet_libraries  # noqa: E402

TABLE = PROJECT / "tests" / "golden" / "encoding.md"
CPU, ROUNDS, CLIPS, PROMPTS, TOKENS = torch.device("cpu"), 3, 4, 36, 226
FRAMES, HEIGHT, WIDTH = 49, 480, 720
SMALL = (96, 144)  # height and width for a VAE on the CPU


def one_after_the_other(self: Share, read: Callable) -> Iterator[tuple]:
    """In place of Share.read_ahead()."""
    while group := self.take_group(1):
        yield group[0], read(group[0])
        self.done(group[0])


def write_clips(folder: Path) -> None:
    """Each has content of its own: what is the same is encoded once."""
    size = (HEIGHT // 8, WIDTH // 8 + FRAMES, 3)
    for number in range(CLIPS):
        scene = numpy.random.default_rng(number).integers(0, 255, size, dtype=numpy.uint8)
        frames = [
            numpy.kron(scene[:, i : i + WIDTH // 8], numpy.ones((8, 8, 1), numpy.uint8))
            for i in range(FRAMES)
        ]
        write_video(folder / f"{number}.mp4", frames, fps=8)
    names = [f"{number}.mp4" for number in range(CLIPS)]
    (folder / "videos.txt").write_text("\n".join(names))
    (folder / "prompts.txt").write_text("\n".join(names))


class WaitingVae:
    """A VAE that computes elsewhere, as on a GPU: the CPU waits `seconds` for it."""

    def __init__(self, vae: AutoencoderKLCogVideoX, seconds: float):
        self.config, self.use_tiling, self.seconds = vae.config, False, seconds
        stride = 2 ** (len(vae.config.block_out_channels) - 1)
        shape = (1, 2 * vae.config.latent_channels, 1, HEIGHT // stride, WIDTH // stride)
        self.latent_dist = SimpleNamespace(parameters=torch.zeros(shape))

    def encode(self, pixels: torch.Tensor) -> WaitingVae:
        time.sleep(self.seconds)
        return self


def seconds_of_clips(folder: Path, vae: object, size: tuple[int, int]) -> float:
    size = [f"data.height={size[0]}", f"data.width={size[1]}", f"data.max_num_frames={FRAMES}"]
    data = compose_config([f"data.instance_data_root='{folder}'", "data.fps=8", *size]).data
    examples = data.read()
    with tempfile.TemporaryDirectory() as scratch:
        encoder = Encoder(lambda: vae, "benchmark", torch.float32, CPU)
        cache, started = Cache(Path(scratch)), time.monotonic()
        encoded, _ = encode_clips(examples, data, cache, encoder, lambda text: None)
        assert len(encoded) == CLIPS
        return time.monotonic() - started


def clips_before_and_now(
    folder: Path, vae: object, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> tuple[float, float]:
    before, now, read_ahead = [], [], Share.read_ahead
    for _ in range(ROUNDS):
        Share.read_ahead = one_after_the_other
        before.append(seconds_of_clips(folder, vae, size))
        Share.read_ahead = read_ahead
        now.append(seconds_of_clips(folder, vae, size))
    return statistics.median(before), statistics.median(now)


def streamed_t5(width: int, layers: int) -> T5EncoderModel:
    sizes = {"d_model": width, "d_kv": 64, "d_ff": 2 * width, "num_heads": width // 64}
    settings = T5Config(num_layers=layers, feed_forward_proj="gated-gelu", **sizes)
    model = T5EncoderModel(settings).eval().requires_grad_(False)
    return placed(model, CPU, streamed=True)


def prompts_before_and_now(model: T5EncoderModel, bus: float) -> tuple[float, float]:
    """bus: seconds that the copy of a block takes, in which nothing is computed."""
    ids = torch.randint(0, model.config.vocab_size, (PROMPTS, TOKENS))
    for block in model.encoder.block:
        block.register_forward_pre_hook(lambda *given: time.sleep(bus))
    before, now = [], []
    for _ in range(ROUNDS):
        started = time.monotonic()
        alone = torch.cat([hidden_states(model, row[None]) for row in ids])
        before.append(time.monotonic() - started)
        started = time.monotonic()
        together = hidden_states(model, ids)
        now.append(time.monotonic() - started)
        assert torch.equal(alone, together)
    return statistics.median(before), statistics.median(now)


def row(name: str, count: int, before: float, now: float) -> str:
    return f"| {name} | {count / before:.2f} | {count / now:.2f} | {before / now:.2f} |"


def lines() -> Iterator[str]:
    yield "# Encoding, before and now"
    yield ""
    yield f"Clips are mp4 files of {FRAMES} frames at {HEIGHT}x{WIDTH}. Medians of {ROUNDS} rounds"
    yield "in one session on 2 CPU cores. Made by `python tests/benchmarks/encoding.py`."
    yield ""
    yield "| clips | before, clips/s | now, clips/s | now / before |"
    yield "|---|---|---|---|"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "clips"
        write_clips(folder)
        nano_folder = nano.write_nano(Path(scratch) / "nano")
        vae = PretrainedModel(nano_folder, CPU, torch.float32).vae(tiling=False)
        name = f"nano's VAE on the same cores, at {SMALL[0]}x{SMALL[1]}"
        yield row(name, CLIPS, *clips_before_and_now(folder, vae, SMALL))
        reading = seconds_of_clips(folder, WaitingVae(vae, 0.0), (HEIGHT, WIDTH)) / CLIPS
        for times in (1, 2):
            there = WaitingVae(vae, times * reading)
            name = f"a VAE elsewhere that takes {times} times as long as reading a clip"
            yield row(name, CLIPS, *clips_before_and_now(folder, there))
    yield ""
    yield "| prompts, streamed text encoder | before, prompts/s | now, prompts/s | now / before |"
    yield "|---|---|---|---|"
    model = streamed_t5(width=256, layers=4)
    yield row("weights are here", PROMPTS, *prompts_before_and_now(model, 0.0))
    for factor in (1, 10):
        # A block of T5-XXL: 0.36 GiB, 15 ms at 25 GB/s; about 1 ms to compute for one prompt.
        model = streamed_t5(width=256, layers=4)
        took = prompts_before_and_now(model, 0.0)[1] / PROMPTS / 4
        name = f"the copy of a block takes {factor} times a prompt's computation"
        yield row(name, PROMPTS, *prompts_before_and_now(model, factor * took))
    yield ""
    yield f"Most prompts at once with T5-XXL in bf16: {encode.HIDDEN_BYTES // (TOKENS * 4096 * 2)}."


if __name__ == "__main__":
    quiet_libraries()
    TABLE.write_text("\n".join(lines()) + "\n", encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))
