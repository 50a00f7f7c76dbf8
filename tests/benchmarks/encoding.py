"""Encoding: speed, memory, and how soon a set is ready that is in the cache already.

python tests/benchmarks/encoding.py     15 minutes on 2 quiet cores; writes tests/golden/encoding.md
python tests/benchmarks/encoding.py CHECKOUT     also beside the code of an earlier commit

Ways run in turn, several times, in one session. Every ratio is one of medians. "One after the
other" reads a clip, encodes it and only then reads the next one, and passes each prompt through the
whole text encoder. Nothing here has a GPU: there the VAE does not share the CPU with the processes
that read, and the copy of a block's weights is a transfer over the bus.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

PROJECT = Path(__file__).parent.parent.parent
# Of the code that is measured.
CHECKOUT = "COGVX_BENCHMARK_CHECKOUT"
sys.path[:0] = [os.environ.get(CHECKOUT, str(PROJECT))]

import numpy  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKLCogVideoX  # noqa: E402
from transformers import T5Config, T5EncoderModel  # noqa: E402

from cogvx.compose import compose_config  # noqa: E402
from cogvx.data import encode  # noqa: E402
from cogvx.data.cache import Cache, content_key  # noqa: E402
from cogvx.data.encode import Encoder, encode_clips  # noqa: E402
from cogvx.data.mp4 import write_video  # noqa: E402
from cogvx.data.prompts import HIDDEN_BYTES, encode_prompts, hidden_states  # noqa: E402
from cogvx.data.sharing import Share  # noqa: E402
from cogvx.model import nano  # noqa: E402
from cogvx.model.pretrained import PretrainedModel, placed  # noqa: E402
from cogvx.progress import quiet_libraries  # noqa: E402

TABLE = PROJECT / "tests" / "golden" / "encoding.md"
CPU, ROUNDS, CLIPS, PROMPTS, TOKENS = torch.device("cpu"), 3, 4, 36, 226
FRAMES, HEIGHT, WIDTH = 49, 480, 720
SIZE = (HEIGHT, WIDTH)
SMALL = (32, 48)  # height and width for a VAE on the CPU
MEDIUM = (240, 360)  # of 200 clips


def one_after_the_other(self: Share, read: Callable) -> Iterator[tuple]:
    """In place of Share.read_ahead()."""
    while group := self.take_group(1):
        yield group[0], read(group[0])
        self.finish_writing()


def write_clips(
    folder: Path, count: int = CLIPS, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH
) -> None:
    """Each has content of its own: what is the same is encoded once."""
    size = (height // 8, width // 8 + frames, 3)
    for number in range(count):
        scene = numpy.random.default_rng(number).integers(0, 255, size, dtype=numpy.uint8)
        pictures = [
            numpy.kron(scene[:, i : i + width // 8], numpy.ones((8, 8, 1), numpy.uint8))
            for i in range(frames)
        ]
        write_video(folder / f"{number:06}.mp4", pictures, fps=8)
    write_lists(folder, count)


def write_lists(folder: Path, count: int) -> None:
    names = [f"{number:06}.mp4" for number in range(count)]
    prompts = [f"Clip {number}: a rabbit hops over a meadow at dusk." for number in range(count)]
    (folder / "videos.txt").write_text("\n".join(names))
    (folder / "prompts.txt").write_text("\n".join(prompts))


class WaitingVae:
    """A VAE that computes elsewhere, as on a GPU: the CPU waits `seconds` for it."""

    def __init__(self, vae: AutoencoderKLCogVideoX, seconds: float):
        self.config, self.use_tiling, self.seconds = vae.config, False, seconds

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        time.sleep(self.seconds)
        stride = 2 ** (len(self.config.block_out_channels) - 1)
        size = [side // stride for side in pixels.shape[-2:]]
        moments = torch.zeros(1, 2 * self.config.latent_channels, 1, *size)
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=moments))


def seconds_of_clips(folder: Path, vae: object, size: tuple[int, int]) -> float:
    size = [f"data.height={size[0]}", f"data.width={size[1]}", f"data.max_num_frames={FRAMES}"]
    data = compose_config([f"data.instance_data_root='{folder}'", "data.fps=8", *size]).data
    examples = data.read()
    with tempfile.TemporaryDirectory() as scratch:
        encoder = Encoder(lambda: vae, "benchmark", torch.float32, CPU)
        cache, started = Cache(Path(scratch)), time.monotonic()
        encoded, _ = encode_clips(examples, data, cache, encoder, lambda text: None)
        assert len(encoded) == len(examples)
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


# -- each in a process of its own ----------------------------------------------------------------


def measured(*words: object, checkout: Path = PROJECT) -> list[float]:
    """The numbers that this file prints with these words, run with the code of a checkout."""
    command = [sys.executable, __file__, *map(str, words)]
    settings = {"capture_output": True, "text": True, "check": True}
    ran = subprocess.run(command, env={**os.environ, CHECKOUT: str(checkout)}, **settings)
    return [float(number) for number in ran.stdout.split("measured")[-1].split()]


def waiting_vae(folder: Path, seconds: float) -> WaitingVae:
    return WaitingVae(PretrainedModel(folder, CPU, torch.float32).vae(tiling=False), seconds)


def rate(clips: str, nano_folder: str, seconds: str) -> list[float]:
    """Seconds to encode all clips with a VAE elsewhere that takes so long for each."""
    return [seconds_of_clips(Path(clips), waiting_vae(Path(nano_folder), float(seconds)), SIZE)]


def memory(clips: str, nano_folder: str, count: str) -> list[float]:
    """MiB at most in this process, and in one that decodes, while so many clips are encoded."""
    clips, few = Path(clips), Path(clips).with_name(f"first_{count}")
    few.mkdir()
    for number in range(int(count)):
        os.link(clips / f"{number:06}.mp4", few / f"{number:06}.mp4")
    write_lists(few, int(count))
    seconds_of_clips(few, waiting_vae(Path(nano_folder), 0.0), MEDIUM)
    from cogvx.data.decoders import IDLE

    return [peak_of("self"), max(peak_of(decoder.process.pid) for decoder in IDLE)]


def peak_of(process: int | str) -> float:
    """MiB."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def start(folder: str) -> list[float]:
    """Seconds until all clips and prompts, which are in the cache, are ready: in parts."""
    from cogvx.data.encode import cache_of
    from cogvx.data.split import split_of
    from cogvx.training.prepare import fingerprint_of

    data, encoders = known_set(Path(folder))
    times = [time.monotonic()]
    examples = data.read()
    times.append(time.monotonic())
    cache = cache_of(data)
    cache.look_at(example.video for example in examples)
    times.append(time.monotonic())
    clips, _ = encode_clips(examples, data, cache, encoders[0], lambda text: None)
    times.append(time.monotonic())
    encode_prompts(prompts_of(examples), cache, encoders[1], TOKENS, lambda text: None)
    times.append(time.monotonic())
    split_of(clips, data, cache)
    content_key([fingerprint_of(clip.example, cache) for clip in clips])
    times.append(time.monotonic())
    return [after - before for before, after in itertools.pairwise(times)]


