"""Each content is encoded once. The cache is shared, and never holds half a file."""

import errno
import gc
import re
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file
from transformers import AutoTokenizer

from cogvx.data import cache as caching
from cogvx.data import decoders
from cogvx.data.cache import Cache, content_key
from cogvx.data.encode import Encoder, cache_of, encode_clips, latent_moments
from cogvx.data.prompts import encode_prompts
from cogvx.data.sharing import READ_AHEAD, cache_state, make_claimed, make_missing
from cogvx.data.video import BadClip
from cogvx.errors import UserError
from cogvx.model import nano
from cogvx.model.pretrained import PretrainedModel

CPU = torch.device("cpu")


def vae_encoder(nano_folder, loads):
    def load():
        loads.append(1)
        return PretrainedModel(nano_folder, CPU, torch.float32).vae(tiling=False)

    return Encoder(load=load, identity="nano", dtype=torch.float32, device=CPU)


@pytest.mark.slow
def test_the_second_time_encodes_nothing_and_loads_no_vae(compose, clips, nano_folder, tmp_path):
    data, cache, loads, said = (
        compose(f"data.instance_data_root={clips}").data,
        Cache(tmp_path / "cache"),
        [],
        [],
    )
    encoder = vae_encoder(nano_folder, loads)
    first, rejected = encode_clips(data.read(), data, cache, encoder, said.append)
    assert (len(first), len(rejected), len(loads)) == (6, 0, 1)
    second, _ = encode_clips(data.read(), data, cache, encoder, said.append)
    assert [clip.first.path for clip in second] == [clip.first.path for clip in first] and len(
        loads
    ) == 1
    assert said[0] == "encode  6 clips; 0 of 6 found in the cache"
    assert re.fullmatch(r"encode  6 clips in [\d.]+ s: [\d.]+ clips/s", said[1])
    assert said[2:] == ["encode  nothing: 6 clips found in the cache"]
    (clips / "videos" / "0.mp4").rename(clips / "videos" / "renamed.mp4")
    (clips / "videos.txt").write_text(
        "videos/renamed.mp4\n" + "".join(f"videos/{n}.mp4\n" for n in range(1, 6))
    )
    encode_clips(data.read(), data, cache, encoder, said.append)
    assert len(loads) == 1, "a renamed file has the same content"


@pytest.mark.slow
def test_what_decides_the_latents_decides_the_key(compose, clips, nano_folder, tmp_path):
    cache, loads = Cache(tmp_path / "cache"), []
    plain = compose(f"data.instance_data_root={clips}").data
    first, _ = encode_clips(
        plain.read(), plain, cache, vae_encoder(nano_folder, loads), lambda text: None
    )
    changes = (
        "data.fps=4",
        "data.skip_frames_start=1",
        "data.width=32",
        "data.max_num_frames=5",
        "data.video_reshape_mode=random",
        "data.video_reshape_mode=pad",
        "data.long_files=middle",
        "data.long_files=uniform",
        "data.short_files=loop",
    )
    for change in changes:
        data = compose(f"data.instance_data_root={clips}", change).data
        other, _ = encode_clips(
            data.read(), data, cache, vae_encoder(nano_folder, loads), lambda text: None
        )
        assert not {clip.first.path for clip in first} & {clip.first.path for clip in other}, change


@pytest.mark.slow
def test_cached_moments_are_the_vaes_posterior(compose, clips, nano_folder, tmp_path):
    from cogvx.data.video import read_clip

    data = compose(f"data.instance_data_root={clips}").data
    encoded, _ = encode_clips(
        data.read(), data, Cache(tmp_path), vae_encoder(nano_folder, []), lambda text: None
    )
    vae = PretrainedModel(nano_folder, CPU, torch.float32).vae(tiling=False)
    pixels = read_clip(encoded[2].example.video, data).frames.permute(1, 0, 2, 3)[None]
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist
    cached = DiagonalGaussianDistribution(load_file(encoded[2].first.path)["latent_moments"][None])
    assert torch.equal(cached.mean, expected.mean) and torch.equal(cached.logvar, expected.logvar)


