"""The planned time: what takes it, and what others have measured."""

import dataclasses

import pytest
import torch

from cogvx.options import cards
from cogvx.options.cards import CARDS, RAM_GB_PER_SECOND
from cogvx.options.train import Attention
from cogvx.plan import phases, traces
from cogvx.plan.allocator import GIB, Peak
from cogvx.plan.configs import configs_of, layers_of
from cogvx.plan.found import Moved, Phase, Work
from cogvx.plan.phases import run_phases
from cogvx.plan.times import Times, times_on

H100 = CARDS["h100_80gb"]


def doing(work: dict | None = None, moved: Moved | None = None) -> Phase:
    return Phase("train", Peak(0, 0), {}, work or {}, moved or Moved())


def times(**seconds) -> Times:
    return Times(
        **{**dict.fromkeys((field.name for field in dataclasses.fields(Times)), 0.0), **seconds}
    )


def test_copies_beside_the_computation_count_only_where_they_are_longer():
    assert times(arithmetic=3.0, memory=1.0, to_card=3.5, to_ram=3.9).total == 4.0
    assert times(arithmetic=3.0, memory=1.0, to_card=5.0, to_ram=3.0).total == 5.0
    assert times(arithmetic=3.0, to_card=2.0, waiting=1.0, in_ram=0.5).total == 4.5


def test_a_step_says_what_it_is_made_of():
    assert (
        times(arithmetic=3.0, memory=4.0).in_words() == "the card's memory 4.0 s, arithmetic 3.0 s"
    )
    assert times(arithmetic=3.0, to_card=2.0).in_words() == (
        "arithmetic 3.0 s; copies between RAM and the card (2.0 s) are hidden behind it"
    )
    assert times(arithmetic=3.0, to_card=9.0, in_ram=2.0).in_words() == (
        "copies between RAM and the card 9.0 s, arithmetic 3.0 s beside them; "
        "then the optimizer on the CPU 2.0 s"
    )
    assert times(memory=3.0, waiting=1.0).in_words() == (
        "the card's memory 3.0 s; then waiting for copies 1.0 s"
    )


def test_all_layers_are_alike_but_the_longer_part_may_change():
    """Copies that are hidden at two layers may be the longer part at forty."""
    two, three = times(arithmetic=5.0, to_card=2.0), times(arithmetic=6.0, to_card=4.0)
    whole = two.at_layers(42, three)
    assert (whole.computing, whole.copying, whole.total) == (45.0, 82.0, 82.0)


@pytest.mark.parametrize(
    ("wanted", "forward", "backward"),
    [
        ("flash", 324, 291),
        ("cudnn", 413, 433),
        ("fa3", 497, 474),
        ("auto", 413, 433),
    ],
)
def test_attention_runs_at_the_rate_of_the_kernel_that_is_taken(wanted, forward, backward):
    for name, tflops in (("", forward), ("_backward", backward)):
        op = f"_scaled_dot_product_flash_attention{name}"
        work = {(op, "bfloat16"): Work(flops=10**15, bytes=1, count=1)}
        found = times_on(H100, doing(work), Attention[wanted])
        assert found.arithmetic == pytest.approx(1000 / tflops)


def test_fp32_runs_without_tf32():
    work = {("mm", dtype): Work(10**15, 1, 1) for dtype in ("float32", "bfloat16")}
    fp32, bf16 = (
        times_on(H100, doing({key: w}), Attention.auto).arithmetic for key, w in work.items()
    )
    assert fp32 / bf16 == pytest.approx(989 / 67)


def test_copies_take_the_time_of_the_cards_link():
    moved = Moved(to_device=10**11, to_host=2 * 10**11, waited_for=10**10, within_host=4 * 10**10)
    for name, rate in (
        ("h100_80gb", 50),
        ("a100_80gb", 25),
        ("rtx4060_8gb", 12.5),
        ("t4_16gb", 12),
    ):
        found = times_on(CARDS[name], doing(moved=moved), Attention.auto)
        assert found.to_card == pytest.approx(100 / rate)
        assert found.to_ram == pytest.approx(200 / rate)
        assert found.waiting == pytest.approx(10 / rate)
        assert found.in_ram == pytest.approx(40 / RAM_GB_PER_SECOND)


def traced(config, phase: str, layers: int) -> Phase:
    return traces.outcome_of(run_phases(config, [phase], layers=layers)).phase(phase)


# -- what is copied ------------------------------------------------------------------------------

SMALL = ["data.max_num_frames=9", "data.height=64", "data.width=64", "data.fps=8"]


@pytest.fixture
def moved(compose, nano_folder):
    """moved(layers, "memory.stream_weights=true", ...): what a step of nano copies."""
    from accelerate.state import AcceleratorState

    def trace(layers: int, *overrides: str) -> Moved:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = compose("model=2b", f"model.path='{nano_folder}'", BF16, *SMALL, *overrides)
        return run_phases(config, ["train"], layers=layers).moved["train"]

    return trace


def of_a_layer(moved, *overrides: str) -> Moved:
    """What one more layer copies."""
    fewer, more = (dataclasses.astuple(moved(layers, *overrides)) for layers in (3, 4))
    return Moved(*(b - a for a, b in zip(fewer, more, strict=True)))


