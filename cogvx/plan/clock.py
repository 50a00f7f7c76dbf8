"""How long a step of this run should take on this card, and how much memory each phase.

It is planned while the run starts, in a process of its own that does not use the GPU.

python -m cogvx.plan.clock RUN CARD        writes RUN/plan.json: first the time, then the memory
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cogvx import config as configuration
from cogvx.files import read_json, write_json
from cogvx.options.cards import CARDS, named
from cogvx.records import record

PLAN = "plan.json"
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
            (folder / PLAN).unlink(missing_ok=True)  # of an earlier start, maybe on another card
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, env=here, **silent)

    def __call__(self) -> float | None:
        if self.process is not None and self.seconds is None:
            self.seconds = read_json(self.folder / PLAN).get("seconds_per_step")
            if self.seconds is not None:
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
    from cogvx.plan.planner import IN_TWO_PROCESSES, phase_facts
    from cogvx.plan.traces import step_seconds, trace
    from cogvx.progress import quiet_libraries

    quiet_libraries()
    os.nice(10)
    config, phases = configuration.read(folder / record.CONFIG), {}
    found = {"card": card, "seconds_per_step": step_seconds(config, CARDS[card]), "phases": phases}
    write_json(folder / PLAN, found)
    for names in IN_TWO_PROCESSES:
        phases |= {phase.name: phase_facts(phase) for phase in trace((config, names, None)).phases}
        write_json(folder / PLAN, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
