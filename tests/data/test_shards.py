"""Parts of a set are encoded on different machines. Each says what is left for the others."""

from types import SimpleNamespace

import pytest
import torch

from cogvx.config import Wrong
from cogvx.data.encode import Encoder, cache_of, files_of
from cogvx.errors import UserError
from cogvx.training.shards import say_what_is_left

VAE = Encoder(load=None, identity="a VAE", dtype=torch.float32, device=torch.device("cpu"))


def part_of(compose, clips, tmp_path, shard):
    settings = [f"data.instance_data_root={clips}", f"data.cache_dir={tmp_path / 'cache'}"]
    return compose("task=encode", *settings, f"data.shard={shard}").data


@pytest.mark.slow
def test_the_parts_together_are_all_clips_once(compose, clips, tmp_path):
    found = []
    for part in (1, 2, 3, 4):
        data = part_of(compose, clips, tmp_path, f"{part}/4")
        own = data.own_part(data.read())
        assert len(own) in (1, 2)
        found += own
    assert sorted(map(str, found)) == sorted(map(str, data.read())) and len(found) == 6
    whole = compose(f"data.instance_data_root={clips}").data
    assert whole.own_part(whole.read()) == whole.read()


@pytest.mark.slow
def test_more_parts_than_clips_are_refused(compose, clips, tmp_path):
    data = part_of(compose, clips, tmp_path, "7/8")
    with pytest.raises(UserError, match=r"data\.shard=7/8: there are only 6 clips"):
        data.own_part(data.read())


@pytest.mark.parametrize("shard", ["0/4", "5/4", "3", "1/0", "'-1/4'", "a/b", "1/2/3"])
def test_other_parts_are_refused(compose, shard):
    with pytest.raises(Wrong, match=r"data\.shard=.*must be PART/PARTS, counted from 1"):
        compose("task=encode", f"data.shard={shard}")


def test_training_on_a_part_is_refused(compose):
    with pytest.raises(Wrong, match=r"data\.shard=1/4 is for task=encode: .* data\.shard=null"):
        compose("data.shard=1/4")


@pytest.mark.slow
def test_a_part_says_what_is_left_for_the_others(compose, clips, tmp_path):
    data, said = part_of(compose, clips, tmp_path, "1/3"), []
    ranks, examples = SimpleNamespace(logs=True, say=said.append), data.read()

    def encode(numbers):
        cache = cache_of(data)
        for number in numbers:
            for path in files_of(examples[number], data, cache, VAE).values():
                cache.write(path, {"latent_moments": torch.ones(1)}, {"frames": 9})

    cache = cache_of(data)
    encode([0, 3])
    say_what_is_left(examples, data, cache, VAE, ranks)
    assert "4 clips of 2 other parts are not in the cache yet" in said[-1]
    assert said[-1].endswith("python launch.py -m task=encode data.shard=2/3,3/3")
    encode([1, 4, 2])
    say_what_is_left(examples, data, cache, VAE, ranks)
    assert "1 clip of 1 other part" in said[-1] and said[-1].endswith("data.shard=3/3")
    encode([5])
    say_what_is_left(examples, data, cache, VAE, ranks)
    assert said[-1].startswith("shard   all 3 parts are in the cache. To train:")
