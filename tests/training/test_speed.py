"""What makes a step fast changes no result, and nothing in a step waits for the device."""

import json
import os
import signal
import socket
import time
import types
from pathlib import Path

import pytest
import torch
import warm
from device_reads import watched
from families import model_of
from torch.distributed import ReduceOp
from torch.utils._python_dispatch import _disable_current_modes

from cogvx.errors import UserError
from cogvx.files import read_json, read_json_lines
from cogvx.model import attention, blocks, full, lora, nano
from cogvx.options.cards import CARDS, named
from cogvx.options.train import Attention
from cogvx.plan.clock import Expectation
from cogvx.records import record
from cogvx.training import prepare, ranks, timing, trainer
from cogvx.training import run as training_run

SHORT = ["train.max_train_steps=12", "train.logging_steps=6", "validation.heldout_steps=12"]


def losses(folder) -> list:
    return [line["loss"] for line in read_json_lines(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "waits"),
    [
        ([], False),
        (
            ["optimizer=adam", "train.gradient_accumulation_steps=2", "train.max_grad_norm=null"],
            False,
        ),
        (["lora=null", "memory.gradient_checkpointing=true"], False),
        pytest.param(["model=nano_i2v", "train.min_snr_gamma=5"], False, marks=pytest.mark.slow),
        (["optimizer=prodigy"], True),  # it cannot leave out a step by itself
    ],
)
def test_a_step_reads_nothing_from_the_device(run, monkeypatch, settings, waits):
    step, found = trainer.Trainer.optimizer_step, []

    def watched_step(self):
        with watched() as reads:
            rate = step(self)
        found.append(reads.count)
        return rate

    read_tensor = prepare.read_tensor

    def from_disk(*given):  # into the host's memory
        with _disable_current_modes():
            return read_tensor(*given)

    monkeypatch.setattr(trainer.Trainer, "optimizer_step", watched_step)
    monkeypatch.setattr(prepare, "read_tensor", from_disk)
    run("a", "train.max_train_steps=4", *settings)
    assert len(found) >= 4 and (sum(found) > 0) == waits


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [None, 1])
def test_the_processes_of_a_run_read_nothing_from_the_device_either(compose, tmp_path, stopped):
    """They agree in every step whether to go on. A signal to one stops all after the same step."""
    two = ["parallel=ddp", "parallel.num_processes=2", "train.max_train_steps=5"]
    few = ["validation.num_validation_videos=0", "validation.scored_prompts=0"]
    folder = record.open_folder(compose(*two, *few, f"output_dir='{tmp_path / 'run'}'"))
    script, signalled = Path(__file__).with_name("watched_rank.py"), [stopped] * bool(stopped)
    both = [
        warm.python(script, folder, *signalled, env=os.environ | environment)
        for environment in ranks_of_two()
    ]
    codes = [rank.wait(timeout=300) for rank in both]
    found = [read_json(folder / f"reads_{rank}.json") for rank in (0, 1)]
    steps = 3 if stopped else 5
    assert codes == [128 + signal.SIGTERM if stopped else 0] * 2
    assert found == [{"reads": [0] * steps, "gathered": 0}] * 2


