"""train.deterministic: what is in force during a run, and what is said where it cannot be."""

import os
from types import SimpleNamespace

import pytest
import torch

from cogvx import start
from cogvx.errors import UserError
from cogvx.options import tasks
from cogvx.options.train import Attention
from cogvx.runs import processes
from cogvx.training import kernel
from cogvx.training.deterministic import WORKSPACE, deterministic_kernels


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    # Set first, so that it is removed afterwards too.
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)


def in_force() -> dict:
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
        "workspace": os.environ.get(WORKSPACE),
    }


@pytest.mark.parametrize("task", [tasks.TrainTask, tasks.EncodeTask, tasks.EvaluateTask])
def test_it_is_in_force_in_a_run_that_asks_for_it_and_in_no_other(task, monkeypatch, tmp_path):
    found = []
    monkeypatch.setitem(start.STARTS_BY_TASK, task, lambda *given: found.append(in_force()))
    before = in_force()
    for asked in (False, True, False):
        train = SimpleNamespace(deterministic=asked, compile=False)
        start.start_task(SimpleNamespace(task=task.__new__(task), train=train), tmp_path)
    workspace = {"workspace": ":4096:8"}
    strict = {"algorithms": True, "cudnn": True, "benchmark": False, "filled": False} | workspace
    assert found == [before, strict, before | workspace]


def test_a_compiled_run_takes_no_kernel_by_the_clock():
    from torch._inductor import config

    before = config.deterministic
    with deterministic_kernels(compiled=True):
        assert config.deterministic
    assert config.deterministic == before


def test_another_workspace_is_refused_in_words(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":0:0")
    said = r"CUBLAS_WORKSPACE_CONFIG=:0:0 is set here.*unset CUBLAS"
    with pytest.raises(UserError, match=said), deterministic_kernels(compiled=False):
        pass
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic_kernels(compiled=False):
        assert in_force()["workspace"] == ":16:8"


def test_an_operation_without_such_a_kernel_is_named_with_what_to_type():
    with deterministic_kernels(compiled=False), pytest.raises(RuntimeError) as raised:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    message, code = processes.explained(raised.value)
    assert code == processes.FAILED and "\n" not in message
    assert message.startswith(
        "train.deterministic=true: torch has no deterministic kernel for put_"
    )
    assert message.endswith("Without it: train.deterministic=false")


def test_attention_is_chosen_without_a_clock(compose, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel, "decide", lambda *given: pytest.fail("it measures"))
    on_a_card = SimpleNamespace(device=torch.device("cuda"))
    config = compose("train.deterministic=true")
    with kernel.chosen_attention(config, on_a_card, tmp_path, None, []):
        first = torch._C._get_sdp_priority_order()[0]
    assert first == int(kernel.attention.BACKENDS[Attention.flash])


def test_a_kernel_that_torch_would_leave_out_is_refused(compose):
    with pytest.raises(UserError, match=r"train\.attention=cudnn .* train\.attention=flash"):
        compose("train.deterministic=true", "train.attention=cudnn")