MODES = {"rate": rate, "memory": memory, "start": start}


# -- a set that is in the cache ------------------------------------------------------------------


def known_set(folder: Path) -> tuple[object, list[Encoder]]:
    settings = [f"data.instance_data_root='{folder}'", f"data.cache_dir='{folder}/cache'"]
    encoders = [Encoder(refuse, name, torch.float32, CPU) for name in ("VAE", "text encoder")]
    return compose_config([*settings, "model=2b"]).data, encoders


def refuse() -> None:
    raise AssertionError("everything is in the cache")


def prompts_of(examples: list) -> list[str]:
    return ["", *(example.prompt for example in examples)]


def write_known_set(folder: Path, count: int) -> None:
    """Files that stand for clips, and entries of the cache for them: small, and mostly links."""
    from cogvx.data.encode import cache_of, files_of

    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06}.mp4").write_text(f"clip {number}")
    write_lists(folder, count)
    data, (vae, text) = known_set(folder)
    cache, examples = cache_of(data), data.read()
    cache.look_at(example.video for example in examples)
    facts = {"frames": 49, "first_frame": 0, "last_frame": 48, "repeated": 0, "file_frames": 81}
    facts |= {"file_fps": 8.0, "file_width": 720, "file_height": 480, "treatment": ""}
    names = [(f"{number:05}" * 77)[:384] for number in range(count)]
    latents = {"latent_moments": torch.zeros(1, 1, 1, 1), "thumbnails": torch.zeros(3, 1, 1, 3)}
    for example, look in zip(examples, names, strict=True):
        [path] = files_of(example, data, cache, vae).values()
        enter(cache, path, latents, {**facts, "look": look})
    known = {"tokens": 14, "cut_off": "", "unknown": []}
    for prompt in prompts_of(examples):
        key = content_key(encode.VERSION, prompt, text.identity, str(text.dtype), TOKENS)
        enter(cache, cache.path("prompts", key), {"prompt_embeds": torch.zeros(1, 1)}, known)


LINKED: dict[str, Path] = {}


