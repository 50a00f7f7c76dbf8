"""Which size a clip takes, and which sizes a model takes."""

import pytest

from cogvx.data.buckets import Size, frames_given, nearest_bucket, read_size
from cogvx.data.footage import FileFacts
from cogvx.model.geometry import released
from cogvx.model.nano import NANO
from cogvx.model.sizes import sizes_like

NAMES = ["THUDM/CogVideoX-2b", "THUDM/CogVideoX-5b", "THUDM/CogVideoX1.5-5B"]
BASE = {name: Size(49, 480, 720) for name in NAMES[:2]} | {NAMES[2]: Size(81, 768, 1360)}


def facts(width: int, height: int, frames=100, fps=25.0) -> FileFacts:
    return FileFacts(frames, fps, (frames - 1) / fps, width, height)


def sizes(*texts: str) -> list[Size]:
    return [read_size(text) for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_auto_has_legal_sizes_of_about_the_same_cost(name):
    geometry, base = released(name), BASE[name]
    found = sizes_like(base, 5, geometry)
    assert found[0] == base and len(set(found)) == len(found)
    assert geometry.bucket_problems(found) == []
    whole = [size for size in found if size.frames == base.frames]
    assert len(whole) == 7 and all(0.9 <= s.pixels / base.pixels <= 1 for s in whole)
    assert {(s.width, s.height) for s in whole} == {(s.height, s.width) for s in whole}
    tokens = [geometry.tokens(frames=s.frames, height=s.height, width=s.width) for s in found]
    assert max(tokens) == tokens[0], "the plan for the given size holds for all"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("width", "height"), [(1920, 1080), (1080, 1920), (640, 480), (3024, 4032), (1000, 1000)]
)
def test_auto_crops_little_of_usual_shapes(name, width, height):
    found = sizes_like(BASE[name], 5, released(name))
    taken = nearest_bucket(found, facts(width, height), frames=1000)
    assert taken.frames == BASE[name].frames and taken.cropped(height, width) < 0.02


def test_auto_halves_the_frames_down_to_the_shortest_clip():
    geometry = released(NAMES[0])
    lengths = [size.frames for size in sizes_like(BASE[NAMES[0]], 5, geometry)]
    assert list(dict.fromkeys(lengths)) == [49, 25, 13, 5]
    lengths = {size.frames for size in sizes_like(BASE[NAMES[0]], 14, geometry)}
    assert lengths == {49, 25}
    assert [str(size) for size in sizes_like(Size(9, 64, 64), 9, NANO.geometry)] == [
        *("9x64x64", "9x48x80", "9x80x48", "9x56x72", "9x72x56")
    ]


@pytest.mark.parametrize(
    ("width", "height", "frames", "expected"),
    [
        (720, 480, 100, "49x480x720"),
        (480, 720, 100, "25x720x480"),  # its picture comes before its length
        (720, 480, 40, "25x480x720"),
        (720, 480, 7, "13x480x720"),  # shorter than all: named and left out when it is read
        (480, 720, 7, "13x480x720"),
        (1440, 960, 100, "49x480x720"),
    ],
)
def test_a_clip_takes_the_bucket_that_crops_least_then_the_longest(width, height, frames, expected):
    buckets = sizes("49x480x720", "25x480x720", "13x480x720", "25x720x480")
    assert str(nearest_bucket(buckets, facts(width, height), frames)) == expected


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(720, 480, "9x480x720"), (719, 480, "9x240x352"), (4000, 2700, "9x960x1440")],
)
def test_of_equal_shapes_the_largest_that_enlarges_nothing(width, height, expected):
    buckets = sizes("9x240x352", "9x480x720", "9x960x1440")
    assert str(nearest_bucket(buckets, facts(width, height), 100)) == expected
    assert str(nearest_bucket(buckets, facts(90, 60), 100)) == "9x240x352"


