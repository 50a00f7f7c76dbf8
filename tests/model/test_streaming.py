"""Streamed weights and offloaded inputs: the same numbers, two slots, and no data race on a GPU."""

import dataclasses
import gc
import itertools

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from families import tiny
from race import Races
from test_blocks import CPU, PLAIN

from cogvx.model import blocks, lora, offload, transfer
from cogvx.options.memory import Recompute, Storage
from cogvx.training import out_of_memory

LAYERS = 5
STREAMED = dataclasses.replace(PLAIN, stream_weights=True)


def transformer_with(memory, compose, layers=LAYERS):
    """A tiny 5b with a LoRA that changes its answers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(**tiny("5b").transformer | {"num_layers": layers})
        transformer.requires_grad_(False)
        compose("lora.rank=4").lora.attach(transformer, seed=0)
        with torch.no_grad():
            for parameter in lora.trainable(transformer):
                parameter += 0.1 * torch.randn(parameter.shape)
    blocks.arrange(transformer, memory, recompute=True, device=CPU)
    return transformer


def answer(transformer, seed=0, frames=2):
    generator = torch.Generator().manual_seed(seed)
    settings = transformer.config
    shape = (2, frames, settings.in_channels, settings.sample_height, settings.sample_width)
    latents = torch.randn(shape, generator=generator)
    text = (2, settings.max_text_seq_length, settings.text_embed_dim)
    tokens = frames * (shape[3] // 2) * (shape[4] // 2)
    angles = torch.rand(tokens, settings.attention_head_dim, generator=generator)
    return transformer(
        latents,
        torch.randn(text, generator=generator),
        torch.tensor([100, 700]),
        image_rotary_emb=(angles.cos(), angles.sin()),
        return_dict=False,
    )[0]


def trained(transformer, steps=3, micro_steps=1) -> list[torch.Tensor]:
    """Every loss, gradient, trained weight and answer of some steps, with a look in between."""
    parameters, seen = lora.trainable(transformer), []
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(steps):
        for micro_step in range(micro_steps):
            loss = answer(transformer, seed=10 * step + micro_step).square().mean()
            loss.backward()
            seen.append(loss.detach())
        seen += [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            seen += [answer(transformer), answer(transformer, seed=1, frames=3)]
    return seen + [parameter.detach().clone() for parameter in parameters]


SELDOM = [pytest.param(storage, marks=pytest.mark.slow) for storage in (Storage.fp8, Storage.nf4)]


@pytest.mark.slow
@pytest.mark.parametrize("storage", [Storage.own, Storage.int8, *SELDOM])
@pytest.mark.parametrize("chunks", [1, 3])
def test_where_weights_and_inputs_wait_changes_no_bit(storage, chunks, compose):
    base = dataclasses.replace(PLAIN, base_storage=storage, feed_forward_chunks=chunks)
    expected = trained(transformer_with(base, compose))
    for streamed, recompute, offloaded in itertools.product(
        [False, True], Recompute, [False, True]
    ):
        memory = dataclasses.replace(
            base, stream_weights=streamed, recompute=recompute, offload_activations=offloaded
        )
        found = trained(transformer_with(memory, compose))
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected)), memory


# -- how the device may run it -------------------------------------------------------------------

ALL = dataclasses.replace(STREAMED, offload_activations=True)
RACED = {
    "streamed": STREAMED,
    "streamed int8": dataclasses.replace(STREAMED, base_storage=Storage.int8),
    "streamed in chunks": dataclasses.replace(STREAMED, feed_forward_chunks=3),
    "inputs on the CPU": dataclasses.replace(PLAIN, offload_activations=True),
    "all": dataclasses.replace(ALL, feed_forward_chunks=3),
    "all, selective": dataclasses.replace(ALL, recompute=Recompute.selective),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RACED)
def test_no_copy_races_with_the_computation(name, compose, monkeypatch):
    with Races(monkeypatch) as races:
        transformer = transformer_with(RACED[name], compose)
        trained(transformer, micro_steps=2)
        with offload.offloaded(transformer, CPU):
            torch.zeros(10)
        with torch.no_grad():
            answer(transformer)
    assert races.clocks["copying"]["copying"] > 3 * LAYERS
    assert races.found == []


MISTAKES = {
    "a slot is filled while it is read": ("streamed", transfer.CopyStream, "mark"),
    "a block runs before its weights are there": ("streamed", transfer.CopyStream, "wait"),
    "inputs are sent before they are computed": ("inputs on the CPU", transfer.CopyStream, "mark"),
    "inputs are used before they are back": ("inputs on the CPU", transfer.CopyStream, "wait"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_race_would_be_found(name, compose, monkeypatch):
    """That the detector sees each of them: no event is recorded, or none is waited for."""
    memory, owner, method = MISTAKES[name]
    with Races(monkeypatch) as races:
        monkeypatch.setattr(owner, method, lambda self, *event: None)
        trained(transformer_with(RACED[memory], compose), steps=1)
    assert races.found


@pytest.mark.slow
def test_inputs_that_are_freed_while_they_are_copied_would_be_found(compose, monkeypatch):
    def let_go(self, saved):
        saved.on_device = None

    monkeypatch.setattr(blocks.InputStore, "let_go", let_go)
    with Races(monkeypatch) as races:
        trained(transformer_with(RACED["inputs on the CPU"], compose), steps=1)
    assert any(found.startswith("free on computing with copying") for found in races.found)


def test_weights_that_are_replaced_before_their_backward_pass_are_noticed(compose, monkeypatch):
    """torch counts the writes to a memory, so such a mistake would not be silent on a GPU."""
    monkeypatch.setattr(offload, "has_graph", lambda outputs: False)
    transformer = transformer_with(STREAMED, compose)
    transformer.gradient_checkpointing = False
    loss = answer(transformer).square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_streaming_without_gradient_checkpointing_is_refused(compose):
    transformer = transformer_with(STREAMED, compose)
    transformer.gradient_checkpointing = False
    with pytest.raises(RuntimeError, match=r"needs memory\.gradient_checkpointing=true"):
        answer(transformer)


@pytest.mark.slow
@pytest.mark.parametrize("name", RACED)
def test_after_the_first_step_no_memory_is_new(name, compose, monkeypatch):
    """However far the CPU is ahead of the device, there are two slots."""
    memory = RACED[name]
    with Races(monkeypatch) as races:
        transformer = transformer_with(memory, compose)
        trained(transformer, steps=1)
        first, count = list(races.born), races.host_memories
        races.born.clear()
        trained(transformer, steps=2)
    assert races.host_memories == count
    assert count == LAYERS * (memory.stream_weights + memory.offload_activations)
    if memory.stream_weights:
        slots = transformer.offloader.slots
        size = max(each.numel() for each in slots.memories)
        assert first.count(size) == len(slots.slots) == 2 and size not in races.born


def test_a_block_is_sent_while_another_one_runs(compose, monkeypatch):
    """In every pass each block's weights are there in time, and no copy is made in vain."""
    transformer = transformer_with(STREAMED, compose)
    log, slots = [], transformer.offloader.slots
    fill, take = slots.fill, slots.take
    monkeypatch.setattr(slots, "fill", lambda index: log.append(("send", index)) or fill(index))
    monkeypatch.setattr(
        slots, "take", lambda index, running: log.append(("run", index)) or take(index, running)
    )
    answer(transformer).square().mean().backward()
    forward = [("run", 0), ("send", 0), ("send", 1), ("run", 1), ("send", 2), ("run", 2)]
    forward += [("send", 3), ("run", 3), ("send", 4), ("run", 4)]
    # The last two blocks are still there.
    backward = [("run", 4), ("run", 3), ("send", 2), ("run", 2), ("send", 1), ("run", 1)]
    backward += [("send", 0), ("run", 0)]
    assert log == forward + backward
    log.clear()
    with torch.no_grad():
        answer(transformer)
        answer(transformer)
    once = [each for index in range(1, 5) for each in (("run", index), ("send", (index + 1) % 5))]
    # The first two blocks were still there, and the next pass begins with the first.
    assert log == [("run", 0), *once, ("run", 0), ("send", 1), *once]


