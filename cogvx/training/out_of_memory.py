"""When memory ends: what the run was doing, what was planned, and what to type.

[no torch at import]
"""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cogvx.config import Config
from cogvx.errors import first_line
from cogvx.files import read_json, shown
from cogvx.options.cards import GIB

# torch's own error for the GPU's memory has this type. What cuBLAS and cuDNN cannot allocate, and
# pinned memory, comes as a RuntimeError with one of these texts.
OUT_OF_MEMORY_ERROR = "OutOfMemoryError"
OUT_OF_GPU_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "_ALLOC_FAILED",
)
OUT_OF_RAM_TEXTS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough")


class Lack(Enum):
    """Whose memory is too small, as it is said."""

    gpu = "the GPU's memory is too small for this"
    ram = "this machine's memory (RAM) is too small for this"


@dataclass(frozen=True)
class Moment:
    """What a run was doing when memory ended."""

    phase: str  # a name of DOING_IN
    place: str  # such as "backward pass of step 12"
    in_use: str  # a sentence


class LackElsewhere(Exception):
    """Memory ended in a process of this run, maybe another one. It has that process's message."""

    def __init__(self, lack: Lack, text: str):
        # Both are arguments, so that it can be sent to other processes.
        super().__init__(lack, text)
        self.lack, self.text = lack, text

    def __str__(self) -> str:
        return self.text


# The plan's names of the phases, and what a run does in them.
DOING_IN = {
    "encode clips": "encoding clips",
    "encode prompts": "encoding prompts",
    "load": "loading the model",
    "train": "training",
    "held-out loss": "computing the held-out loss",
    "video": "making a video",
    "preview": "making a preview",
    "save": "saving",
}


def lack_of(error: BaseException) -> Lack | None:
    """Whose memory this error says is too small; None if it means something else."""
    text = str(error)
    if isinstance(error, LackElsewhere):
        return error.lack
    if type(error).__name__ == OUT_OF_MEMORY_ERROR:
        return Lack.gpu
    if isinstance(error, MemoryError):
        return Lack.ram
    if not isinstance(error, RuntimeError):
        return None
    if any(part in text for part in OUT_OF_RAM_TEXTS):
        return Lack.ram
    if "pin" in text.lower() and "out of memory" in text:
        return Lack.ram
    return Lack.gpu if any(part in text for part in OUT_OF_GPU_TEXTS) else None


# -- where it was --------------------------------------------------------------------------------


@contextlib.contextmanager
def noting_lack(phase: str, place: str = "") -> Iterator[None]:
    """If memory ends within this context, the error knows where. place: what of the phase runs."""
    try:
        yield
    except Exception as error:
        note_lack(error, phase, place)
        raise


def note_lack(error: Exception, phase: str, place: str) -> None:
    """Adds where it was, if this error says that memory has ended. The first note counts."""
    lack = lack_of(error)
    if lack is not None and moment_of(error) is None:
        error.moment = Moment(phase, place, memory_in_use(lack))


def moment_of(error: BaseException) -> Moment | None:
    return getattr(error, "moment", None)


def memory_in_use(lack: Lack) -> str:
    """A sentence; empty where nothing is known."""
    if lack is Lack.ram:
        return ram_in_use()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    whole = torch.cuda.get_device_properties(0).total_memory
    return (
        f"In use: {allocated / GIB:.2f} GiB allocated, {reserved / GIB:.2f} GiB reserved, "
        f"of {whole / GIB:.2f} GiB."
    )


def ram_in_use() -> str:
    """From /proc, which only Linux has."""
    mine = kib_of(Path("/proc/self/status"), "VmRSS")
    free = kib_of(Path("/proc/meminfo"), "MemAvailable")
    whole = kib_of(Path("/proc/meminfo"), "MemTotal")
    if None in (mine, free, whole):
        return ""
    mine, free, whole = (kib * 1024 / GIB for kib in (mine, free, whole))
    return (
        f"In use: {mine:.2f} GiB by this process; {free:.2f} GiB of {whole:.2f} GiB are available."
    )


def kib_of(path: Path, name: str) -> int | None:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(encoding="ascii"), re.MULTILINE)
        return found and int(found[1])
    return None