def ranks_of_two() -> list[dict[str, str]]:
    """The environment of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    both |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [both | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def test_on_gpus_the_hosts_have_a_group_of_their_own(monkeypatch):
    """NCCL would send a number through the device."""
    asked = []
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(ranks.dist, "new_group", lambda **how: asked.append(how) or "the hosts")

    def all_reduce(tensor, operation, group):
        assert (tensor.device.type, operation, group) == ("cpu", ReduceOp.MAX, "the hosts")
        tensor.fill_(15)

    monkeypatch.setattr(ranks.dist, "all_reduce", all_reduce)
    two = types.SimpleNamespace(num_processes=2, device=torch.device("meta"))
    assert ranks.Ranks(two, ranks.host_group()).highest(0) == 15
    assert asked == [{"backend": "gloo", "timeout": ranks.LONGEST_WAIT}]
    monkeypatch.setattr(ranks.dist, "get_backend", lambda: "gloo")
    assert ranks.host_group() is None


# -- attention -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kernel_of_attention_gives_the_same_and_is_named(run, capfd):
    folders = {
        kind: run(kind, *SHORT, f"train.attention={kind}") for kind in ("auto", "flash", "math")
    }
    said = capfd.readouterr().out
    assert (
        said.count("speed   attention by flash") == 2
        and said.count("speed   attention by math") == 1
    )
    assert losses(folders["auto"]) == losses(folders["flash"])
    assert losses(folders["flash"]) != losses(folders["math"]), "another kernel rounds otherwise"
    assert all(
        abs(a - b) < 1e-5
        for a, b in zip(losses(folders["flash"]), losses(folders["math"]), strict=True)
    )
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled(), (
        "put back afterwards"
    )


def test_a_kernel_that_is_not_there_is_refused_in_words(run, capfd):
    run("a", *SHORT, "train.attention=cudnn", expect=2)
    assert "train.attention: no such kernel on cpu" in capfd.readouterr().err
    with (
        attention.using(Attention.efficient),
        pytest.raises(UserError, match="auto takes the fastest"),
    ):
        attention.in_use(2, 32, torch.device("cpu"), torch.float32)


def test_the_sine_table_of_another_size_is_computed_once(family_folder, compose):
    plain, ours = model_of(family_folder("2b")), model_of(family_folder("2b"))
    real, calls = ours.transformer.patch_embed._get_positional_embeddings, []
    ours.transformer.patch_embed._get_positional_embeddings = lambda *given, **named: (
        calls.append(given),
        real(*given, **named),
    )[1]
    blocks.arrange(ours.transformer, compose().memory, recompute=False, device=torch.device("cpu"))
    latents = torch.randn(1, 3, 16, 10, 14)  # not the checkpoint's 12 x 16
    for _ in range(3):
        answers = [
            m.predict_velocity(
                latents, None, torch.ones(1, nano.TEXT_TOKENS, nano.TEXT_WIDTH), torch.tensor([5])
            )
            for m in (plain, ours)
        ]
        assert torch.equal(*answers)
    assert len(calls) == 1


@pytest.mark.slow
def test_nothing_in_a_run_puts_a_weight_into_words(run, monkeypatch):
    """As the text of a signal's handler would: it reads every weight from the device."""
    worded, real = [], torch.Tensor.__repr__

    def repr_of(tensor, **how):
        worded.append(tensor.shape)
        return real(tensor, **how)

    monkeypatch.setattr(torch.Tensor, "__repr__", repr_of)
    run("a", "train.max_train_steps=3")
    assert worded == []
    assert repr(torch.nn.Parameter(torch.ones(3))) and worded, "it would have been seen"


# -- compiling -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        [],
        ["memory.gradient_checkpointing=true"],
        ["memory=minimal", "memory.feed_forward_chunks=1"],
        ["lora=null"],
    ],
)
def test_compiled_blocks_train_as_others_do(run, stopped, kind):
    torch._dynamo.utils.counters.clear()
    torch._dynamo.reset()  # as in a process of its own
    settings = [*SHORT, "train.checkpointing_steps=6", *kind]
    plain, compiled = run("plain", *settings), run("compiled", *settings, "train.compile=true")
    assert len(losses(plain)) == 2
    assert all(abs(a - b) < 1e-4 for a, b in zip(losses(plain), losses(compiled), strict=True))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
    stopped("resumed", compiled, 6)
    resumed = run("resumed", *settings, "train.compile=true")
    assert losses(resumed) == losses(compiled), "a resumed run goes on as it was"


