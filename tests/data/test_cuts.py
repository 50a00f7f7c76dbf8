"""Which frames are taken of files that are longer or shorter than the clip, as right numbers."""

import dataclasses
import fractions
import itertools

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cogvx.data.cache import Cache
from cogvx.data.cuts import cuts_of, divided
from cogvx.data.footage import BadClip
from cogvx.data.sources import Example
from cogvx.data.video import read_clip, read_first_frame, read_image, to_bytes
from cogvx.errors import UserError
from cogvx.files import read_json_lines
from cogvx.model.weight_files import WEIGHTS
from cogvx.training.prepare import Prepared

NINE = ["data.max_num_frames=9", "data.fps=10"]  # 0.8 s from the first frame to the last


def write_numbered(path, stamps, *, height=64, width=64):
    """A clip without loss. Frame i is shown at stamps[i] (1/30 s) and has grey 2 i.

    The left half is darker by 1, so that mirrored frames are known.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        for number, stamp in enumerate(stamps):
            pixels = numpy.full((height, width, 3), 2 * number, numpy.uint8)
            pixels[:, width // 2 :] += 1
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamp, fractions.Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """120 frames at 30 fps: 4 seconds, 40 frames at 10 fps."""
    return write_numbered(tmp_path_factory.mktemp("cuts") / "long.mov", range(120))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """18 frames at 30 fps: 6 frames at 10 fps."""
    return write_numbered(tmp_path_factory.mktemp("cuts") / "short.mov", range(18))


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return Cache(tmp_path_factory.mktemp("memory"))


@pytest.fixture
def taken(compose, memory):
    """taken(path, "data.fps=10", ...): the frames of each cut, as their grey says."""

    def read(path, *overrides, example=None):
        data = compose(*NINE, *overrides).data
        found = []
        for cut in cuts_of(example or Example("", path, ""), data, memory):
            clip = read_clip(path, data, cut)
            greys = to_bytes(clip.frames)[:, 32, 48 if not cut.flipped else 16, 0]
            numbers = [int(grey - 1) // 2 for grey in greys]
            assert numbers == clip.indices
            first = read_first_frame(path, data, cut)
            assert torch.equal(first, clip.frames[:1])
            found.append(numbers)
        return found

    return read


def every(step, start, count=9):
    return list(range(start, start + step * count, step))


# -- long files ----------------------------------------------------------------------------------


def test_the_beginning_is_taken_unless_told_otherwise(taken, long):
    assert taken(long) == [every(3, 0)]
    assert taken(long, "data.skip_frames_start=7") == [every(3, 7)]


def test_the_middle(taken, long):
    # At 95 nine frames are left: 95, 98 ... 119. The middle starts half way to it.
    assert taken(long, "data.long_files=middle") == [every(3, 48)]
    skipped = ["data.skip_frames_start=10", "data.skip_frames_end=20"]
    assert taken(long, "data.long_files=middle", *skipped) == [every(3, 10 + 32)]
    assert taken(long, "data.long_files=middle", "data.fps=null") == [every(1, 56)]


def test_windows_for_each_epoch_lie_evenly_and_all_have_the_same_length(taken, long):
    starts = [0, 32, 63, 95]
    assert taken(long, "data.long_files=random") == [every(3, start) for start in starts]
    two = taken(long, "data.long_files=random", "data.random_windows=2", "data.fps=null")
    assert two == [every(1, 0), every(1, 111)]


def test_a_file_with_few_frames_more_has_few_windows(taken, tmp_path):
    path = write_numbered(tmp_path / "a.mov", range(11))
    found = taken(path, "data.long_files=random", "data.fps=null", "data.random_windows=9")
    assert found == [every(1, 0), every(1, 1), every(1, 2)]


def test_a_file_that_is_not_longer_has_one_cut(taken, short):
    for policy in ("middle", "random", "uniform", "sliding"):
        assert taken(short, f"data.long_files={policy}") == [every(3, 0, 5)]


def test_spread_over_the_whole_file(taken, compose, long, memory):
    found = taken(long, "data.long_files=uniform")
    assert found == [[0, 14, 29, 44, 59, 74, 89, 104, 119]]
    data = compose(*NINE, "data.long_files=uniform").data
    [cut] = cuts_of(Example("", long, ""), data, memory)
    # 119/30 s in the time of 0.8 s.
    assert read_clip(long, data, cut).treatment == "spread over 4.0 s: 5 times as fast as filmed"


def test_windows_of_an_uneven_file_have_all_their_frames(taken, tmp_path):
    """A second of 30 fps, then ten frames of half a second each, as a phone in the dark has."""
    stamps = [*range(30), *range(30, 180, 15)]
    path = write_numbered(tmp_path / "uneven.mov", stamps)
    found = taken(path, "data.long_files=random", "data.random_windows=3")
    assert [len(frames) for frames in found] == [9, 9, 9]
    assert found[0] == every(3, 0) and found[2][-1] == 39 and found[2][0] > 35
    spread_out = taken(path, "data.long_files=uniform")[0]
    # Every 165/8 thirtieths of a second.
    assert spread_out == [0, 20, 30, 32, 33, 34, 36, 37, 39]


@pytest.mark.slow
def test_sliding_windows_cover_the_file_and_overlap(compose, taken, long, memory):
    said = []
    settings = ["data.long_files=sliding", "data.window_overlap=0.25"]
    data = compose(*NINE, *settings).data
    examples = divided([Example("a", long, "videos.txt:1")], data, memory, said.append)
    assert said == ["cuts    1 file, divided into windows: 6 examples"]
    assert examples[1].origin == "videos.txt:1 window 2 of 6"
    assert {example.video for example in examples} == {long}
    found = [taken(long, *settings, example=example)[0] for example in examples]
    assert [frames[0] for frames in found] == [0, 19, 38, 57, 76, 95]
    # A quarter of 27 frames of the file, or more.
    assert all(after[0] <= before[-1] + 3 - 27 / 4 for before, after in itertools.pairwise(found))


def test_scenes(compose, taken, memory, tmp_path):
    import av

    # Four scenes, of 40, 6, 30 and 44 frames.
    path, colours = tmp_path / "film.mov", [(200, 30, 30)] * 40 + [(20, 220, 40)] * 6
    colours += [(40, 40, 230)] * 30 + [(240, 240, 60)] * 44
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=30)
        stream.width = stream.height = 64
        stream.pix_fmt = "rgb24"
        for colour in colours:
            pixels = numpy.broadcast_to(numpy.uint8(colour), (64, 64, 3)).copy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    said = []
    data = compose(*NINE, "data.long_files=scenes").data
    examples = divided([Example("a", path, "a.csv:2")], data, memory, said.append)
    assert [(e.start, e.end) for e in examples] == [(0, 40), (46, 76), (76, 120)]
    assert said[0] == "cuts    1 file, divided into scenes: 3 examples"
    assert said[1].startswith("warning 1 scene has fewer than data.min_num_frames=5 frames at 10.0")
    for example in examples:
        [cut] = cuts_of(example, data, memory)
        assert read_clip(path, data, cut).indices == every(3, example.start)
    # A scene is filled with its own frames, never with the next one's.
    data = compose("data.max_num_frames=17", "data.fps=10", "data.short_files=hold").data
    [cut] = cuts_of(examples[1], data, memory)
    assert read_clip(path, data, cut).indices == every(3, 46, 10) + [73] * 7


def test_what_must_be_known_of_files_is_found_once(long, tmp_path, monkeypatch):
    """The first process finds it in all files at once, and the others read it."""
    (tmp_path / "bad.mp4").write_text("no video")
    Cache(tmp_path).look_at([long, tmp_path / "bad.mp4"], facts=True, threshold=27.0)
    monkeypatch.setattr("cogvx.data.decoders.surveyed", None)
    again = Cache(tmp_path)
    assert again.scenes(long, 27.0) == [(0, 120)] and again.facts(long).frames == 120
    assert again.knows(long, "facts") and not again.knows(tmp_path / "bad.mp4", "facts")


def test_a_file_without_a_long_scene_is_named(compose, memory, tmp_path):
    path = write_numbered(tmp_path / "x.mov", range(8))
    data = compose(*NINE, "data.long_files=scenes").data
    [example] = divided([Example("a", path, "a.csv:2")], data, memory, print)
    [cut] = cuts_of(example, data, memory)
    with pytest.raises(BadClip, match=r"is too short: 3 frames at 10.0 fps"):
        read_clip(path, data, cut)


def test_a_file_that_cannot_be_read_stays_one_example(compose, memory, tmp_path):
    (tmp_path / "x.mp4").write_text("no video")
    example = Example("a", tmp_path / "x.mp4", "a.csv:2")
    for policy in ("sliding", "scenes"):
        said = []
        data = compose(*NINE, f"data.long_files={policy}").data
        assert divided([example], data, memory, said.append) == [example]
        assert said[0].startswith("warning a.csv:2 x.mp4 cannot be opened as a video")
        assert said[0].endswith("; not divided")


# -- short files ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_short_files(taken, short):
    own = every(3, 0, 6)
    assert taken(short) == [own[:5]]  # 4k + 1
    assert taken(short, "data.short_files=loop") == [own + own[:3]]
    assert taken(short, "data.short_files=hold") == [own + [15] * 3]
    longer = taken(short, "data.short_files=loop", "data.max_num_frames=17")
    assert longer == [(own * 3)[:17]]
    every_frame = taken(short, "data.short_files=hold", "data.fps=null", "data.max_num_frames=21")
    assert every_frame == [[*range(18), 17, 17, 17]]


def test_what_is_added_does_not_count_as_frames_of_the_file(compose, short):
    data = compose(*NINE, "data.short_files=loop", "data.min_num_frames=6").data
    clip = read_clip(short, data)
    assert (clip.own_frames, clip.treatment) == (6, "begins again after 6 frames")
    with pytest.raises(BadClip, match=r"is too short: 6 frames at 10.0 fps; data.min_num_frames"):
        read_clip(short, dataclasses.replace(data, min_num_frames=7))


# -- sizes ---------------------------------------------------------------------------------------


def test_bars_instead_of_a_crop(compose, tmp_path):
    path = write_numbered(tmp_path / "wide.mov", range(60), height=64, width=128)
    data = compose("data.video_reshape_mode=pad", "data.fps=null").data
    clip = read_clip(path, data)
    last = to_bytes(clip.frames)[-1, :, :, 0]
    assert last[:16].max() == last[48:].max() == 0 and last[16:48].min() == 2 * clip.indices[-1]
    assert clip.treatment == "black bars on 50% of the picture"


def test_a_clip_of_the_right_shape_has_no_bars(compose, long):
    padded = read_clip(long, compose("data.video_reshape_mode=pad").data)
    assert padded.treatment == ""
    assert torch.equal(padded.frames, read_clip(long, compose().data).frames)


def test_a_size_that_must_fit(compose, long, tmp_path):
    data = compose("data.video_reshape_mode=none").data
    assert torch.equal(read_clip(long, data).frames, read_clip(long, compose().data).frames)
    path = write_numbered(tmp_path / "wide.mov", range(60), height=64, width=128)
    with pytest.raises(BadClip) as raised:
        read_clip(path, data)
    assert str(raised.value) == (
        "is 128x64, and data.video_reshape_mode=none takes 64x64 only: data.width=128 "
        "data.height=64, or data.video_reshape_mode=center"
    )


# -- mirrored ------------------------------------------------------------------------------------


def test_each_window_is_there_mirrored_too(compose, taken, long, memory):
    both = taken(long, "data.flip=true", "data.long_files=random", "data.random_windows=2")
    assert both == [every(3, 0), every(3, 0), every(3, 95), every(3, 95)]
    data = compose(*NINE, "data.flip=true").data
    plain, mirrored = (
        read_clip(long, data, cut) for cut in cuts_of(Example("", long, ""), data, memory)
    )
    assert torch.equal(plain.frames.flip(-1), mirrored.frames)
    assert not torch.equal(plain.frames, mirrored.frames)


def test_captions_that_a_mirror_makes_wrong_are_named(compose, memory, long):
    said = []
    data = compose("data.flip=true").data
    captions = ["a man turns left", "the RIGHTMOST house", "bright leftovers", "a cat"]
    examples = [Example(caption, long, "") for caption in captions]
    assert divided(examples, data, memory, said.append) == examples
    assert said[0].startswith("warning 2 captions say left or right, and data.flip=true shows")
    assert said[1:] == ["        'a man turns left'", "        'the RIGHTMOST house'"]


# -- still pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_picture_is_a_clip_of_one_frame(compose, tmp_path, name):
    Image.new("RGB", (96, 64), (40, 80, 120)).save(tmp_path / name)
    for policy in ("drop", "loop", "hold"):
        data = compose("data.min_num_frames=1", f"data.short_files={policy}").data
        frames = to_bytes(read_clip(tmp_path / name, data).frames)
        assert frames.shape == (1, 64, 64, 3)
        assert numpy.abs(frames.astype(int) - (40, 80, 120)).max() <= 4
    with pytest.raises(BadClip, match=r"is a picture, a clip of 1 frame; .* data.min_num_frames=1"):
        read_clip(tmp_path / name, compose().data)


def test_a_folder_of_pictures_says_what_to_type(compose, tmp_path):
    folder = ["data=folder", f"data.instance_data_root={tmp_path}"]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a picture")
    with pytest.raises(
        UserError, match=r'Pictures: data.video_column=".png" data.min_num_frames=1'
    ):
        compose(*folder).data.read()
    assert len(compose(*folder, "data.video_column=.png").data.read()) == 1
    with pytest.raises(
        UserError, match=r"data.image_column=.png is an ending of data.video_column"
    ):
        compose(
            "model=nano_i2v", *folder, "data.video_column='.mp4 .png'", "data.image_column=.png"
        )


def test_a_given_image_is_mirrored_with_its_clip(compose, long, memory, tmp_path):
    Image.effect_noise((80, 60), 80).convert("RGB").save(tmp_path / "x.png")
    data = compose("data.flip=true", "data.video_reshape_mode=pad").data
    cuts = cuts_of(Example("", long, ""), data, memory)
    plain, mirrored = (read_image(tmp_path / "x.png", data, long, cut) for cut in cuts)
    assert torch.equal(plain.flip(-1), mirrored) and not torch.equal(plain, mirrored)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.random_windows=0"], "data.random_windows=0: must be 1 or more windows"),
        (["data.window_overlap=1"], "data.window_overlap=1.0: must be at least 0 and below 1"),
        (["data.scene_threshold=0"], "data.scene_threshold=0.0: must be above 0, up to 255"),
        (["data.long_files=tail"], "data.long_files"),
        (
            ["model=nano_i2v", "data.image_column=images.txt", "data.long_files=random"],
            "data.long_files=random takes clips from anywhere in a file, and an image",
        ),
    ],
)
def test_settings_that_cannot_be(compose, overrides, said):
    with pytest.raises(UserError) as raised:
        compose(*overrides)
    assert said in str(raised.value)


def test_scenes_without_the_package_say_how_to_install_it(compose, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install scenedetect-headless"):
        compose("data.long_files=scenes")


def test_a_part_of_a_file_has_the_bucket_that_it_fills(compose, taken, long, memory):
    buckets = "data.buckets=[5x64x64,17x64x64]"
    scene = Example("", long, "", start=30, end=60)
    assert taken(long, buckets) == [every(3, 0, 17)]
    assert taken(long, buckets, example=scene) == [every(3, 30, 5)]
    fill = ["data.short_files=loop", "data.min_num_frames=3"]
    looped = taken(long, buckets, *fill, example=Example("", long, "", end=9))
    assert looped == [[0, 3, 6, 0, 3]]


# -- all of it, in training ----------------------------------------------------------------------


@pytest.mark.slow
def test_windows_and_mirrored_clips_are_drawn_and_a_resumed_run_draws_the_same(
    run_in, stopped, make_clip, tmp_path, monkeypatch
):
    """Image-to-video, with two long files, a short one that begins again, and two pictures."""
    root, drawn, real = tmp_path / "set", [], Prepared.load_batch
    names = ["long.mp4", "longer.mp4", "short.mp4", "a.png", "b.png"]
    for name, frames in zip(names, (20, 24, 6), strict=False):
        make_clip(root / name, frames=frames)
    for number, name in enumerate(names[3:]):
        pixels = numpy.random.default_rng(number).integers(0, 255, (80, 96, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(root / name)
    (root / "videos.txt").write_text("\n".join(names))
    (root / "prompts.txt").write_text("\n".join(f"clip {name}" for name in names))

    def load_batch(self, clips, prompts, images):
        drawn.append((self, clips[0]))
        return real(self, clips, prompts, images)

    monkeypatch.setattr(Prepared, "load_batch", load_batch)
    settings = [
        *("model=nano_i2v", f"data.instance_data_root={root}", "data.min_num_frames=1"),
        *("data.long_files=random", "data.random_windows=2", "data.short_files=loop"),
        *("data.flip=true", "data.max_validation_clips=1", "train.max_train_steps=16"),
        "data.near_duplicates_together=false",
        *("train.checkpointing_steps=8", "train.checkpoints_total_limit=null"),
    ]
    whole = run_in(tmp_path / "whole", *settings)
    data = drawn[0][0]
    assert [len(clip.cuts) for clip in (*data.train, *data.held_out)].count(4) == 2
    for clip in data.train:
        # 16 steps are four epochs of four clips: all cuts, each as often as the others.
        own = [cut for _, cut in drawn if cut in clip.cuts]
        assert sorted(map(clip.cuts.index, own)) == sorted(
            [*range(len(clip.cuts))] * (4 // len(clip.cuts))
        )
        assert len({cut.image_path for cut in clip.cuts}) == len(clip.cuts)
    [held_out] = data.held_out
    assert all(cut == held_out.first for _, cut in drawn if cut in held_out.cuts)

    again = run_in(stopped("again", whole, 8), *settings)
    one, other = (load_file(folder / WEIGHTS) for folder in (whole, again))
    assert len(one) > 10 and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    reports = [(folder / "dataset_report.csv").read_text() for folder in (whole, again)]
    assert reports[0] == reports[1]
    losses = [
        [line.get("loss") for line in read_json_lines(folder / "metrics.jsonl")]
        for folder in (whole, again)
    ]
    assert losses[0] == losses[1] and any(losses[0])
