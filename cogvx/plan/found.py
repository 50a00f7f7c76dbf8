"""What tracing some phases has found, and its form as JSON.   [no torch]"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from cogvx.plan.allocator import Peak

PHASES = ["encode clips", "encode prompts", "load", "held-out loss", "train", "video"]
# Of making a video: the image only for image-to-video.
VIDEO_PHASES = ["encode prompts", "load", "encode image", "denoise", "decode"]
MEMORY_PARTS = ["weights", "gradients", "optimizer", "activations", "workspace"]


@dataclass
class Work:
    """The sums over all operations of one kind in one phase."""

    flops: int = 0
    bytes: int = 0  # read and written
    count: int = 0


@dataclass
class Moved:
    """Bytes that one phase copies between the device and the host, and touches on the host."""

    to_device: int = 0  # beside the computation
    to_host: int = 0
    waited_for: int = 0  # either way, while the computation waits
    within_host: int = 0  # read and written by operations of the host


@dataclass(frozen=True)
class Phase:
    name: str
    peak: Peak  # bytes
    parts: dict[str, int]  # MEMORY_PARTS -> bytes, at the allocated peak
    # By operation and dtype, such as ("mm", "bfloat16").
    work: dict[tuple[str, str | None], Work] = field(default_factory=dict)
    moved: Moved = field(default_factory=Moved)

    @property
    def flops(self) -> int:
        return sum(work.flops for work in self.work.values())


@dataclass(frozen=True)
class Outcome:
    """What was found by tracing some phases. Sizes in bytes."""

    phases: list[Phase]
    host: int  # at most, in the CPU's memory
    optimizer: int  # the optimizer's states
    trained: int  # the trained weights

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    def maybe(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)

    def to_json(self) -> dict:
        phases = [
            {
                "name": phase.name,
                "peak": asdict(phase.peak),
                "parts": phase.parts,
                "moved": asdict(phase.moved),
                "work": [[*kind, asdict(work)] for kind, work in phase.work.items()],
            }
            for phase in self.phases
        ]
        sizes = {"host": self.host, "optimizer": self.optimizer, "trained": self.trained}
        return {"phases": phases, **sizes}

    @classmethod
    def from_json(cls, values: dict) -> Outcome:
        phases = [
            Phase(
                phase["name"],
                Peak(**phase["peak"]),
                phase["parts"],
                {(op, dtype): Work(**work) for op, dtype, work in phase["work"]},
                Moved(**phase["moved"]),
            )
            for phase in values.pop("phases")
        ]
        return cls(phases, **values)


def at_layers(layers: int, two: float, three: float) -> float:
    """A quantity that grows equally with every layer, from its values at two and three layers."""
    return two + (layers - 2) * (three - two)
