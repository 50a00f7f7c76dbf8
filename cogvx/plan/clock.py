"""How long a step of this run should take on this card.

It is planned while the run starts, in a process of its own that does not use the GPU.

python -m cogvx.plan.clock RUN CARD        prints the seconds
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cogvx import config as configuration
from cogvx.options.cards import CARDS, named
from cogvx.records import record

# What tells a process that it is a rank, for torch.distributed's env:// start.
RANK_VARIABLES = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}


class Expectation:
    """Call it for the planned seconds per step.

    None as long as they are not known, and for a card that is not in options/cards.py.
    """

    def __init__(self, folder: Path, card: str | None):
        command = [sys.executable, "-m", "cogvx.plan.clock", str(folder), str(card)]
        # It is none of the run's ranks: with their variables it would wait for the others.
        here = {name: text for name, text in os.environ.items() if name not in RANK_VARIABLES}
        here |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(configuration.PROJECT)}
        self.seconds, self.folder, self.process = None, folder, None
        if card is not None:
            self.process = subprocess.Popen(
                command, env=here, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )

    def __call__(self) -> float | None:
        if self.process is not None and self.process.poll() is not None:
            said, self.process = self.process.communicate()[0], None
            if said:
                self.seconds = float(said.split()[-1])
                record.note(self.folder, planned_seconds_per_step=round(self.seconds, 3))
        return self.seconds

    def __enter__(self) -> Expectation:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None:
            self.process.kill()


def present_card() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(0)
    return named(about.name, about.total_memory / 2**30)


def main(folder: Path, card: str) -> None:
    from cogvx.plan.traces import step_seconds
    from cogvx.progress import quiet_libraries

    quiet_libraries()
    print(step_seconds(configuration.read(folder / record.CONFIG), CARDS[card]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