@pytest.mark.slow
def test_a_missing_compiler_is_said_in_words(launch, cache, tmp_path):
    """No folder of PATH has g++, and nothing is in the cache of what was compiled before."""
    nothing = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    few = [
        "validation.num_validation_videos=0",
        "validation.scored_prompts=0",
        "scheduler.lr_warmup_steps=0",
    ]
    ran = launch(
        f"data.cache_dir={cache}",
        f"output_dir={tmp_path / 'a'}",
        *SHORT,
        *few,
        "train.compile=true",
        env={**os.environ, **nothing},
    )
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert "torch cannot compile here" in ran.stderr and "train.compile=false" in ran.stderr


# -- the optimizer in the backward pass ----------------------------------------------------------

FULL = [
    "lora=null",
    "optimizer.learning_rate=1e-4",
    "train.max_grad_norm=null",
    "train.checkpointing_steps=6",
]


@pytest.mark.slow
def test_stepping_in_the_backward_pass_changes_nothing(run, stopped):
    plain, ours = (
        run("plain", *SHORT, *FULL),
        run("ours", *SHORT, *FULL, "memory.step_in_backward=true"),
    )
    assert lora.compare(dict(full.saved(plain)), dict(full.saved(ours)), values=True) == []
    norms = [
        [m["grad_norm"] for m in read_json_lines(f / "metrics.jsonl") if "grad_norm" in m]
        for f in (plain, ours)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    stopped("resumed", ours, 6)
    resumed = run("resumed", *SHORT, *FULL, "memory.step_in_backward=true")
    assert lora.compare(dict(full.saved(plain)), dict(full.saved(resumed)), values=True) == []


@pytest.mark.slow
def test_a_loss_that_is_not_finite_changes_no_weight_in_the_backward_pass_either(run, monkeypatch):
    real, count = trainer.training_losses, iter(range(100))

    def spoilt(*given):
        losses, timesteps = real(*given)
        return losses * (float("nan") if next(count) else 1.0), timesteps

    monkeypatch.setattr(trainer, "training_losses", spoilt)
    settings = [
        *FULL,
        "memory.step_in_backward=true",
        "data.validation_fraction=0",
        "scheduler.lr_warmup_steps=0",
    ]
    folder = run("a", *settings, "train.max_train_steps=6")
    count = iter(range(100))
    one = run("b", *settings, "train.max_train_steps=1")
    assert lora.compare(dict(full.saved(folder)), dict(full.saved(one)), values=True) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "needs lora=null, train.max_grad_norm=null"),
        (
            ["lora=null", "optimizer=schedule_free"],
            "needs optimizer=adam or adamw, train.max_grad_norm=null",
        ),
        (
            [*FULL[:3], "train.gradient_accumulation_steps=2"],
            "needs train.gradient_accumulation_steps=1",
        ),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(compose, settings, said):
    with pytest.raises(UserError, match=said):
        compose("memory.step_in_backward=true", *settings)


# -- the clock -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_slow_steps_are_said_once_with_their_cause(run, monkeypatch, capfd):
    assert (
        timing.slow_step_warning(1.9, 0.0, 1.0) is None
        and timing.slow_step_warning(100.0, 0.0, None) is None
    )
    assert "a step takes 2.1 s where the plan for this card says 1.0 s" in timing.slow_step_warning(
        2.1, 0.1, 1.0
    )
    assert (
        "1.5 s of it wait for data: put data.cache_dir on a local disk"
        in timing.slow_step_warning(2.1, 1.5, 1.0)
    )
    train_model = training_run.train_model
    monkeypatch.setattr(
        training_run,
        "train_model",
        lambda config, folder, expected: train_model(config, folder, lambda: 1e-6),
    )
    run("a", *SHORT, "train.logging_steps=2")
    assert capfd.readouterr().out.count("warning a step takes") == 1


