"""A clip that was encoded may vanish: training goes on with what the cache has of it."""

import pytest
import torch

from cogvx.data.buckets import Size
from cogvx.data.encode import NO_VAE, cache_of, encode_clips, frames_of
from cogvx.data.vanished import covering
from cogvx.errors import UserError


@pytest.fixture
def seen(compose, clips, tmp_path):
    """seen("data.fps=4"): a set whose clips were looked at. Looks stand for latents here."""

    def look(*more: str, known: bool = True):
        said, place = [], f"data.cache_dir='{tmp_path / 'cache'}'"
        data = compose(f"data.instance_data_root={clips}", place, *more).data
        cache = cache_of(data)
        if not known:
            return data.read()
        with data.knowing(cache.has_known):
            examples = data.read()
        return data, *encode_clips(examples, data, cache, NO_VAE, said.append), said

    return look


@pytest.mark.parametrize("more", [[], ["data.long_files=middle"], ["data.buckets=[9x64x64]"]])
def test_a_clip_that_has_vanished_is_used_and_named(seen, clips, more):
    data, before, _, _ = seen(*more)
    frames = frames_of(before[2], data)
    (clips / "videos" / "2.mp4").unlink()
    data, after, rejected, said = seen(*more)
    assert [clip.first.path for clip in after] == [clip.first.path for clip in before]
    assert rejected == []
    [warning] = [line for line in said if line.startswith("warning")]
    assert "1 listed file does not exist any more" in warning and "videos.txt:3 2.mp4" in warning
    remembered = frames_of(after[2], data)
    assert remembered.shape == frames.shape and remembered.dtype == frames.dtype
    assert (remembered - frames).abs().mean() < 0.1, "its preview stands for it"
    with pytest.raises(UserError, match=r"videos\.txt:3 names 'videos/2\.mp4'.* does not exist"):
        seen(known=False)


def test_without_its_file_in_the_cache_it_is_an_error(seen, clips):
    _, before, _, _ = seen()
    path = before[2].first.path
    (clips / "videos" / "2.mp4").unlink()
    path.write_bytes(path.read_bytes()[:-1])
    damaged = r"videos\.txt:3 names .*2\.mp4, which does not exist, and its file in the cache: it"
    with pytest.raises(UserError, match=damaged):
        seen()
    path.unlink()
    with pytest.raises(UserError, match="which does not exist, and it is not in the cache"):
        seen()
    with pytest.raises(UserError, match=r"1 of 6 clips cannot be used as listed"):
        seen("data.fps=4")


def test_a_clip_that_was_never_read_is_an_error_as_before(seen, clips):
    (clips / "videos" / "2.mp4").unlink()
    with pytest.raises(UserError, match=r"videos\.txt:3 names 'videos/2\.mp4'.* does not exist"):
        seen()


def test_a_small_picture_is_enlarged_without_stretching():
    pixels = torch.zeros(5, 3, 10, 20)
    pixels[..., 5:15] = 1.0  # a square in the middle
    large = covering(pixels, Size(5, 40, 40))
    assert large.shape == (5, 3, 40, 40) and large.mean() > 0.95
