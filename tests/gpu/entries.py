"""The entries of the battery, what matters most first, and what is planned for them.

[no torch until an entry runs]
"""

from __future__ import annotations

from pathlib import Path

from battery import Entry

GIB = 2**30
# The models and memory modes that run at 49 frames of 720x480. A plan is made of each.
MODES = [
    ("5b", "balanced"),
    ("5b", "low"),
    ("5b", "minimal"),
    ("2b", "balanced"),
    ("2b", "fast"),
    ("2b", "low"),
    ("2b", "minimal"),
    ("5b", "fast"),
]
FAMILIES = ("2b", "5b", "5b_i2v", "1_5_5b", "1_5_5b_i2v")


class Skipped(Exception):
    """Why an entry cannot run here."""


def mode_entry(model: str, memory: str) -> Entry:
    places = {
        "fast": "cogvx/plan/trace.py",
        "balanced": "cogvx/model/blocks.py and cogvx/plan/",
        "low": "cogvx/model/stored.py and cogvx/plan/",
        "minimal": "cogvx/model/offload.py and cogvx/plan/",
    }
    about = f"{model} under {memory}: memory of each phase and seconds per step beside the plan"
    return Entry(f"mode_{model}_{memory}", about, places[memory], limit=110)


def family_entry(family: str) -> Entry:
    about = f"a tiny {family} checkpoint: LoRA, full fine-tuning, and each resumed"
    return Entry(f"family_{family}", about, "cogvx/training/", limit=100, alone=False)


MODE_ENTRIES = {f"{model} {memory}": mode_entry(model, memory) for model, memory in MODES}
ENTRIES = [
    Entry("machine", "the card, versions, packages that are missing", "tests/gpu/README.md", 60),
    Entry("first_2b", "first contact: two LoRA steps of 2b", "cogvx/model/blocks.py", 90),
    Entry("first_5b", "first contact: two LoRA steps of 5b", "cogvx/model/blocks.py", 90),
    Entry(
        "demo",
        "python launch.py, shortened, with its videos and its page",
        "cogvx/training/run.py",
        limit=120,
        alone=False,
        imports_torch=False,
    ),
    *map(family_entry, FAMILIES),
    Entry(
        "loss_fp32",
        "the same losses on the CPU and on the card, fp32",
        "cogvx/training/step.py",
        limit=90,
        alone=False,
        imports_torch=False,
    ),
    Entry(
        "loss_bf16",
        "the same losses on the CPU and on the card, bf16",
        "cogvx/model/cogvideox.py (autocast)",
        limit=90,
        alone=False,
        imports_torch=False,
    ),
    Entry(
        "killed",
        "kill -9 in training, then the same command again",
        "cogvx/training/checkpoint.py",
        limit=110,
        alone=False,
        imports_torch=False,
    ),
    Entry(
        "deterministic",
        "train.deterministic=true: kill -9, resume, compared bit for bit with an undisturbed run",
        "cogvx/training/deterministic.py",
        limit=150,
        alone=False,
        imports_torch=False,
    ),
    Entry(
        "out_of_memory",
        "a step that runs out of memory: what it says, and the same run again with enough",
        "cogvx/training/out_of_memory.py",
        limit=90,
        alone=False,
    ),
    *(MODE_ENTRIES[f"5b {memory}"] for memory in ("balanced", "low", "minimal")),
    Entry("attention", "every kernel of train.attention", "cogvx/model/attention.py", 60),
    Entry("profile_5b", "where the time of one 5b step goes", "cogvx/model/blocks.py", 110),
    MODE_ENTRIES["2b balanced"],
    Entry("storage", "base_storage: fp8, int8 and nf4 beside bf16", "cogvx/model/stored.py", 60),
    Entry(
        "text_encoder", "T5 of real size: on the card and streamed", "cogvx/model/offload.py", 90
    ),
    Entry("vae", "encoding clips of 49 frames of 720x480", "cogvx/data/encode.py", 60),
    Entry(
        "sweep",
        "a sweep of four jobs on this card",
        "cogvx/runs/pool.py",
        limit=120,
        alone=False,
        imports_torch=False,
    ),
    Entry(
        "plan_measure",
        "task=plan with task.measure=true, of training and of a video",
        "cogvx/plan/planner.py",
        limit=120,
        alone=False,
        imports_torch=False,
    ),
    MODE_ENTRIES["2b minimal"],
    Entry("compiled", "train.compile=true on 2b", "cogvx/model/blocks.py", 120),
    Entry(
        "deterministic_cost",
        "2b: seconds per step and memory with and without train.deterministic",
        "cogvx/training/deterministic.py",
        120,
    ),
    MODE_ENTRIES["2b fast"],
    MODE_ENTRIES["2b low"],
    Entry(
        "loading_2b",
        "2b from files of real size: load, encode, train, video",
        "cogvx/model/pretrained.py",
        limit=160,
        imports_torch=False,
    ),
    MODE_ENTRIES["5b fast"],
]


def function(name: str):
    """What the entry of this name runs."""
    import launched
    import real_size
    import single_parts

    if name.startswith("mode_"):
        model, _, memory = name.removeprefix("mode_").rpartition("_")
        return lambda here: real_size.mode(here, model, memory)
    if name.startswith("family_"):
        return lambda here: launched.family(here, name.removeprefix("family_"))
    return next(
        getattr(module, name)
        for module in (real_size, single_parts, launched)
        if hasattr(module, name)
    )


def import_torch() -> None:
    """Before an entry's turn. Nothing here may touch the device."""
    from cogvx.progress import quiet_libraries

    quiet_libraries()
    import cogvx.plan.phases  # noqa: F401


def settings(model: str, memory: str, *, small: bool, scratch: Path) -> list[str]:
    """Overrides for a model of real size, or for nano in its place."""
    same = [f"memory={memory}", "lora.rank=64", f"data.cache_dir='{scratch}/cache'"]
    if small:
        return ["model=nano", "train.mixed_precision=bf16", *same]
    return [f"model={model}", "train.mixed_precision=bf16", *same]


def plans(
    entries: list[Entry], card: tuple[str, float] | None, *, small: bool, scratch: Path
) -> dict[str, list[str]]:
    """The plans that the chosen entries are held against: name -> overrides of task=plan."""
    from cogvx.options.cards import named

    name = (card and named(*card)) or "h100_80gb"
    names = {entry.name for entry in entries}
    wanted = {key for key, entry in MODE_ENTRIES.items() if entry.name in names}
    wanted |= {"5b balanced"} if names & {"first_5b", "profile_5b"} else set()
    wanted |= {"2b balanced"} if names & {"first_2b", "compiled"} else set()
    return {
        f"{model} {memory}": [
            *settings(model, memory, small=small, scratch=scratch),
            f"task.card={name}",
        ]
        for model, memory in MODES
        if f"{model} {memory}" in wanted
    }
