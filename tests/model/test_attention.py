"""Which kernel computes attention: asked for, measured, recorded. Nothing here needs a GPU."""

import dataclasses
import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import model_of
from test_blocks import CPU, PLAIN, answer_and_gradients
from torch.nn import attention as torch_attention
from torch.nn.attention import _registry

from cogvx.errors import UserError
from cogvx.files import read_json
from cogvx.model import attention, blocks
from cogvx.model.attention import KernelChoice
from cogvx.options.cards import AMPERE, CARDS, GENERATIONS, generation_of
from cogvx.options.memory import Recompute
from cogvx.options.train import Attention
from cogvx.records import record
from cogvx.training import kernel as kernels

CUDA = torch.device("cuda")
SHAPE = (1, 30, 17776, 64)


# -- a kernel of a package, in the place of torch's flash attention ------------------------------


class FakeKernel:
    """As FA3 and FA4 do it: other kernels for torch's own operations, taken back on removal."""

    def __init__(self):
        self.calls = {"forward": 0, "backward": 0}

    def register(self):
        library = torch.library.Library("aten", "IMPL", "CPU")
        name = "_scaled_dot_product_flash_attention_for_cpu"
        library.impl(name, self.forward, "CPU")
        library.impl(f"{name}_backward", self.backward, "CPU")
        handle = SimpleNamespace(library=library)
        handle.remove = lambda: setattr(handle, "library", None)
        return handle

    def forward(self, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        self.calls["forward"] += 1
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    def backward(self, grad, q, k, v, out, lse, p, causal, *, attn_mask=None, scale=None):
        self.calls["backward"] += 1
        scale = q.shape[-1] ** -0.5
        weights = (q @ k.transpose(-1, -2) * scale - lse[..., None]).exp()
        change = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True))
        return scale * change @ k, scale * change.transpose(-1, -2) @ q, weights.mT @ grad


@pytest.fixture
def fake(monkeypatch):
    """FA3 as this process could use it."""
    made = FakeKernel()
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", made.register)
    monkeypatch.setattr(attention, "missing_for", lambda kernel, device: None)
    yield made
    assert torch_attention.current_flash_attention_impl() is None


def test_a_packages_kernel_runs_only_within_its_context(fake):
    tokens = torch.randn(1, 2, 40, 32)

    def run():
        return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    own = run()
    with attention.using(Attention.fa3):
        found = run()
        assert attention.in_use(2, 32, CPU, torch.float32) is Attention.fa3
        assert not torch.backends.cuda.math_sdp_enabled()
    assert fake.calls["forward"] == 1 and torch.allclose(found, own, atol=1e-5)
    gc.collect()
    assert torch.equal(run(), own) and fake.calls["forward"] == 1
    assert attention.in_use(2, 32, CPU, torch.float32) is Attention.flash
    assert torch.backends.cuda.math_sdp_enabled()
    with pytest.raises(ZeroDivisionError), attention.using(Attention.fa3):
        raise ZeroDivisionError


def test_what_another_library_has_activated_comes_back(fake, monkeypatch):
    other = FakeKernel()
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "theirs", other.register)
    torch_attention.activate_flash_attention_impl("theirs")
    try:
        with attention.using(Attention.fa3):
            assert torch_attention.current_flash_attention_impl() == "FA3"
        assert torch_attention.current_flash_attention_impl() == "theirs"
    finally:
        torch_attention.restore_flash_attention_impl()


