"""What the held-out loss of a run is measured on: runs with equal answers can be compared."""

from __future__ import annotations

from cogvx.config import Config
from cogvx.data.cache import Cache, content_key
from cogvx.data.encode import EncodedClip

FRAMES = ("first_frame", "last_frame", "frames", "repeated")


def what_is_judged(held_out: list[EncodedClip], config: Config, cache: Cache) -> dict[str, str]:
    """The parts that records/alike.py compares, except for the base model.

    What precision and memory mode change is left out: it changes the loss in its last digits, and
    runs that differ in it can be compared. The order of the clips counts, because the noise follows
    it.
    """
    validation, crop = config.validation, config.data.video_reshape_mode.name
    clips = [
        [
            cache.fingerprint(clip.example.video),
            None if clip.example.image is None else cache.fingerprint(clip.example.image),
            clip.latent_shape,
            crop,
            clip.first.cut.flipped,
            *(clip.about.get(name) for name in FRAMES),
        ]
        for clip in held_out
    ]
    return {
        "clips": content_key(clips),
        "captions": content_key([clip.example.prompt for clip in held_out]),
        "noise": f"{validation.heldout_timesteps} timesteps, {validation.heldout_draws} noises",
    }