def test_a_block_may_run_twice_in_a_row(compose):
    plain, streamed = (transformer_with(memory, compose) for memory in (PLAIN, STREAMED))
    given = torch.randn(1, 6, 64), torch.randn(1, 4, 64), torch.randn(1, 64)
    with torch.no_grad():
        for index in (0, 0, 3, 3, 1, 4, 4, 0):
            ours, theirs = (each.transformer_blocks[index] for each in (streamed, plain))
            for found, expected in zip(ours(*given), theirs(*given), strict=True):
                assert torch.equal(found, expected)


@pytest.mark.slow
def test_clips_of_other_sizes_share_the_memory_of_the_largest(compose, monkeypatch):
    with Races(monkeypatch) as races:
        transformer = transformer_with(RACED["inputs on the CPU"], compose)
        for frames in (1, 3, 2, 1, 3):
            answer(transformer, frames=frames).square().mean().backward()
        store = transformer._gradient_checkpointing_func.store
        sizes = [memory.numel() for memory in store.free]
    assert len(sizes) == LAYERS and len(set(sizes)) == 1
    assert races.host_memories == 2 * LAYERS and races.found == []


# -- pinned memory -------------------------------------------------------------------------------


class FakeRuntime:
    def __init__(self, monkeypatch, answer=0):
        self.calls, self.answer = [], answer
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.calls.append("wait"))

    def cudaHostRegister(self, address, size, flags):
        self.calls.append(("register", address, size, flags))
        return self.answer

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address))
        return 0


