"""Image-to-video: the first image and its noise are encoded before training."""

import csv
import math
import statistics

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cogvx.data.cache import Cache
from cogvx.data.cuts import head
from cogvx.data.encode import Encoder, encode_clips, encode_images, image_of, noise_levels
from cogvx.data.mp4 import write_video
from cogvx.data.sources import Example
from cogvx.data.video import BadClip, read_clip, to_bytes
from cogvx.errors import UserError
from cogvx.model.pretrained import PretrainedModel
from cogvx.training.prepare import Prepared

CPU = torch.device("cpu")


@pytest.fixture
def pictures(clips):
    """images.txt, and pictures that differ in brightness."""
    for number in range(6):
        Image.new("RGB", (160, 90), (40 * number,) * 3).save(clips / "videos" / f"{number}.png")
    (clips / "images.txt").write_text("".join(f"videos/{n}.png\n" for n in range(6)))
    return clips


def encoded(compose, nano_folder, root, tmp_path, *overrides, loads=None, say=lambda text: None):
    def load():
        if loads is not None:
            loads.append(1)
        return PretrainedModel(nano_folder, CPU, torch.float32).vae(tiling=False)

    data = compose("model=nano_i2v", f"data.instance_data_root={root}", *overrides).data
    vae, cache = Encoder(load, "nano", torch.float32, CPU), Cache(tmp_path / "cache")
    clips, _ = encode_clips(data.read(), data, cache, vae, lambda text: None)
    return data, encode_images(clips, data, cache, vae, say)


@pytest.mark.slow
def test_the_first_frame_is_the_clips(compose, clips):
    for overrides in ([], ["data.skip_frames_start=3", "data.video_reshape_mode=random"]):
        data = compose(f"data.instance_data_root={clips}", *overrides).data
        example = data.read()[4]
        assert torch.equal(
            image_of(example, head(data), data), read_clip(example.video, data).frames[:1]
        )


@pytest.mark.slow
def test_images_are_read_turned_upright_covered_and_cropped(compose, pictures, tmp_path):
    data = compose(
        "model=nano_i2v", f"data.instance_data_root={pictures}", "data.image_column=images.txt"
    ).data
    examples = data.read()
    assert [e.image.name for e in examples] == [f"{n}.png" for n in range(6)]
    assert to_bytes(image_of(examples[3], head(data), data)).mean() == 120
    turned = numpy.zeros((64, 64, 3), numpy.uint8)
    turned[:32] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(turned).save(tmp_path / "turned.png", exif=exif)
    upright = to_bytes(
        image_of(Example("", None, "", image=tmp_path / "turned.png"), head(data), data)
    )[0]
    assert upright[:30].max() == 0 and upright[34:].min() == 255


def test_a_picture_is_cropped_where_its_clip_is(compose, make_clip, tmp_path):
    """The first frame of a wide clip, saved as a picture, is cropped at the same random place."""
    import imageio.v3

    frames = (
        numpy.random.default_rng(0)
        .integers(0, 255, (9, 16, 64, 3), dtype=numpy.uint8)
        .repeat(8, 1)
        .repeat(8, 2)
    )
    write_video(tmp_path / "wide.mp4", frames, fps=8)
    first = imageio.v3.imread(tmp_path / "wide.mp4", plugin="FFMPEG")[0]
    Image.fromarray(first).save(tmp_path / "first.png")
    data = compose("model=nano_i2v", "data.video_reshape_mode=random").data
    one, other = (
        image_of(Example("", tmp_path / "wide.mp4", "", image), head(data), data)
        for image in (None, tmp_path / "first.png")
    )
    assert (one - other).abs().mean() < 0.02


@pytest.mark.slow
def test_an_image_column_of_a_csv(compose, pictures):
    with (pictures / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["text", "video", "start"], ["a", "videos/0.mp4", "videos/5.png"]]
        )
    table = ["model=nano_i2v", "data=csv", f"data.instance_data_root={pictures}"]
    [example] = compose(*table, "data.image_column=start").data.read()
    assert example.image.name == "5.png"
    with pytest.raises(UserError, match="has no column begin"):
        compose(*table, "data.image_column=begin").data.read()


@pytest.mark.slow
def test_mistakes_in_the_list_of_images_are_named(compose, pictures):
    def refused(text: str) -> str:
        (pictures / "images.txt").write_text(text)
        with pytest.raises(UserError) as raised:
            compose(
                "model=nano_i2v",
                f"data.instance_data_root={pictures}",
                "data.image_column=images.txt",
            ).data.read()
        return str(raised.value)

    whole = "".join(f"videos/{n}.png\n" for n in range(6))
    assert "prompts.txt has 6 lines, images.txt 5" in refused(whole.removesuffix("videos/5.png\n"))
    assert "images.txt:3 is blank, but prompts.txt:3 says 'clip number 2'" in refused(
        whole.replace("videos/2.png", "")
    )
    assert "names 'videos/9.png'; looked for" in refused(whole.replace("2.png", "9.png"))


