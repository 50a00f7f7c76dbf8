"""The little world: clips are always the same, and captions say what they show."""

from collections import Counter

import pytest

from cogvx.data import demo, world
from cogvx.errors import UserError


@pytest.mark.slow
def test_clips_are_the_same_on_every_rendering(tmp_path):
    clips = world.scenes(5, seed=3)
    first, second = (world.render_clips(tmp_path / name, clips, "clips") for name in ("a", "b"))
    files = sorted(path.relative_to(first) for path in first.rglob("[!.]*") if path.is_file())
    assert len(files) == 7
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    assert world.scenes(5, seed=3) == clips != world.scenes(5, seed=4)


def test_kinds_come_evenly():
    clips = world.scenes(672, seed=0)
    assert (
        len({(c.shape, c.colour, c.background, c.direction) for c in clips})
        == len(world.COMBINATIONS)
        == 672
    )
    assert set(Counter(c.shape for c in clips).values()) == {224}
    assert not [c for c in clips if c.colour == c.background]


def test_a_caption_says_what_its_clip_shows():
    for scene in [*world.scenes(50, seed=1), *demo.demo_scenes()]:
        colour = demo.TOKEN if scene.colour == demo.MEANS else scene.colour
        expected = {
            "shape": scene.shape,
            "colour": colour,
            "direction": scene.direction,
            "background": scene.background,
        }
        assert world.parse_caption(scene.caption()) == expected
    assert world.parse_caption("A rabbit in the snow") == {}


def test_the_demo_is_not_in_the_world_and_is_asked_for_in_new_combinations():
    assert demo.MEANS not in world.COLOURS
    taught = [scene for scene in demo.demo_scenes() if scene.colour == demo.MEANS]
    assert len(taught) == len(demo.demo_scenes()) / 2
    assert {(scene.width, scene.height) for scene in taught} == set(demo.SIZES), (
        "the others differ in nothing else"
    )
    assert {scene.fps for scene in taught} == set(demo.RATES)
    prompts = demo.scored_prompts(16)
    shown = {scene.caption() for scene in demo.demo_scenes()}
    assert len(set(prompts["taught"])) == 16 and shown.isdisjoint(prompts["taught"])
    assert all(demo.TOKEN in prompt for prompt in prompts["taught"])
    assert len(set(prompts["other"])) == 16 and not any(
        demo.TOKEN in prompt for prompt in prompts["other"]
    )


def test_data_world_reads_as_many_clips_as_asked(compose):
    assert [e.prompt for e in compose("data=world", "data.clips=3").data.read()] == [
        s.caption() for s in world.scenes(3, 0)
    ]
    with pytest.raises(UserError, match=r"data.clips=0: must be 1 or more"):
        compose("data=world", "data.clips=0")
