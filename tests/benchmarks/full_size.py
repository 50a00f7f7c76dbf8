"""A real LoRA step of the 2B on the CPU, at full size under memory=low, beside its plan.

python tests/benchmarks/full_size.py        minutes on 2 cores, 20 GB of RAM; random weights
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent.parent)]

from cogvx.progress import quiet_libraries  # noqa: E402

quiet_libraries()

from cogvx.compose import compose_config  # noqa: E402
from cogvx.plan.allocator import GIB  # noqa: E402
from cogvx.plan.phases import run_phases  # noqa: E402

SIZE = ["data.max_num_frames=9", "data.height=240", "data.width=368", "train.mixed_precision=no"]

if __name__ == "__main__":
    config = compose_config(["model=2b", "memory=low", "lora.rank=64", *SIZE])
    planned = run_phases(config, ["train"], as_cuda=False)
    started = time.monotonic()
    real = run_phases(config, ["train"], as_cuda=False, fake=False)
    seconds = time.monotonic() - started
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for place, name in ((False, "device"), (True, "host"), (None, "both")):
        sizes = planned.most[place] / GIB, real.most[place] / GIB
        print(f"{name:7} planned {sizes[0]:6.2f} GiB   allocated {sizes[1]:6.2f} GiB")
    print(f"a load and a step in {seconds:.0f} s; the process had {rss:.1f} GiB at most")