def test_tiles_that_do_not_fit_are_refused(nano_folder):
    vae = PretrainedModel(nano_folder, CPU, torch.float32).vae(tiling=True)
    encoder = Encoder(lambda: vae, "nano", torch.float32, CPU)
    frames = torch.zeros(5, 3, 64, 96)
    assert latent_moments(vae, frames, encoder).shape == (32, 2, 16, 24)
    vae.enable_tiling(tile_sample_min_height=32)
    with pytest.raises(UserError, match=r"memory\.vae_tiling=false"):
        latent_moments(vae, frames, encoder)


@pytest.mark.slow
def test_damaged_latents_are_encoded_again_and_said(compose, clips, nano_folder, tmp_path):
    data, loads, said = compose(f"data.instance_data_root={clips}").data, [], []

    def encode() -> list[Path]:
        vae, cache = vae_encoder(nano_folder, loads), Cache(tmp_path / "cache", "a set")
        found, _ = encode_clips(data.read(), data, cache, vae, said.append)
        return [clip.first.path for clip in found]

    paths = encode()
    whole = [path.read_bytes() for path in paths]
    paths[0].write_bytes(whole[0][:100])
    flipped = bytearray(whole[4])
    flipped[-1000] ^= 1
    paths[4].write_bytes(flipped)
    assert encode() == paths and len(loads) == 2
    assert [path.read_bytes() for path in paths] == whole
    assert "2 files of the cache are damaged, and made again; the first is latents/" in said[-3]
    assert said[-2] == "encode  2 clips; 4 of 6 found in the cache"


def test_one_clip_is_not_many():
    assert cache_state("clip", 3, 1) == "encode  1 clip; 2 of 3 found in the cache"
    assert cache_state("clip", 1, 0) == "encode  nothing: 1 clip found in the cache"


@pytest.mark.slow
def test_bad_clips_are_named_and_the_others_go_on(compose, clips, nano_folder, tmp_path):
    (clips / "videos" / "4.mp4").write_bytes(b"")
    data, said = compose(f"data.instance_data_root={clips}").data, []
    encoded, rejected = encode_clips(
        data.read(), data, Cache(tmp_path), vae_encoder(nano_folder, []), said.append
    )
    assert (len(encoded), [bad.example.origin for bad in rejected]) == (5, ["videos.txt:5"])
    assert "warning videos.txt:5 4.mp4 is empty (0 bytes); left out" in said


@pytest.mark.slow
def test_a_higher_minimum_leaves_cached_clips_out_without_encoding_again(
    compose, clips, make_clip, nano_folder, tmp_path
):
    make_clip(clips / "videos" / "2.mp4", frames=6)
    cache, loads = Cache(tmp_path / "cache"), []
    for least, kept in ((5, 6), (9, 5)):
        data = compose(f"data.instance_data_root={clips}", f"data.min_num_frames={least}").data
        encoded, rejected = encode_clips(
            data.read(), data, cache, vae_encoder(nano_folder, loads), lambda text: None
        )
        assert (len(encoded), len(rejected)) == (kept, 6 - kept)
    assert len(loads) == 1 and "too short: 5 frames" in rejected[0].reason