@pytest.mark.parametrize(
    ("device", "gib", "card"),
    [
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090_24gb"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100_80gb"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100_40gb"),
        ("NVIDIA H100 80GB HBM3", 79.2, "h100_80gb"),
        ("NVIDIA L40S", 44.4, "l40s_48gb"),
        ("NVIDIA GeForce RTX 3060", 11.8, "rtx3060_12gb"),
        ("NVIDIA GeForce RTX 4080 SUPER", 15.7, "rtx4080_16gb"),
        ("NVIDIA GeForce RTX 3080", 9.8, None),
        ("NVIDIA GeForce RTX 4060", 7.6, "rtx4060_8gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "rtx4060_ti_16gb"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 15.6, "rtx4070_ti_super_16gb"),
        ("NVIDIA GeForce RTX 5090", 31.4, "rtx5090_32gb"),
        ("NVIDIA RTX A6000", 47.5, "rtx_a6000_48gb"),
        ("NVIDIA RTX 6000 Ada Generation", 47.4, "rtx6000_ada_48gb"),
        ("NVIDIA A10G", 22.1, "a10g_24gb"),
        ("NVIDIA A10", 22.1, None),
        ("NVIDIA L4", 22.0, "l4_24gb"),
        ("NVIDIA L40", 44.4, None),
        ("Tesla T4", 14.6, "t4_16gb"),
        ("Tesla V100-SXM2-32GB", 31.7, "v100_32gb"),
        ("Tesla V100-SXM2-16GB", 15.8, "v100_16gb"),
        ("NVIDIA H200", 139.8, "h200_141gb"),
        ("NVIDIA B200", 178.4, "b200_180gb"),
        ("NVIDIA GH200 480GB", 94.5, None),
    ],
)
def test_cards_are_known_by_the_names_cuda_gives_them(device, gib, card):
    assert named(device, gib) == card


@pytest.mark.slow
def test_the_expectation_is_the_plans_also_in_a_rank(compose, nano_folder, tmp_path, monkeypatch):
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    from accelerate.state import AcceleratorState

    from cogvx.plan.traces import step_seconds

    AcceleratorState._reset_state(reset_partial_state=True)
    small = [
        "data.max_num_frames=9",
        "data.height=64",
        "data.width=64",
        "data.fps=8",
        "train.mixed_precision=bf16",
    ]
    config = compose(
        "model=2b", f"model.path='{nano_folder}'", *small, f"output_dir='{tmp_path / 'run'}'"
    )
    folder = record.open_folder(config)
    with monkeypatch.context() as environment:
        for name, text in rank.items():
            environment.setenv(name, text)
        started = Expectation(folder, "rtx4090_24gb")
    with started as expected:
        deadline = time.monotonic() + 120
        while expected() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert expected() == pytest.approx(step_seconds(config, CARDS["rtx4090_24gb"]), rel=1e-6)
    assert read_json(folder / record.ENVIRONMENT)["planned_seconds_per_step"] == round(
        expected(), 3
    )
    with Expectation(folder, None) as unknown:
        assert unknown() is None


def test_the_progress_bars_forecast_leaves_validation_out():
    bar = types.SimpleNamespace(start_t=0.0, last_print_t=0.0, disable=False)
    timer = timing.StepTimer(lambda: None, first_step=0)
    timer.start(bar)
    started = timer.started
    with timer.paused():
        time.sleep(0.05)
    assert bar.start_t == bar.last_print_t >= 0.05
    assert timer.started - started == pytest.approx(bar.start_t)


@pytest.mark.slow
def test_a_profile_says_where_the_time_of_some_steps_went(run, trained, capfd):
    folder = run("a", *SHORT, "train.profile_steps=2")
    assert "operations.txt lists where the time of 2 steps went" in capfd.readouterr().out
    assert "aten::addmm" in (folder / "profile" / "operations.txt").read_text()
    names = {
        event.get("name")
        for event in json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]
    }
    assert "aten::scaled_dot_product_attention" in names
    assert losses(folder) == losses(trained(*SHORT))
