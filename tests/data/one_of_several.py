"""A process that encodes clips as a run does, and makes a note of each.

python tests/data/one_of_several.py CACHE CLIPS NANO NOTES [stuck]

For every clip that this process encodes, the folder NOTES gets two files: NAME.begun and NAME.done.
The first clip waits until another process has begun one too. With `stuck` it never ends.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

from cogvx import compose as composing
from cogvx.data import encode
from cogvx.data.cache import Cache
from cogvx.model.pretrained import PretrainedModel

cache, clips, nano, notes = map(Path, sys.argv[1:5])
stuck = sys.argv[5:] == ["stuck"]
data = composing.compose_config(
    [f"data.cache_dir='{cache}'", f"data.instance_data_root='{clips}'"]
).data
read_clip, clip_key, write, names = encode.read_clip, encode.clip_key, Cache.write, {}


def noted_key(video, *arguments):
    key = clip_key(video, *arguments)
    names[key] = f"{video.stem}.{os.getpid()}"
    return key


def noted_read(video, *arguments, **settings):
    (notes / f"{video.stem}.{os.getpid()}.begun").touch()
    deadline = time.monotonic() + 300
    while (stuck or others() == 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    return read_clip(video, *arguments, **settings)


def others() -> int:
    """How many clips other processes have begun."""
    return sum(f".{os.getpid()}." not in path.name for path in notes.glob("*.begun"))


def noted_write(self, path, *arguments, **settings):
    write(self, path, *arguments, **settings)
    (notes / f"{names[path.stem]}.done").touch()


encode.read_clip, encode.clip_key, Cache.write = noted_read, noted_key, noted_write
cpu = torch.device("cpu")
vae = encode.Encoder(
    lambda: PretrainedModel(nano, cpu, torch.float32).vae(tiling=False), "nano", torch.float32, cpu
)
encoded, _ = encode.encode_clips(
    data.read(), data, Cache(cache), vae, lambda line: print(line, flush=True)
)
print(f"has {len(encoded)}", flush=True)