@pytest.mark.slow
def test_frames_are_counted_as_the_reader_counts_them(compose, make_clip, tmp_path):
    from cogvx.data.footage import survey
    from cogvx.data.video import by_timestamp

    for number, (frames, file_fps, fps) in enumerate(
        [(9, 8, 8), (8, 8, 8), (30, 30, 8), (33, 29.97, 12), (50, 25, "null"), (1, 8, 8)]
    ):
        shape = {"width": 32, "height": 32}
        path = make_clip(tmp_path / f"{number}.mp4", frames=frames, fps=file_fps, **shape)
        data, footage = compose(f"data.fps={fps}").data, survey(path)
        expected = len(by_timestamp(footage.stamps, data.fps, 10_000))
        assert frames_given(footage.facts, data, unused=0) == expected


def test_what_is_cropped_is_a_share_of_the_picture():
    assert Size(1, 100, 100).cropped(100, 200) == Size(1, 200, 100).cropped(200, 200) == 0.5
    assert Size(1, 480, 720).cropped(960, 1440) == 0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.buckets=[49x480]", "data.buckets=49x480: must be a list of sizes (frames x"),
        ("data.buckets=[]", "must be a list of sizes"),
        ("data.buckets=all", "data.buckets=all: must be a list of sizes"),
        ("data.buckets=49x480x720", "data.buckets=49x480x720: must be a list"),
        ("data.buckets=true", "must be a list of sizes"),
        ("data.buckets=[[49,480,720]]", "must be a list of sizes"),
        ("data.buckets=[48x480x720]", "data.buckets=48x480x720: frames=48: must be 4k + 1"),
        ("data.buckets=[49x480x700]", "width=700: must be a multiple of 16"),
        ("data.buckets=[1x480x720]", "1x480x720 has fewer frames than data.min_num_frames=5"),
    ],
)
def test_buckets_that_the_model_does_not_take_are_refused(compose, setting, said):
    from cogvx.errors import UserError

    needed = ["model=2b", "data=text_files", "data.instance_data_root=/clips"]
    with pytest.raises(UserError) as refused:
        compose(*needed, setting)
    assert said in str(refused.value) and str(refused.value).count("\n") <= 1


@pytest.mark.parametrize("setting", ["data.buckets=auto", "data.buckets=[49x480x720]"])
def test_a_model_of_one_size_takes_no_buckets(compose, setting):
    from cogvx.errors import UserError

    with pytest.raises(UserError, match="one size only, 480x720"):
        compose("model=5b_i2v", "data=text_files", "data.instance_data_root=/clips", setting)
    compose(
        "model=1_5_5b_i2v", "data=text_files", "data.instance_data_root=/c", "data.buckets=auto"
    )


def test_a_size_that_is_new_to_the_checkpoint_is_said():
    wide, tall = Size(49, 480, 720), Size(49, 720, 480)
    assert released(NAMES[0]).caution_of_buckets([wide, Size(25, 480, 720)]) is None
    assert "480x720 (height x width). New to it: 720x480" in released(NAMES[1]).caution_of_buckets(
        [wide, tall]
    )
    assert released(NAMES[2]).caution_of_buckets([wide, tall]) is None
    i2v = released("THUDM/CogVideoX1.5-5B-I2V")
    assert i2v.caution_of_buckets([Size(81, 768, 1360), Size(81, 1024, 768)]) is None
    assert "New to it: 1008x1008" in i2v.caution_of_buckets([Size(81, 1008, 1008)])


def test_auto_works_at_any_size():
    geometry = released(NAMES[0])
    for height, width in [(16, 16), (16, 48), (16, 640), (64, 64), (480, 16), (1024, 1024)]:
        found = sizes_like(Size(9, height, width), 9, geometry)
        assert found[0] == Size(9, height, width) and geometry.bucket_problems(found) == []


def test_auto_becomes_a_list_and_what_reading_has_noted_stays(compose):
    from cogvx.model.sizes import largest_size, with_sizes

    data = compose("data.buckets=auto").data
    data.said = ("read from a table",)
    found = with_sizes(data, NANO.geometry)
    assert found.buckets[:2] == ["9x64x64", "9x48x80"] and found.said == data.said
    assert data.buckets == "auto" and with_sizes(found, NANO.geometry) is found
    assert largest_size(data, NANO.geometry) == Size(9, 64, 64)
    listed = compose("data.buckets=[9x64x64,13x80x48]").data
    assert largest_size(listed, NANO.geometry) == Size(13, 80, 48)
    assert largest_size(compose().data, NANO.geometry) == Size(9, 64, 64)