def test_noise_levels_are_quantiles_of_the_log_normal():
    """Quantiles of exp(N(-3, 0.5))."""
    levels = [math.log(level) for level in noise_levels(1000)]
    assert abs(statistics.fmean(levels) + 3) < 1e-6 and abs(statistics.stdev(levels) - 0.5) < 0.01
    assert noise_levels(1) == [pytest.approx(math.exp(-3))] and noise_levels(0) == []


@pytest.mark.slow
def test_each_image_is_encoded_once_as_it_is_and_with_noise(
    compose, nano_folder, pictures, tmp_path
):
    loads, said = [], []
    settings = ["data.image_column=images.txt", "data.image_noise_variants=4"]
    data, (clips, bad) = encoded(
        compose, nano_folder, pictures, tmp_path, *settings, loads=loads, say=said.append
    )
    moments = [load_file(clip.first.image_path)["image_moments"] for clip in clips]
    assert not bad and {m.shape for m in moments} == {(5, 32, 1, 16, 16)}
    vae = PretrainedModel(nano_folder, CPU, torch.float32).vae(tiling=False)
    with torch.no_grad():
        clean = vae.encode(
            image_of(clips[2].example, clips[2].first.cut, data).permute(1, 0, 2, 3)[None]
        ).latent_dist.parameters
    assert torch.equal(moments[2][:1], clean)
    away = [(m[1:, :16] - m[:1, :16]).square().mean(dim=(1, 2, 3, 4)) for m in moments]
    assert all(one[-1] > one[0] > 0 for one in away), "more noise, further away"
    assert not torch.equal(moments[2][1] - moments[2][0], moments[3][1] - moments[3][0]), (
        "each has noise of its own"
    )
    encoded(compose, nano_folder, pictures, tmp_path, *settings, loads=loads, say=said.append)
    assert len(loads) == 2 and said[-1] == "encode  nothing: 6 images found in the cache"


@pytest.mark.slow
def test_an_image_that_is_none_is_named_and_its_clip_left_out(
    compose, nano_folder, pictures, tmp_path
):
    (pictures / "videos" / "4.png").write_bytes(b"no picture")
    said = []
    _, (clips, bad) = encoded(
        compose, nano_folder, pictures, tmp_path, "data.image_column=images.txt", say=said.append
    )
    assert (len(clips), [one.example.origin for one in bad]) == (5, ["videos.txt:5"])
    assert any(
        "videos.txt:5 4.mp4 has an image" in line and "that is no picture" in line for line in said
    )
    (pictures / "videos" / "0.png").write_bytes((pictures / "videos" / "1.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"2 of 6 clips cannot be used"):
        encoded(compose, nano_folder, pictures, tmp_path, "data.image_column=images.txt")
    with pytest.raises(BadClip, match="cannot be read"):
        image_of(clips[0].example, clips[0].first.cut, compose("model=nano_i2v").data)


@pytest.mark.slow
def test_held_out_clips_start_from_the_image_itself_and_trained_ones_from_noisy_ones(
    run, pictures, monkeypatch
):
    asked, real = [], Prepared.load_batch

    def load_batch(self, clips, prompts, images):
        asked.append((clips[0] in [clip.first for clip in self.held_out], images))
        return real(self, clips, prompts, images)

    monkeypatch.setattr(Prepared, "load_batch", load_batch)
    settings = ["model=nano_i2v", f"data.instance_data_root={pictures}", "train.max_train_steps=40"]
    folder = run("a", *settings, "data.image_column=images.txt", "data.image_noise_variants=8")
    assert {tuple(images) for held_out, images in asked if held_out} == {(0,)}
    assert {images[0] for held_out, images in asked if not held_out} == set(range(1, 9))
    assert Image.open(folder / "first_frame.png").size == (64, 64)


@pytest.mark.slow
def test_images_of_validation_videos(run, pictures, capfd):
    prompts = "validation.validation_prompt=a:::b"
    settings = ["model=nano_i2v", f"data.instance_data_root={pictures}", "train.max_train_steps=4"]
    videos = ["validation.num_validation_videos=1", "validation.num_inference_steps=2", prompts]
    image = pictures / "videos" / "5.png"
    folder = run("a", *settings, *videos, f"validation.validation_images='{image}:::{image}'")
    assert len(list((folder / "validation" / "base").glob("*.mp4"))) == 2
    assert numpy.array(Image.open(folder / "first_frame.png")).mean() == 200
    run(
        "b",
        *settings,
        *videos,
        f"validation.validation_images='{image}:::{image}:::{image}'",
        expect=2,
    )
    assert "names 3 images for 2 prompts" in capfd.readouterr().err
    run("c", *settings, *videos, "validation.validation_images=nowhere.png", expect=2)
    assert "nowhere.png does not exist" in capfd.readouterr().err
