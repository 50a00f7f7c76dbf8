"""A rank of a run that counts what would make its host wait for a GPU.

python tests/training/watched_rank.py RUN [STOPPED]

RUN/reads_RANK.json gets the number of reads of each optimizer step, what was gathered through the
device while the processes agreed to go on, and the step after which this process ended. The rank
STOPPED sends itself SIGTERM in its third step.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from accelerate import Accelerator
from device_reads import watched
from torch.utils._python_dispatch import _disable_current_modes

from cogvx.runs import processes
from cogvx.training import prepare, trainer

folder, rank, stopped = Path(sys.argv[1]), os.environ["RANK"], sys.argv[2:]
optimizer_step, read_tensor = trainer.Trainer.optimizer_step, prepare.read_tensor
gather = Accelerator.gather
found = {"reads": [], "gathered": 0}


def watched_step(self):
    if [rank] == stopped and self.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    with watched() as reads:
        rate = optimizer_step(self)
    found["reads"].append(reads.count)
    return rate


def read_from_disk(*given):  # into the host's memory
    with _disable_current_modes():
        return read_tensor(*given)


def noted_gather(self, tensor):
    found["gathered"] += 1
    return gather(self, tensor)


trainer.Trainer.optimizer_step, prepare.read_tensor = watched_step, read_from_disk
Accelerator.gather = noted_gather
code = processes.run_here(folder)
(folder / f"reads_{rank}.json").write_text(json.dumps(found))
sys.exit(code)
