"""How many processes share a run. Values: conf/parallel/."""

from dataclasses import dataclass


@dataclass
class Parallel:
    num_processes: int

    def problems(self) -> list[str]:
        if self.num_processes < 1:
            return [f"parallel.num_processes={self.num_processes}: must be 1 or more"]
        return []


@dataclass
class Single(Parallel):
    def problems(self) -> list[str]:
        if self.num_processes != 1:
            return [
                f"parallel.num_processes={self.num_processes} with parallel=single: "
                f"add parallel=ddp"
            ]
        return []


@dataclass
class DistributedDataParallel(Parallel):
    """One process per device, each with the whole model. Gradients are averaged."""