def planned_block(compose, nano_folder):
    configs = configs_of(compose(f"model.path='{nano_folder}'"))
    model = phases.PlannedModel(phases.CPU, phases.CPU, torch.float32, configs).transformer()
    return model.transformer_blocks[0], configs["transformer"]


@pytest.mark.slow
def test_streamed_weights_go_to_the_device_in_both_passes(moved, compose, nano_folder):
    found = of_a_layer(moved, AGAIN, "memory.stream_weights=true")
    block, _ = planned_block(compose, nano_folder)
    weights = sum(parameter.numel() for parameter in block.parameters())
    assert found.to_device == pytest.approx(2 * 2 * weights, rel=0.1)
    assert found.to_host == found.waited_for == 0


@pytest.mark.slow
def test_offloaded_inputs_go_out_and_come_back(moved, compose, nano_folder):
    found = of_a_layer(moved, AGAIN, "memory.offload_activations=true")
    _, config = planned_block(compose, nano_folder)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    # 3 latent frames of 64 x 64 pixels, in tokens of 8 x 2 pixels a side or more, and the prompt.
    assert found.to_host == found.to_device > 0 and found.to_host % (2 * width) == 0
    assert found.waited_for == 0


@pytest.mark.slow
def test_an_offloaded_optimizer_copies_gradients_out_and_weights_in(moved, compose, nano_folder):
    settings = ["lora=null", AGAIN, "memory.offload_optimizer=true"]
    found = of_a_layer(moved, *settings)
    block, _ = planned_block(compose, nano_folder)
    weights = sum(parameter.numel() for parameter in block.parameters())
    # fp32 gradients beside the computation; bf16 weights after the optimizer's step.
    assert found.to_host == 4 * weights and found.waited_for == 2 * weights
    # AdamW reads four tensors and writes four, and the weights are rounded.
    assert 28 * weights < found.within_host < 60 * weights


@pytest.mark.slow
def test_math_is_as_slow_as_it_is_and_keeps_every_score(compose):
    """Two layers of 2b at full size: 30 heads of 17,776 x 17,776 scores are 35 GiB in fp32."""
    found = {}
    for kernel in ("auto", "math"):
        config = compose("model=2b", BF16, AGAIN, f"train.attention={kernel}")
        phase = traced(config, "train", 2)
        seconds = times_on(H100, phase, config.train.attention).total
        found[kernel] = seconds, phase.peak.allocated / GIB
    assert found["math"][0] > 2 * found["auto"][0]
    assert found["math"][1] > 35 > 7 * found["auto"][1]


@pytest.mark.slow
def test_without_offloading_nothing_is_copied(moved):
    assert of_a_layer(moved, AGAIN) == Moved()


# -- beside what others have measured ------------------------------------------------------------

BF16 = "train.mixed_precision=bf16"
AGAIN = "memory.gradient_checkpointing=true"
# The row in cards.py: the card, the kernel, the run.
STEPS = {
    "5B LoRA, a step, H100": ("h100_80gb", Attention.flash, ["model=5b", BF16, AGAIN]),
    "1.5-5B LoRA, a step, A800": ("a100_80gb", Attention.flash, ["model=1_5_5b", BF16, AGAIN]),
    "5B image-to-video LoRA, a step": (
        "rtx4090_24gb",
        Attention.flash,
        ["model=5b_i2v", BF16, AGAIN],
    ),
}


def of_whole_model(config, phase: str, card: str, kernel: Attention) -> Times:
    two, three = (times_on(CARDS[card], traced(config, phase, n), kernel) for n in (2, 3))
    return two.at_layers(layers_of(config), three)


def in_table(row: str) -> tuple[float, float]:
    """Published and planned seconds, as cards.py has them."""
    [line] = [line for line in cards.__doc__.splitlines() if line.startswith(f"| {row}")]
    published, planned = line.strip("| ").split(" | ")[1:]
    return float(published.split()[1]), float(planned.split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("row", STEPS)
def test_published_steps_take_about_as_long_as_planned(compose, row):
    card, kernel, settings = STEPS[row]
    found = of_whole_model(compose(*settings), "train", card, kernel).total
    published, planned = in_table(row)
    assert found == pytest.approx(planned, rel=0.02)
    assert abs(found / published - 1) < 0.20


@pytest.mark.slow
def test_published_inference_takes_about_as_long_as_planned(compose, monkeypatch):
    config, found = compose("model=5b", BF16), {}
    for card in ("a100_80gb", "h100_80gb"):
        for steps in (1, 2):
            monkeypatch.setattr(phases, "STEPS_OF_VIDEO", steps)
            found[card, steps] = of_whole_model(config, "video", card, Attention.flash).total
    for card, row in (("a100_80gb", "CogVideoX-5B, 50 steps"), ("h100_80gb", "the same on H100")):
        seconds = found[card, 1] + 49 * (found[card, 2] - found[card, 1])
        published, planned = in_table(row)
        assert seconds == pytest.approx(planned, rel=0.02)
        assert abs(seconds / published - 1) < 0.20