@pytest.mark.slow
def test_a_clip_that_hangs_or_cannot_be_opened_is_left_out(
    compose, clips, nano_folder, tmp_path, monkeypatch
):
    (clips / "videos" / "4.mp4").rename(clips / "videos" / "hangs.mp4")
    names = "".join(f"videos/{n}.mp4\n" for n in (0, 1, 2, 3, "hangs", 5))
    (clips / "videos.txt").write_text(names)
    broken = Path(__file__).parent / "broken_decoder.py"
    monkeypatch.setattr(decoders, "COMMAND", [sys.executable, str(broken)])
    monkeypatch.setattr(decoders, "IDLE", [])
    sha256 = caching.sha256_of

    def secret(path):
        if path.name == "2.mp4":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return sha256(path)

    monkeypatch.setattr(caching, "sha256_of", secret)
    overrides = ("data.decode_seconds=3", "data.max_bad_fraction=0.5")
    data, said = compose(f"data.instance_data_root={clips}", *overrides).data, []
    cache = cache_of(data)
    cache.look_at(example.video for example in data.read())
    encoded, rejected = encode_clips(
        data.read(), data, cache, vae_encoder(nano_folder, []), said.append
    )
    assert (len(encoded), len(rejected)) == (4, 2)
    assert "warning videos.txt:3 2.mp4 cannot be read: Permission denied; left out" in said
    [hung] = [line for line in said if "hangs.mp4" in line]
    assert hung.startswith("warning videos.txt:5 hangs.mp4 was not read in 3 s")


@pytest.mark.slow
def test_too_many_bad_clips_stop_the_run(compose, clips, nano_folder, tmp_path):
    for name in ("1.mp4", "4.mp4"):
        (clips / "videos" / name).write_bytes(b"no video")
    data = compose(f"data.instance_data_root={clips}").data
    with pytest.raises(
        UserError, match=r"2 of 6 clips cannot be used, more than data.max_bad_fraction=0.2"
    ) as raised:
        encode_clips(
            data.read(), data, Cache(tmp_path), vae_encoder(nano_folder, []), lambda text: None
        )
    assert "videos.txt:2" in str(raised.value) and "videos.txt:5" in str(raised.value)


def test_prompts_are_embedded_as_the_pipeline_does(nano_folder, tmp_path):
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(nano_folder)
    prompts = ["A red circle moves up.", "", "word " * 100]
    said = []
    encoder = Encoder(
        PretrainedModel(nano_folder, CPU, torch.float32).text_encoder, "nano", torch.float32, CPU
    )
    paths = encode_prompts(prompts, Cache(tmp_path), encoder, nano.TEXT_TOKENS, said.append)
    for prompt in prompts:
        with torch.no_grad():
            expected, _ = pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=nano.TEXT_TOKENS
            )
        assert torch.equal(load_file(paths[prompt])["prompt_embeds"], expected[0])
    assert "1 prompt has more tokens than the model reads (32), of 2" in said[-2]