def test_pinned_memory_has_the_exact_size_and_is_given_back(monkeypatch):
    runtime, size = FakeRuntime(monkeypatch), 3 * 4096 + 100
    memory = transfer.host_memory(size, torch.device("cuda", 0))
    memory.fill_(7)
    assert memory.shape == (size,) and memory.data_ptr() % 4096 == 0
    assert runtime.calls == [("register", memory.data_ptr(), size, 1)]
    [part] = transfer.packed_views(memory, [torch.empty(3, 5)])
    address = memory.data_ptr()
    del memory
    gc.collect()
    # A tensor in it keeps it.
    assert len(runtime.calls) == 1 and part.view(torch.uint8).sum() == 7 * 60
    del part
    assert runtime.calls[1:] == ["wait", ("unregister", address)]


def test_ram_that_cannot_be_pinned_gets_the_advice_for_ram(monkeypatch):
    FakeRuntime(monkeypatch, answer=2)
    with pytest.raises(MemoryError, match=r"cannot pin 0\.50 GiB of RAM") as error:
        transfer.host_memory(2**29, torch.device("cuda", 0))
    assert out_of_memory.lack_of(error.value) is out_of_memory.Lack.ram


def test_a_block_waits_in_one_memory_of_its_own_size(compose, monkeypatch):
    sizes = []
    real = transfer.host_memory
    monkeypatch.setattr(
        transfer, "host_memory", lambda size, device: sizes.append(size) or real(size, device)
    )
    transformer = transformer_with(PLAIN, compose)
    weights = [
        sum(p.numel() * p.element_size() for p in block.parameters() if not p.requires_grad)
        for block in transformer.transformer_blocks
    ]
    tensors = [len(offload.frozen_places(block)) for block in transformer.transformer_blocks]
    transformer_with(STREAMED, compose)
    assert len(sizes) == LAYERS
    for size, weight, count in zip(sizes, weights, tensors, strict=True):
        assert weight <= size < weight + count * transfer.ALIGNMENT