@pytest.mark.parametrize("recompute", [Recompute.full, Recompute.selective])
def test_results_of_a_packages_kernel_are_kept_too(fake, family_folder, compose, recompute):
    """With selective recompute every block runs the kernel once, and its logsumexp is kept."""
    memory = dataclasses.replace(PLAIN, recompute=recompute)
    family = family_folder("5b")
    layers = len(model_of(family).transformer.transformer_blocks)
    expected = answer_and_gradients(family, compose, "LoRA", None)
    with attention.using(Attention.fa3):
        found = answer_and_gradients(family, compose, "LoRA", memory)
    again = recompute is Recompute.full
    # One of the forward passes is without gradients.
    assert fake.calls == {"forward": (3 if again else 2) * layers, "backward": layers}
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_flash_attentions_own_operation_is_among_the_kept_ones():
    """FA3 and FA4 of this torch run behind it on a GPU."""
    for name in ("_fa3", "_fa4"):
        module = getattr(torch_attention, name)
        source = Path(module.__file__).read_text(encoding="utf-8")
        assert '"_scaled_dot_product_flash_attention",' in source
        assert '"_scaled_dot_product_flash_attention_backward",' in source
    assert torch.ops.aten._scaled_dot_product_flash_attention.default in blocks.ATTENTION
    assert {"FA3", "FA4"} <= {*torch_attention.list_flash_attention_impls()}


