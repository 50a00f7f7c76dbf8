"""Every way to run the blocks gives the plain result, or stays within its stated error."""

import dataclasses
import functools
import threading
from types import SimpleNamespace

import pytest
import torch
from families import model_of
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx.errors import UserError
from cogvx.model import blocks, lora, nano
from cogvx.model.stored import StoredWeight
from cogvx.options.memory import Memory, Recompute, Storage

CPU = torch.device("cpu")
PLAIN = Memory(
    gradient_checkpointing=True,
    vae_tiling=False,
    recompute=Recompute.full,
    offload_activations=False,
    base_storage=Storage.own,
    stream_weights=False,
    stream_text_encoder=False,
    feed_forward_chunks=1,
    frugal_videos=False,
    offload_optimizer=False,
    step_in_backward=False,
)


def answer_and_gradients(folder, compose, kind, memory: Memory | None, dtype=torch.float32):
    """The predicted velocity, its gradients, and the answer without gradients.

    memory=None: the blocks run plainly.
    """
    model = model_of(folder)
    transformer = model.transformer
    if kind == "LoRA":
        compose("lora.rank=4").lora.attach(transformer, seed=0)
        with torch.no_grad():
            for number, parameter in enumerate(lora.trainable(transformer)):
                parameter += 0.1 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(number)
                )
    else:
        transformer.requires_grad_(True)
    if memory is not None:
        blocks.arrange(transformer, memory, recompute=True, device=CPU)
    latents = torch.randn((2, 4, 16, 12, 16), generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(
        (2, nano.TEXT_TOKENS, nano.TEXT_WIDTH), generator=torch.Generator().manual_seed(1)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        answer = model.predict_velocity(latents, None, embeds, torch.tensor([100, 700]))
        answer.float().square().mean().backward()
        with torch.no_grad():
            again = model.predict_velocity(latents, None, embeds, torch.tensor([100, 700]))
    gradients = [parameter.grad for parameter in lora.trainable(transformer)]
    return answer.detach(), gradients, again


EXACT = {
    "full": {},
    "selective": {"recompute": Recompute.selective},
    "inputs on the CPU": {"offload_activations": True},
    "streamed": {"stream_weights": True},
    "selective, inputs on the CPU": {"recompute": Recompute.selective, "offload_activations": True},
    "in chunks": {"feed_forward_chunks": 3},
    "minimal": {"stream_weights": True, "offload_activations": True, "feed_forward_chunks": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["LoRA", "full"])
@pytest.mark.parametrize("family", ["2b", "1_5_5b"])
@pytest.mark.parametrize("name", EXACT)
def test_what_only_moves_or_repeats_work_changes_nothing(
    name, family, kind, dtype, family_folder, compose
):
    """Trained weights are never offloaded, so with full fine-tuning streaming moves nothing."""
    memory = dataclasses.replace(PLAIN, **EXACT[name])
    plain = answer_and_gradients(family_folder(family), compose, kind, None, dtype)
    found = answer_and_gradients(family_folder(family), compose, kind, memory, dtype)
    # Smaller matrices round differently. So does the sum of the time embedding's gradients, which
    # is taken block by block.
    rounds = memory.feed_forward_chunks > 1 or kind == "full"
    most = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] if rounds else 0
    gradients = [torch.cat([gradient.flatten() for gradient in one[1]]) for one in (found, plain)]
    for ours, theirs in ((found[0], plain[0]), (found[2], plain[2]), gradients):
        assert relative(ours, theirs) <= most


def test_streaming_without_frozen_weights_is_refused(compose):
    with pytest.raises(UserError, match="and lora=null trains every weight"):
        compose("lora=null", "memory=balanced", "memory.stream_weights=true")


# Bounds for the relative error of the answer, on random weights. Other projects measured, on a
# single linear layer, fp8 0.010, int8 0.007 and nf4 0.024.
@pytest.mark.parametrize(
    ("storage", "most"), [(Storage.fp8, 0.03), (Storage.int8, 0.01), (Storage.nf4, 0.10)]
)
@pytest.mark.parametrize("streamed", [False, True])
def test_smaller_forms_stay_within_their_error(storage, most, streamed, family_folder, compose):
    plain = answer_and_gradients(family_folder("5b"), compose, "LoRA", None)
    memory = dataclasses.replace(PLAIN, base_storage=storage, stream_weights=streamed)
    found = answer_and_gradients(family_folder("5b"), compose, "LoRA", memory)
    errors = [relative(found[0], plain[0]), relative(found[2], plain[2])]
    assert min(errors) > 1e-4 and max(errors) < most, errors
    cosines = [
        torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        for a, b in zip(found[1], plain[1], strict=True)
    ]
    assert min(cosines) > 1 - 2 * most


def relative(found, expected) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize(
    ("storage", "bytes_per_weight"), [(Storage.fp8, 1.0), (Storage.int8, 1.02), (Storage.nf4, 0.57)]
)
def test_weights_wait_in_as_many_bytes_as_promised(storage, bytes_per_weight):
    weight = torch.randn(1024, 512, dtype=torch.bfloat16)
    kept = StoredWeight.store(weight, storage)
    parts = [part for part in (kept.data, kept.scale) if part is not None]
    assert sum(p.numel() * p.element_size() for p in parts) / weight.numel() <= bytes_per_weight
    assert kept.restored().dtype == torch.bfloat16 and kept.restored().shape == weight.shape


def test_the_frozen_weights_are_given_up_and_come_back_block_by_block(family_folder, compose):
    model = model_of(family_folder("5b"))
    compose("lora.rank=4").lora.attach(model.transformer, seed=0)
    blocks.arrange(
        model.transformer,
        dataclasses.replace(PLAIN, stream_weights=True),
        recompute=True,
        device=CPU,
    )
    parameters = model.transformer.transformer_blocks.parameters

    def frozen() -> int:
        return sum(parameter.numel() for parameter in parameters() if not parameter.requires_grad)

    assert frozen() == 0
    assert all(p.numel() for p in lora.trainable(model.transformer))
    for block in model.transformer.transformer_blocks:
        with pytest.raises(TypeError):
            block(None)  # the weights are put away again even after an error
    assert frozen() == 0
    assert all(slot.users == 0 for slot in model.transformer.offloader.slots.slots)


# -- attention results that are saved on a GPU ---------------------------------------------------

KERNELS = {
    "_scaled_dot_product_efficient_attention": (None, False),
    "_scaled_dot_product_cudnn_attention": (None, False),
    "_scaled_dot_product_flash_attention": (),
}


@pytest.mark.parametrize("name", KERNELS)
def test_saved_attention_has_the_logsumexp_that_its_backward_pass_needs(name):
    """Called as torch calls it without gradients, on tensors without contents."""
    kernel, asked = getattr(torch.ops.aten, name), []
    tokens = torch.empty(1, 2, 64, 32, device="meta", dtype=torch.bfloat16)

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is kernel.default:
                asked.append(args[4] if len(args) > 4 else None)
            return func(*args, **(kwargs or {}))

    with Asked(), blocks.SaveAttention([]) as saving:
        kernel(tokens, tokens, tokens, *KERNELS[name])
    [(saved_kernel, result)] = saving.results
    assert saved_kernel is kernel.default
    assert result[1].numel() >= 2 * 64
    assert asked == [True if KERNELS[name] else None]


def test_attention_by_another_kernel_than_the_saved_one_is_computed_again():
    tokens = torch.empty(1, 2, 64, 32, device="meta", dtype=torch.bfloat16)
    with blocks.SaveAttention([]) as saving:
        torch.ops.aten._scaled_dot_product_flash_attention(tokens, tokens, tokens)
        torch.ops.aten._scaled_dot_product_efficient_attention(tokens, tokens, tokens, None, False)
    (_, flash), (_, efficient) = saving.results
    with blocks.ReuseAttention(saving.results):
        computed = torch.ops.aten._scaled_dot_product_efficient_attention(
            tokens, tokens, tokens, None, True
        )
        reused = torch.ops.aten._scaled_dot_product_efficient_attention(
            tokens, tokens, tokens, None, True
        )
    assert len(computed) == 4 and computed[0] is not flash[0]
    assert reused[0] is efficient[0]


class Named(torch.nn.Module):
    """A block that is compiled anew for each name."""

    def forward(self, hidden_states: torch.Tensor, name: str) -> torch.Tensor:
        return hidden_states + len(name) if name.endswith("a") else hidden_states - 1


def test_every_variant_of_a_block_is_compiled_in_other_threads_too(monkeypatch):
    """On a GPU the backward pass runs in a thread of its own."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compile_with = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compile_with)
    block = Named()
    transformer = SimpleNamespace(
        transformer_blocks=[block], patch_embed=SimpleNamespace(_get_positional_embeddings=max)
    )
    monkeypatch.setattr(blocks.transfer, "bring", lambda *given: None)
    blocks.arrange(transformer, PLAIN, recompute=False, device=CPU, compiled=True)
    names = ["a" * length for length in range(1, 13)]
    thread = threading.Thread(target=lambda: [block.forward(torch.ones(2), n) for n in names])
    thread.start()
    thread.join()
    assert len(compiled) == len(names) > 8