def test_words_that_are_cut_off_or_unknown_are_named(nano_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(nano_folder / "tokenizer")
    long = "A red circle moves up over a blue background, then it stops at the very end."
    prompts = [long, "A red \N{CAT FACE} moves", "circle \u5706 up", "A red circle moves up."]
    encoder = Encoder(
        PretrainedModel(nano_folder, CPU, torch.float32).text_encoder, "nano", torch.float32, CPU
    )
    for _ in range(2):  # newly encoded, and from the cache
        said = []
        encode_prompts(["", *prompts], Cache(tmp_path), encoder, nano.TEXT_TOKENS, said.append)
        warnings = [each for each in said if each.startswith(("warning", " "))]
        assert "1 prompt has more tokens than the model reads (32), of 4" in warnings[0]
        tokens = len(tokenizer(long).input_ids)
        assert tokens > 32 and f"{tokens} tokens: 'A red circle" in warnings[1]
        cut = warnings[1].partition("it does not see '")[2].rstrip("'")
        assert cut and long.endswith(cut)
        read = tokenizer(long.removesuffix(cut)).input_ids
        assert len(read) == 32, "what is left is what the model reads"
        assert "2 of 4 prompts have words with letters that the text encoder does" in warnings[2]
        assert warnings[3].endswith("moves': \N{CAT FACE}") and warnings[4].endswith(": \u5706")
        assert len(warnings) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_streamed_block_is_fetched_once_for_many_prompts_with_the_same_bits(
    nano_folder, tmp_path, monkeypatch, dtype
):
    """A GPU may round a batch of several rows otherwise, so each row is computed alone."""
    prompts, fetched, loads = [f"a circle {'red ' * n}moves" for n in range(7)], [], []

    def require_one_row(module, inputs):
        assert len(inputs[0]) == 1

    def load():
        loads.append(1)
        tokenizer, model = PretrainedModel(nano_folder, CPU, dtype).text_encoder(streamed=True)
        for number, block in enumerate(model.encoder.block):
            block.register_forward_pre_hook(lambda *given, n=number: fetched.append(n))
            for layer in block.layer:
                layer.register_forward_pre_hook(require_one_row)
        return tokenizer, model

    found = {}
    for at_once in (1, 3):
        row = nano.TEXT_TOKENS * nano.TEXT_WIDTH * dtype.itemsize
        monkeypatch.setattr("cogvx.data.prompts.HIDDEN_BYTES", at_once * row)
        fetched.clear()
        encoder = Encoder(load, "nano", dtype, CPU, streamed=True)
        cache, said = Cache(tmp_path / str(at_once)), []
        paths = encode_prompts(prompts, cache, encoder, nano.TEXT_TOKENS, said.append)
        assert fetched.count(0) == fetched.count(1) == -(-len(prompts) // at_once)
        found[at_once] = [load_file(paths[prompt])["prompt_embeds"] for prompt in prompts]
    assert all(map(torch.equal, found[1], found[3])) and len(loads) == 2
    tokenizer, model = PretrainedModel(nano_folder, CPU, dtype).text_encoder()
    for prompt, embeds in zip(prompts, found[1], strict=True):
        ids = tokenizer(prompt, padding="max_length", max_length=32, return_tensors="pt").input_ids
        with torch.no_grad():
            assert torch.equal(model(ids)[0][0].to(dtype), embeds)


@pytest.mark.slow
def test_an_encoder_is_gone_when_its_work_is_done(compose, clips, nano_folder, tmp_path):
    """Its memory is free at once: no circle of references keeps it until a collection."""
    data, cache, alive = compose(f"data.instance_data_root={clips}").data, Cache(tmp_path), []
    pretrained = PretrainedModel(nano_folder, CPU, torch.float32)

    def load_vae():
        alive.append(weakref.ref(vae := pretrained.vae(tiling=False)))
        return vae

    def load_text():
        tokenizer, model = pretrained.text_encoder()
        alive.append(weakref.ref(model))
        return tokenizer, model

    gc.collect()
    gc.disable()
    try:
        vae, text = (Encoder(load, "nano", torch.float32, CPU) for load in (load_vae, load_text))
        encode_clips(data.read(), data, cache, vae, lambda text: None)
        encode_prompts(["one", "two"], cache, text, nano.TEXT_TOKENS, lambda text: None)
        assert [model() for model in alive] == [None, None]
    finally:
        gc.enable()


def test_the_next_clips_are_read_while_one_is_encoded(tmp_path):
    """Each is read before its turn, in order, and never more than READ_AHEAD wait."""
    paths = [tmp_path / "folder" / f"{number}.safetensors" for number in range(9)]
    cache, read, made, failed = Cache(tmp_path), [], [], "3"
    ahead = threading.Event()

    def read_one(path):
        read.append(path)
        if len(read) - len(made) > READ_AHEAD:
            ahead.set()
        if path.stem == failed:
            raise BadClip("has no frames")
        return torch.ones(1)

    def make(share):
        for path, content in share.read_ahead(read_one):
            # The others are read while this one is being made.
            assert path == paths[-1] or ahead.wait(10)
            time.sleep(0.05)
            gone = len(made) + len(share.reasons)
            assert len(read) - gone <= READ_AHEAD + 1
            share.write(path, {"content": content})
            made.append(path)

    reasons = make_missing(paths, cache, make, "clip", lambda text: None)
    assert reasons == {paths[3]: "has no frames"} and made == paths[:3] + paths[4:]
    assert sorted(read) == paths and not list(tmp_path.rglob("*.lock"))


def test_a_file_is_written_while_the_next_one_is_made(tmp_path):
    paths = [tmp_path / "folder" / f"{number}.safetensors" for number in range(3)]
    next_one, order = threading.Event(), []

    class SlowCache(Cache):
        def write(self, path, *others):
            if path is not paths[-1]:
                assert next_one.wait(10), "nobody makes the next one meanwhile"
            next_one.clear()
            super().write(path, *others)
            order.append(f"{path.stem} written")

    def make(share):
        for path, content in share.read_ahead(lambda path: torch.ones(1)):
            order.append(f"{path.stem} made")
            next_one.set()
            share.write(path, {"content": content})

    # The first one's write waits for the second to be made.
    next_one.set()
    assert make_missing(paths, SlowCache(tmp_path), make, "clip", lambda text: None) == {}
    assert sorted(order) == sorted(f"{n} {did}" for n in range(3) for did in ("made", "written"))


def test_what_cannot_be_written_ends_the_run_in_words(tmp_path, monkeypatch):
    paths = [tmp_path / "folder" / f"{number}.safetensors" for number in range(6)]

    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)

    def make(share):
        for path, content in share.read_ahead(lambda path: torch.ones(1)):
            share.write(path, {"content": content})

    with pytest.raises(UserError, match=r"cannot write to the cache, .*No space left on device"):
        make_missing(paths, Cache(tmp_path), make, "clip", lambda text: None)
    assert not list(tmp_path.rglob("*.lock")) and not list(tmp_path.rglob("*.partial"))


def test_an_error_while_reading_ends_the_run_and_leaves_no_claim(tmp_path):
    paths = [tmp_path / "folder" / f"{number}.safetensors" for number in range(6)]

    def read_one(path):
        if path.stem == "1":
            raise UserError("the disk is gone")

    def make(share):
        for path, _ in share.read_ahead(read_one):
            share.write(path, {"content": torch.ones(1)})

    with pytest.raises(UserError, match="the disk is gone"):
        make_missing(paths, Cache(tmp_path), make, "clip", lambda text: None)
    assert not list(tmp_path.rglob("*.lock"))
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["0.safetensors"]


def test_two_runs_that_want_each_others_files_do_not_wait_for_ever(tmp_path):
    """Each claims a group and then meets a file that the other has claimed."""
    paths = [tmp_path / "folder" / f"{number}.safetensors" for number in range(6)]
    both, made = threading.Barrier(2), []

    def run(order):
        def make(share):
            group = share.take_group(3)
            if not made:
                both.wait(10)
            for path in group:
                share.cache.write(path, {"content": torch.ones(1)})
                made.append(path)
                share.done(path)

        left = order
        while left:
            _, left = make_claimed(left, Cache(tmp_path), make, "prompt", wait=True)

    threads = [
        threading.Thread(target=run, args=[order], daemon=True) for order in (paths, paths[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(made) == paths, "each is made once"


def test_values_that_are_not_finite_are_not_cached(tmp_path):
    cache = Cache(tmp_path)
    with pytest.raises(UserError, match="not finite"):
        cache.write(
            cache.path("latents", content_key("x")),
            {"latent_moments": torch.tensor([1.0, float("nan")])},
        )
    assert not list(tmp_path.rglob("*.safetensors"))


def test_fingerprints_follow_the_content(tmp_path):
    cache = Cache(tmp_path / "cache")
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"one")
    assert cache.fingerprint(tmp_path / "a") == cache.fingerprint(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"two!")
    assert cache.fingerprint(tmp_path / "a") != cache.fingerprint(tmp_path / "b")
