"""Exact resume: what else than the optimizer could change something, and what does.

Each optimizer: tests/options/test_optimizers.py. Compiled: test_speed.py. On the CPU:
test_on_cpu.py. Killed: tests/end_to_end/test_run.py.
"""

from types import SimpleNamespace

import pytest
import torch

from cogvx.files import read_json_lines
from cogvx.model import lora
from cogvx.records import record
from cogvx.training.batches import Batches
from cogvx.training.setup import said_of_other_steps

SHORT = [
    "train.max_train_steps=6",
    "train.checkpointing_steps=3",
    "train.logging_steps=2",
    "validation.heldout_steps=3",
    # Many CPUs emulate bf16.
    "data.height=32",
    "data.width=32",
    "data.max_num_frames=5",
]


def numbers(folder, *names):
    lines = read_json_lines(folder / "metrics.jsonl")
    return [(line["step"], name, line[name]) for line in lines for name in names if name in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["train.deterministic=true"],
        ["train.ema_decay=0.9", "memory=low"],
        ["train.train_batch_size=2", "train.min_snr_gamma=5"],
    ],
    ids=["deterministic", "averaged, int8", "weighted batches"],
)
def test_a_run_in_bf16_goes_on_bit_for_bit(run, stopped, settings):
    whole = run("whole", *SHORT, "train.mixed_precision=bf16", *settings)
    again = stopped("again", whole, 3)
    (again / lora.WEIGHTS).unlink()
    assert run("again", *SHORT, "train.mixed_precision=bf16", *settings) == again
    one, other = (lora.read_adapter(folder)[0] for folder in (whole, again))
    assert lora.compare(one, other, values=True) == []
    names = ("loss", "grad_norm", "lr", "heldout_loss", "highest_loss_clip")
    assert numbers(whole, *names) == numbers(again, *names)


# -- another number of processes -------------------------------------------------------------------

WAYS = [(1, 1, 8), (1, 4, 2), (2, 1, 4), (2, 4, 1), (4, 2, 1), (8, 1, 1)]


def way(processes: int, batch: int, accumulated: int) -> list[str]:
    return [
        f"parallel={'single' if processes == 1 else 'ddp'}",
        f"parallel.num_processes={processes}",
        f"train.train_batch_size={batch}",
        f"train.gradient_accumulation_steps={accumulated}",
    ]


def clips(count: int) -> list:
    """With three captions each."""
    pairs = [[f"caption {n}", f"TOKEN caption {n}"] for n in range(3)]
    example = SimpleNamespace(source="", pairs=pairs, plain_share=0.5)
    return [SimpleNamespace(example=example, size=None) for _ in range(count)]


def drawn(config, step: int) -> tuple:
    """Everything that is drawn for this step, whichever process draws it."""
    processes, accumulated = config.parallel.num_processes, config.train.gradient_accumulation_steps
    data, found = SimpleNamespace(train=clips(11)), []
    for micro_step in range(step * accumulated, (step + 1) * accumulated):
        for index in range(processes):
            accelerator = SimpleNamespace(device=torch.device("cpu"))
            ranks = SimpleNamespace(count=processes, index=index, accelerator=accelerator)
            batches = Batches(config, data, ranks)
            draw = batches.draw(micro_step)
            noise = draw.noise(torch.empty(len(draw.samples), 2, 4, 3, 3))
            chosen = [data.train[sample.index] for sample in draw.samples]
            found += zip(
                draw.samples,
                [tuple(each.flatten().tolist()) for each in noise],
                draw.timesteps(1000).tolist(),
                batches.prompts(chosen, draw),
                batches.images(draw),
                strict=True,
            )
    return tuple(found)


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_every_number_of_processes_draws_the_same(compose, sampling):
    same = [f"train.timestep_sampling={sampling}", "train.caption_dropout=0.3"]
    same += ["data.image_noise_variants=3"]
    configs = [compose(*same, *way(*each)) for each in WAYS]
    for step in (0, 3, 1000):
        first, *others = (drawn(config, step) for config in configs)
        assert len(first) == 8 and all(other == first for other in others)
    assert drawn(configs[0], 0) != drawn(configs[0], 1)


def test_a_resumed_run_says_what_cannot_be_equal(compose, tmp_path):
    before = record.open_folder(compose(*way(1, 1, 8), f"output_dir='{tmp_path}'"))
    recorded = before / record.CONFIG
    assert said_of_other_steps(compose(*way(1, 1, 8)), recorded) == []
    assert said_of_other_steps(compose(), tmp_path / "none.yaml") == []
    [said] = said_of_other_steps(compose(*way(2, 1, 4)), recorded)
    assert "as 2 x 1 x 4 (processes x batch x accumulation) now, and were as 1 x 1 x 8" in said
    assert "are the same, but sums over them are rounded otherwise" in said
    [said] = said_of_other_steps(compose(*way(2, 1, 8)), recorded)
    assert said.startswith("warning a step has 16 samples now, and had 8: from here on its clips")