# -- asked for and not there ---------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """gpu((9, 0)): a GPU of that compute capability, as far as torch is asked about it."""

    def present(capability: tuple[int, int], name: str = "NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    present((9, 0))
    return present


@pytest.fixture
def installed(monkeypatch):
    """installed("flash_attn_interface"): modules that can be found."""

    def make(*names: str):
        monkeypatch.setattr(attention, "is_installed", lambda module: module in names)

    make()
    return make


def test_a_packages_kernel_is_refused_with_what_to_install(gpu, installed, monkeypatch):
    def said(kernel, device=CUDA):
        with pytest.raises(UserError) as refused:
            attention.require(kernel, device)
        return str(refused.value)

    assert "train.attention=fa4: it needs an NVIDIA GPU" in said(Attention.fa4, CPU)
    assert "pip install --pre flash-attn-4. Otherwise train.attention=auto" in said(Attention.fa4)
    assert "flash-attn-3 (from PyTorch's own package index for your CUDA)" in said(Attention.fa3)
    gpu((8, 9), "NVIDIA GeForce RTX 4090")
    assert "of the generation Hopper or Blackwell (B200), and this is NVIDIA GeForce RTX 4090" in (
        said(Attention.fa4)
    )
    gpu((10, 0), "NVIDIA B200")
    assert "of the generation Hopper, and this is NVIDIA B200" in said(Attention.fa3)
    installed("flash_attn.cute")
    assert "its package cannot be loaded (No module named 'flash_attn" in said(Attention.fa4)
    monkeypatch.delattr(torch_attention, "activate_flash_attention_impl")
    assert "pip install --upgrade torch" in said(Attention.fa4)


def test_torchs_own_kernels_need_no_package(gpu, installed):
    own = [kernel for kernel in Attention if kernel not in attention.PACKAGES]
    assert len(own) >= 4
    for kernel in own:
        # It would raise an error.
        attention.require(kernel, CUDA)


def test_a_package_is_found_without_loading_it(tmp_path, monkeypatch):
    inner = tmp_path / "flash_attn_of_a_test" / "cute"
    inner.mkdir(parents=True)
    (inner / "__init__.py").write_text("raise RuntimeError('loaded')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert attention.is_installed("flash_attn_of_a_test.cute")
    assert not attention.is_installed("flash_attn_of_a_test.other")
    assert not attention.is_installed("flash_attn_of_another_test.cute")
    assert "flash_attn_of_a_test.cute" not in sys.modules


def test_packages_kernels_are_refused_before_the_clips_are_read(run, capfd, monkeypatch):
    monkeypatch.setattr("cogvx.training.run.prepare", None)
    run("a", "train.attention=fa4", "train.mixed_precision=bf16", expect=2)
    assert "train.attention=fa4: it needs an NVIDIA GPU" in capfd.readouterr().err


def test_packages_kernels_compute_in_16_bits(compose):
    with pytest.raises(UserError, match=r"train.attention=fa3 computes in 16 bits"):
        compose("train.attention=fa3", "train.mixed_precision=no")


# -- the fastest ---------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch, gpu, installed):
    """timed(flash=50, cudnn=40): milliseconds of each kernel; an error is raised; None: NaN."""

    def make(**times):
        class Using:
            def __init__(self, kernel, *, others=False):
                measured.append(kernel.name)

            def __enter__(self):
                return None

            def __exit__(self, *error):
                return None

        def run(*inputs):
            time = times[measured[-1]]
            if isinstance(time, Exception):
                raise time
            off = time == "wrong"
            return [torch.full((4,), float("nan") if time is None else 1.0 + off)] * 4

        measured.clear()
        monkeypatch.setattr(attention, "using", Using)
        monkeypatch.setattr(attention, "inputs_like", lambda *given: [])
        monkeypatch.setattr(attention, "forward_and_backward", run)
        monkeypatch.setattr(attention, "milliseconds", lambda run: float(times[measured[-1]]))

    measured = []
    make.measured = measured
    return make


def test_hopper_takes_the_fastest_of_what_is_there(timed, installed):
    timed(flash=56.0, cudnn=43.0, fa3=36.0, fa4=35.0)
    choice = attention.choose(SHAPE, CUDA, torch.bfloat16)
    assert choice.kernel is Attention.cudnn and timed.measured == ["flash", "cudnn"]
    assert choice.milliseconds == {"flash": 56.0, "cudnn": 43.0}
    assert "pip install" in choice.left_out["fa3"] and "pip install" in choice.left_out["fa4"]
    installed("flash_attn.cute", "flash_attn_interface")
    choice = attention.choose(SHAPE, CUDA, torch.bfloat16)
    assert choice.kernel is Attention.fa4 and choice.left_out == {}


def test_a_kernel_that_fails_or_computes_something_else_is_left_out(timed, installed):
    installed("flash_attn.cute", "flash_attn_interface")
    timed(flash=56.0, cudnn=RuntimeError("No execution plans\nmore"), fa3="wrong", fa4=None)
    choice = attention.choose(SHAPE, CUDA, torch.bfloat16)
    assert choice.kernel is Attention.flash and choice.milliseconds == {"flash": 56.0}
    assert choice.left_out["cudnn"] == "No execution plans"
    assert choice.left_out["fa3"] == "its results differ from other kernels': 100%"
    assert "differ" in choice.left_out["fa4"]
    # The first one is compared with itself.
    timed(flash=None, cudnn=43.0, fa3=50.0, fa4=50.0)
    choice = attention.choose(SHAPE, CUDA, torch.bfloat16)
    assert choice.kernel is Attention.cudnn and "differ" in choice.left_out["flash"]
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    timed(**dict.fromkeys(("flash", "cudnn", "fa3", "fa4"), out_of_memory))
    assert attention.choose(SHAPE, CUDA, torch.bfloat16).kernel is Attention.auto


@pytest.mark.parametrize(
    ("capability", "kernel", "measured"),
    [
        ((7, 5), Attention.auto, []),  # torch's efficient attention
        ((8, 0), Attention.flash, []),
        ((8, 9), Attention.flash, []),
        ((9, 0), Attention.cudnn, ["flash", "cudnn"]),
        ((10, 3), Attention.cudnn, ["flash", "cudnn", "fa4"]),
        ((12, 0), Attention.cudnn, ["flash", "cudnn"]),
        ((13, 0), Attention.auto, []),
    ],
)
def test_the_kernels_that_come_into_question(timed, gpu, installed, capability, kernel, measured):
    installed("flash_attn.cute")
    gpu(capability)
    timed(flash=3.0, cudnn=1.0, fa4=2.0)
    found = attention.choose(SHAPE, CUDA, torch.float16)
    # On Hopper the package is there too.
    measured = [*measured, "fa4"] if capability == (9, 0) else measured
    assert (found.kernel, timed.measured) == (kernel, measured)


def test_a_cpu_and_32_bits_are_left_to_torch(gpu):
    assert attention.choose(SHAPE, CPU, torch.bfloat16) == KernelChoice(Attention.auto)
    assert attention.choose(SHAPE, CUDA, torch.float32) == KernelChoice(Attention.auto)


def test_what_is_measured_is_a_forward_and_a_backward_pass_as_in_a_block():
    inputs = attention.inputs_like((2, 3, 16, 8), CPU, torch.float32)
    query, key, value, _ = (each.clone().requires_grad_() for each in inputs)
    assert [each.is_contiguous() for each in inputs] == [True, True, False, False]
    scores = (query @ key.mT / 8**0.5).softmax(-1) @ value
    expected = [scores.detach(), *torch.autograd.grad(scores, [query, key, value], inputs[3])]
    found = attention.forward_and_backward(*inputs)
    assert attention.most_different(found, expected) < 1e-5
    found[2][0, 0] = 0
    assert attention.most_different(found, expected) > 0.1


def test_the_clock_starts_after_the_warm_up(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("synchronize")

        def elapsed_time(self, end):
            return 30.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert attention.milliseconds(lambda: done.append("run")) == 30.0 / attention.TIMED
    assert done == ["run"] * 2 + ["record"] + ["run"] * 3 + ["record", "synchronize"]


# -- the choice of a run -------------------------------------------------------------------------


class OneRank:
    logs, count = True, 1

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)

    def of_first(self, value):
        return value


@pytest.fixture
def choosing(monkeypatch, gpu, installed, compose):
    """choosing(folder): the lines that are said, and the calls of using() and choose()."""

    def choose(folder, *settings, earlier=(), ranks=None, device=CUDA):
        ranks, used, asked = ranks or OneRank(), [], []

        class Using:
            def __init__(self, kernel, *, others=False):
                used.append((kernel, others))

            def __enter__(self):
                return None

            def __exit__(self, *error):
                used.append("restored")

        def measured(*given):
            asked.append(given)
            return choosing_result[0]

        monkeypatch.setattr(attention, "using", Using)
        monkeypatch.setattr(attention, "choose", measured)
        config = compose("model=5b", "data.instance_data_root=/clips", *settings)
        geometry = SimpleNamespace(
            heads=48, head_dim=64, tokens=lambda **size: 226 + sum(size.values())
        )
        pretrained = SimpleNamespace(device=device, dtype=torch.bfloat16, geometry=lambda: geometry)
        with kernels.chosen_attention(config, pretrained, folder, ranks, list(earlier)):
            pass
        return SimpleNamespace(lines=ranks.lines, used=used, asked=asked)

    choosing_result = [
        KernelChoice(Attention.cudnn, {"flash": 56.0, "cudnn": 43.0}, {"fa4": "not installed"})
    ]
    choose.result = choosing_result
    return choose


def test_the_fastest_kernel_is_said_recorded_and_taken_again(choosing, tmp_path):
    first = choosing(tmp_path, "train.train_batch_size=2")
    assert first.used == [(Attention.cudnn, True), "restored"]
    assert first.asked == [((2, 48, 226 + 49 + 480 + 720, 64), CUDA, torch.bfloat16)]
    assert first.lines[0].endswith("forward and backward: cudnn 43.0 ms, flash 56.0 ms")
    assert first.lines[1] == "speed   attention: fa4 is left out: not installed"
    about = read_json(tmp_path / record.ENVIRONMENT)["attention"]
    assert about == {
        "kernel": "cudnn",
        "milliseconds": {"flash": 56.0, "cudnn": 43.0},
        "left_out": {"fa4": "not installed"},
        "device": "NVIDIA H100 80GB HBM3",
    }
    again = choosing(tmp_path)
    assert (again.used, again.asked) == (first.used, [])
    assert again.lines == ["speed   attention: cudnn is recorded, nothing is measured"]


def test_a_run_takes_the_kernel_of_the_run_that_it_goes_on_with(choosing, tmp_path):
    choosing(tmp_path / "first")
    second = choosing(tmp_path / "second", earlier=[tmp_path / "none", tmp_path / "first"])
    assert second.asked == [] and second.used[0] == (Attention.cudnn, True)
    recorded = [
        read_json(tmp_path / name / record.ENVIRONMENT)["attention"] for name in ("first", "second")
    ]
    assert recorded[0] == recorded[1]


def test_another_card_is_measured_anew(choosing, gpu, tmp_path):
    choosing(tmp_path)
    gpu((10, 0), "NVIDIA B200")
    assert len(choosing(tmp_path).asked) == 1
    assert read_json(tmp_path / record.ENVIRONMENT)["attention"]["device"] == "NVIDIA B200"


def test_a_recorded_kernel_that_is_gone_is_named_and_another_one_chosen(choosing, tmp_path):
    choosing.result[0] = KernelChoice(Attention.fa4, {"cudnn": 43.0, "fa4": 35.0})
    choosing(tmp_path)
    choosing.result[0] = KernelChoice(Attention.cudnn, {"cudnn": 43.0, "flash": 56.0})
    found = choosing(tmp_path)
    assert found.lines[0].startswith("speed   attention: fa4 was recorded, but its package is not")
    assert found.used[0] == (Attention.cudnn, True) and len(found.asked) == 1
    assert read_json(tmp_path / record.ENVIRONMENT)["attention"]["kernel"] == "cudnn"


def test_a_single_kernel_is_taken_without_a_word(choosing, tmp_path):
    choosing.result[0] = KernelChoice(Attention.flash)
    for _ in range(2):
        found = choosing(tmp_path)
        assert found.lines == [] and found.used[0] == (Attention.flash, True)


def test_on_a_cpu_and_by_name_nothing_is_measured_or_recorded(choosing, tmp_path):
    assert choosing(tmp_path, device=CPU).used[0] == (Attention.auto, False)
    asked = choosing(tmp_path, "train.attention=cudnn")
    assert asked.used[0] == (Attention.cudnn, False) and asked.asked == asked.lines == []
    assert not (tmp_path / record.ENVIRONMENT).exists()


def test_the_other_processes_follow_the_first(choosing, tmp_path):
    class Second(OneRank):
        logs, count = False, 2

        def of_first(self, value):
            assert value is None, "only the first one measures"
            return (["said"], KernelChoice(Attention.fa4, {"fa4": 1.0}))

    found = choosing(tmp_path, ranks=Second())
    assert found.used[0] == (Attention.fa4, True) and found.asked == []
    assert not (tmp_path / record.ENVIRONMENT).exists()


def test_other_kernels_stand_in_where_the_chosen_one_cannot_run():
    before = torch._C._get_sdp_priority_order()
    with attention.using(Attention.cudnn, others=True):
        first = torch_attention.SDPBackend(torch._C._get_sdp_priority_order()[0])
        assert first == torch_attention.SDPBackend.CUDNN_ATTENTION
        assert torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert torch._C._get_sdp_priority_order() == before


# -- cards ---------------------------------------------------------------------------------------


def test_every_card_has_the_rates_of_the_kernel_that_runs():
    for name, card in CARDS.items():
        generation = card.generation
        assert generation.usual in generation.attention, name
        assert generation.usual not in attention.PACKAGES, name
        for kernel, shares in generation.attention.items():
            assert all(0 < share < 1 for share in shares)
            if kernel in attention.PACKAGES:
                assert {*generation.majors} & {*attention.PACKAGES[kernel].majors}
    majors = [major for generation in GENERATIONS for major in generation.majors]
    assert len(majors) == len({*majors})
    assert generation_of(8) is AMPERE and generation_of(6) is None
    assert CARDS["h100_80gb"].generation.kernel(Attention.auto) is Attention.cudnn
    assert CARDS["h100_80gb"].generation.kernel(Attention.fa3) is Attention.fa3
    assert CARDS["rtx4090_24gb"].generation.kernel(Attention.fa3) is Attention.flash
