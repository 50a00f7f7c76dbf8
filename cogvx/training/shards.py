"""data.shard: several machines encode a part of the clips each."""

from __future__ import annotations

from cogvx.data.cache import Cache
from cogvx.data.cuts import divided
from cogvx.data.encode import Encoder, files_of
from cogvx.data.footage import BadClip
from cogvx.data.sources import Data, Example
from cogvx.progress import counted
from cogvx.training.ranks import Ranks

MOST_PARTS_NAMED = 8


def say_what_is_left(
    examples: list[Example], data: Data, cache: Cache, vae: Encoder, ranks: Ranks
) -> None:
    """Of all examples: which parts have clips that are not in the cache, and what to type."""
    if data.shard is None or not ranks.logs:
        return
    part, parts = data.shard_numbers()
    # The processes of other parts have added to it.
    cache.index.forget()
    missing = [not is_cached(example, data, cache, vae) for example in examples]
    by_part = {number: sum(missing[number - 1 :: parts]) for number in range(1, parts + 1)}
    left = {number: count for number, count in by_part.items() if count and number != part}
    if not left:
        ranks.say(
            f"shard   all {parts} parts are in the cache. To train: the same command, without "
            f"task=encode and data.shard"
        )
        return
    wanted = ",".join(f"{number}/{parts}" for number in [*left][:MOST_PARTS_NAMED])
    more = ",..." if len(left) > MOST_PARTS_NAMED else ""
    ranks.say(
        f"shard   part {part} of {parts} is done. {counted(sum(left.values()), 'clip')} of "
        f"{counted(len(left), 'other part')} are not in the cache yet. If nobody encodes them, "
        f"with the same settings: python launch.py -m task=encode data.shard={wanted}{more}"
    )


def is_cached(example: Example, data: Data, cache: Cache, vae: Encoder) -> bool:
    """A clip whose file nobody has read yet is not read for this."""
    if not cache.knows(example.video):
        return False
    try:
        parts = divided([example], data, cache, lambda text: None)
        files = [path for part in parts for path in files_of(part, data, cache, vae).values()]
        return all(cache.about(path) is not None for path in files)
    # Nobody can encode it.
    except (BadClip, OSError):
        return True