def enter(cache: Cache, path: Path, tensors: dict, about: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(LINKED[path.parts[-3]], path)
    # A file can have so many links and no more.
    except (KeyError, OSError):
        cache.write(path, tensors, about)
        LINKED[path.parts[-3]] = path
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    cache.keep_about(path, os.stat(path), {**about, "shapes": shapes})


# -- prompts -------------------------------------------------------------------------------------


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


def lines_of_clips(clips: Path, nano_folder: Path, earlier: Path | None) -> Iterator[str]:
    yield "| clips | one after the other, clips/s | now, clips/s | now / one after the other |"
    yield "|---|---|---|---|"
    vae = PretrainedModel(nano_folder, CPU, torch.float32).vae(tiling=False)
    name = f"nano's VAE on the same cores, at {SMALL[0]}x{SMALL[1]}"
    yield row(name, CLIPS, *clips_before_and_now(clips, vae, SMALL))
    reading = seconds_of_clips(clips, WaitingVae(vae, 0.0), SIZE) / CLIPS
    for times in (1, 2):
        there = WaitingVae(vae, times * reading)
        name = f"a VAE elsewhere that takes {times} times as long as reading a clip"
        yield row(name, CLIPS, *clips_before_and_now(clips, there))
    yield ""
    yield "Encoding beside decoding alone (a VAE elsewhere that takes no time), clips/s:"
    yield ""
    heads = ("a VAE elsewhere takes", "now", "decoding alone", "now / alone")
    yield f"| {' | '.join(heads)} | earlier code | now / earlier |"
    yield "|---|---|---|---|---|---|"
    for times in (0.5, 1):
        yield beside_decoding(clips, nano_folder, times * reading, times, earlier)


def beside_decoding(
    clips: Path, nano_folder: Path, seconds: float, times: float, earlier: Path | None
) -> str:
    now, alone, before = [], [], []
    for _ in range(ROUNDS):
        now += measured("rate", clips, nano_folder, seconds)
        alone += measured("rate", clips, nano_folder, 0.0)
        if earlier is not None:
            before += measured("rate", clips, nano_folder, seconds, checkout=earlier)
    took, least = statistics.median(now), statistics.median(alone)
    old = "- | - |"
    if before:
        old = f"{CLIPS / statistics.median(before):.2f} | {statistics.median(before) / took:.2f} |"
    name = f"{times:g} times as long as reading a clip"
    return f"| {name} | {CLIPS / took:.2f} | {CLIPS / least:.2f} | {least / took:.2f} | {old}"


def lines_of_memory(scratch: Path, nano_folder: Path) -> Iterator[str]:
    few, many = 20, 200
    write_clips(scratch / "many", many, 17, *MEDIUM)
    found = {n: measured("memory", scratch / "many", nano_folder, n) for n in (few, many)}
    yield f"| peak RSS, MiB | {few} clips | {many} clips | {many} / {few} |"
    yield "|---|---|---|---|"
    for name, one, other in zip(
        ("the process that encodes", "a process that decodes"), found[few], found[many], strict=True
    ):
        yield f"| {name} | {one:.0f} | {other:.0f} | {other / one:.3f} |"


def lines_of_start(scratch: Path) -> Iterator[str]:
    yield "| seconds until a set in the cache is ready | 10,000 clips | 100,000 clips |"
    yield "|---|---|---|"
    parts = ("list of clips", "known files", "clips", "prompts", "split and fingerprint")
    found = []
    for count in (10_000, 100_000):
        write_known_set(scratch / "known", count)
        rounds = [measured("start", scratch / "known") for _ in range(ROUNDS)]
        found.append([statistics.median(part) for part in zip(*rounds, strict=True)])
        shutil.rmtree(scratch / "known")
        LINKED.clear()
    for name, *seconds in zip(parts, *found, strict=True):
        yield f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} |"
    yield f"| all of it | {sum(found[0]):.2f} | {sum(found[1]):.2f} |"


def lines_of_prompts() -> Iterator[str]:
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
    yield f"Most prompts at once with T5-XXL in bf16: {HIDDEN_BYTES // (TOKENS * 4096 * 2)}."


def lines(earlier: Path | None) -> Iterator[str]:
    yield "# Encoding"
    yield ""
    yield f"Clips are mp4 files of {FRAMES} frames at {HEIGHT}x{WIDTH}; for the memory, of 17"
    yield f"frames at {MEDIUM[0]}x{MEDIUM[1]}. Medians of {ROUNDS} rounds, all on the same 2 cores."
    yield f"When it began, {os.getloadavg()[0]:.0f} other processes wanted them: read the ratios."
    yield "Made by `python tests/benchmarks/encoding.py`."
    if earlier is not None:
        commit = ["git", "-C", str(earlier), "rev-parse", "--short", "HEAD"]
        yield f"Earlier code: commit {subprocess.check_output(commit, text=True).strip()}."
    yield ""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        nano_folder = nano.write_nano(scratch / "nano")
        write_clips(scratch / "clips")
        yield from lines_of_clips(scratch / "clips", nano_folder, earlier)
        yield ""
        yield from lines_of_memory(scratch, nano_folder)
        yield ""
        yield from lines_of_start(scratch)
    yield ""
    yield from lines_of_prompts()


if __name__ == "__main__":
    quiet_libraries()
    if sys.argv[1:2] and sys.argv[1] in MODES:
        print("measured", *MODES[sys.argv[1]](*sys.argv[2:]))
    else:
        checkout = Path(sys.argv[1]) if sys.argv[1:] else None
        TABLE.write_text("\n".join(lines(checkout)) + "\n", encoding="utf-8")
        print(TABLE.read_text(encoding="utf-8"))