def forget_frames(error: BaseException) -> None:
    """Frees what the functions that this error left had in memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


# -- what to say ---------------------------------------------------------------------------------


def said_of_lack(error: BaseException, config: Config | None, folder: Path | None) -> str | None:
    """The whole message if memory has ended; None if this error means something else.

    folder: of the run. Neither is known where there is no run.
    """
    lack, moment = lack_of(error), moment_of(error)
    if lack is None:
        return None
    headline = lack.value
    if moment is not None:
        headline += f": it ended while {doing_in_words(moment)}"
    lines = [f"{headline}."]
    if moment is not None and folder is not None:
        lines.append(figures_of(moment, folder, lack))
    if config is None or folder is None:
        lines.append(IN_GENERAL[lack])
    else:
        lines += what_helps(config, folder, "train" if moment is None else moment.phase, lack)
    # The rest is advice that this program has followed already.
    text = first_line(error).partition(" If reserved but unallocated")[0]
    said = [] if text == type(error).__name__ else [f"The error: {text}"]
    return "\n       ".join(line for line in [*lines, *said] if line)


IN_GENERAL = {
    Lack.gpu: (
        "What helps, the cheapest first: memory=balanced, train.train_batch_size=1 with more "
        "train.gradient_accumulation_steps, fewer frames (data.max_num_frames), a smaller size "
        "(data.height, data.width)."
    ),
    Lack.ram: (
        "Memory modes that offload to RAM need more of it: python launch.py task=plan ... prints "
        "how much. memory=low keeps less there than memory=minimal and memory=low_full."
    ),
}


def doing_in_words(moment: Moment) -> str:
    return DOING_IN[moment.phase] + (f" ({moment.place})" if moment.place else "")


def figures_of(moment: Moment, folder: Path, lack: Lack) -> str:
    """What was in use, beside the plan."""
    return " ".join(filter(None, [moment.in_use, planned(folder, moment.phase, lack)]))


def planned(folder: Path, phase: str, lack: Lack) -> str:
    """What plan.json has for this phase, if the run had time to plan it."""
    if lack is Lack.ram:
        return ""
    try:
        found = read_json(folder / "plan.json")["phases"][phase]["reserved_gib"]
    except (OSError, KeyError, TypeError):
        return ""
    return f"Planned: {found:.2f} GiB reserved."


def what_helps(config: Config, folder: Path, phase: str, lack: Lack) -> list[str]:
    """Lines: a command, what else could be typed, and what is lost (nothing)."""
    start, step = how_to_start(folder), last_kept_step(folder)
    changes = cheaper(config, phase) if lack is Lack.gpu else []
    lines = [IN_GENERAL[lack]] if lack is Lack.ram else []
    if changes:
        lines.append(f"Type:  python launch.py {start} {changes[0]}")
    more = [*changes[1:], *smaller_clips(config, phase)] or ["a card with more memory"]
    if lack is Lack.gpu:
        lines.append(f"{'Not enough? ' if changes else ''}Try {', then '.join(more)}.")
    if step is None:
        again = "" if changes else f" Again: python launch.py {start}"
        lines.append(f"What is encoded stays in the cache.{again}")
    elif changes:
        lines.append(f"That goes on after step {step}, in a new folder. This run's files stay.")
    else:
        lines.append(f"The checkpoint after step {step} is kept: python launch.py {start}")
    return lines


def how_to_start(folder: Path) -> str:
    """Arguments that go on from the last checkpoint; without one, that begin again."""
    if last_kept_step(folder) is None:
        return f"--config-dir {shown(folder)} --config-name config"
    return f"train.resume={shown(folder)}"


def last_kept_step(folder: Path) -> int | None:
    names = [path.name.removeprefix("step_") for path in (folder / "checkpoints").glob("step_*")]
    return max((int(name) for name in names if name.isdigit()), default=None)


def cheaper(config: Config, phase: str) -> list[str]:
    """Settings that need less of the GPU's memory in this phase, what costs least first."""
    memory, train = config.memory, config.train
    if phase == "encode clips":
        return [] if memory.vae_tiling else ["memory.vae_tiling=true"]
    if phase == "encode prompts":
        return [] if memory.stream_text_encoder else ["memory.stream_text_encoder=true"]
    if phase == "video":
        single = {"vae_tiling": memory.vae_tiling, "frugal_videos": memory.frugal_videos}
        return [f"memory.{name}=true" for name, on in single.items() if not on] + modes(config)
    batch = train.train_batch_size
    if batch == 1 or phase != "train":
        return modes(config)
    more = batch * train.gradient_accumulation_steps
    return [
        f"train.train_batch_size=1 train.gradient_accumulation_steps={more}",
        *modes(config),
    ]


def modes(config: Config) -> list[str]:
    """The memory modes after the present one."""
    from cogvx.model.trained_weights import weights_of

    frozen = weights_of(config.lora).freezes_base or not config.task.trains
    order = ["fast", "balanced", "low", "minimal"] if frozen else ["fast", "balanced", "low_full"]
    present = config.choices["memory"]
    later = order[order.index(present) + 1 :] if present in order else []
    return [f"memory={name}" for name in later]


def smaller_clips(config: Config, phase: str) -> list[str]:
    """What changes what is trained: only when nothing else helps."""
    if phase == "encode prompts":
        return []
    if config.data.buckets is not None:
        return ["smaller sizes in data.buckets"]
    frames, found = config.data.max_num_frames, ["a smaller data.height and data.width"]
    # Half as long, 4k + 1 frames.
    return [f"data.max_num_frames={1 + (frames - 1) // 8 * 4}", *found] if frames > 5 else found


def said_of_skipped(error: BaseException, what: str, config: Config, folder: Path) -> str:
    """The warning for a part of validation that training goes on without."""
    lack, moment = lack_of(error), moment_of(error)
    phase = "train" if moment is None else moment.phase
    figures = "" if moment is None else figures_of(moment, folder, lack)
    lines = [f"warning {what} skipped, training goes on: {lack.value}. {figures}".rstrip()]
    changes = cheaper(config, phase) if lack is Lack.gpu else []
    if changes:
        lines.append(f"to have it:    python launch.py {how_to_start(folder)} {changes[0]}")
    if phase == "video":
        lines.append(
            "to have none:  validation.num_validation_videos=0 validation.scored_prompts=0"
        )
        later = f"task=generate task.run={shown(folder)} memory=low"
        lines.append(f"videos later:  python launch.py {later}")
    return "\n        ".join(lines)
