"""The 2B at full size with random weights takes a real LoRA step on the CPU under memory=low, beside what is planned for it.

python tests/benchmarks/full_size.py            minutes on 2 cores, 20 GB of RAM
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent.parent)]

from cogvx.runs import processes  # noqa: E402

processes.quiet_libraries()

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
        print(
            f"{name:7} planned {planned.most[place] / GIB:6.2f} GiB   allocated {real.most[place] / GIB:6.2f} GiB"
        )
    print(f"a load and a step in {seconds:.0f} s; the process had {rss:.1f} GiB at most")
