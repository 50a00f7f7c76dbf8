"""Weights are read to where they are used, and quantised weights are kept for the next start."""

import dataclasses
import importlib.util
import shutil

import families
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
from test_blocks import PLAIN
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvx.data.cache import Cache
from cogvx.errors import UserError
from cogvx.model import blocks, stored, unread
from cogvx.model.pretrained import PretrainedModel
from cogvx.model.stored import StoredWeight
from cogvx.model.trained_weights import FullWeights, LoraWeights
from cogvx.options.memory import Storage

CPU = torch.device("cpu")
QUANTISED = [Storage.fp8, Storage.int8, Storage.nf4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_transformer_is_loaded_as_diffusers_loads_it(family, dtype, family_folder):
    folder = family_folder(family)
    ours = PretrainedModel(folder, CPU, dtype).transformer()
    theirs = CogVideoXTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=dtype
    )
    expected, found = tensors_of(theirs), tensors_of(ours)
    assert expected.keys() == found.keys() and len(found) > 60
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


def tensors_of(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


# -- memory --------------------------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """The most bytes of storages that operations have made and that are alive together.

    Tensors whose pages are a file's are not made by an operation, and not counted.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.set_.source_Storage:
            return result  # by safetensors: the file's pages
        for leaf in filter(is_tensor, tree_leaves(result)):
            if storage_of(leaf) not in given and leaf.device.type != "meta":
                self.alive[storage_of(leaf)] = (
                    torch.multiprocessing.reductions.StorageWeakRef(leaf.untyped_storage()),
                    leaf.untyped_storage().nbytes(),
                )
        self.alive = {key: each for key, each in self.alive.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A transformer of 12 blocks in bf16, in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny = families.tiny("5b")
    settings = tiny.transformer | {"num_layers": 12, "num_attention_heads": 4}
    model = CogVideoXTransformer3DModel(**settings).bfloat16()
    model.save_pretrained(folder / "model" / "transformer", max_shard_size="1MB")
    assert len(list((folder / "model" / "transformer").glob("*.safetensors"))) > 3
    return folder / "model"


def block_bytes(folder, dtype: torch.dtype) -> int:
    transformer = PretrainedModel(folder, CPU, dtype).unread_transformer()
    return sum(p.numel() * p.itemsize for p in transformer.transformer_blocks[0].parameters())


def loaded(folder, dtype, memory, compose, cache=None):
    base = PretrainedModel(folder, CPU, dtype, cache=cache)
    weights = LoraWeights(compose("lora.rank=4").lora)
    with Allocated() as allocated:
        transformer = weights.attach(base, 0)
        blocks.arrange(transformer, memory, recompute=True, device=CPU)
    return transformer, allocated.most


# In blocks of full precision: what all 12 take in this form, and the most while loading.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "streamed", "dtype", "all_blocks"),
    [
        # The files' own dtype: on a CPU the weights are the files' pages.
        (Storage.own, False, torch.bfloat16, 0),
        (Storage.own, True, torch.bfloat16, 12),
        (Storage.own, True, torch.float32, 12),
        (Storage.int8, False, torch.bfloat16, 6.5),
        (Storage.int8, False, torch.float32, 3.3),
        (Storage.int8, True, torch.float32, 3.3),
    ],
)
def test_loading_holds_one_block_more_than_what_stays(
    storage, streamed, dtype, all_blocks, sharded, compose
):
    memory = dataclasses.replace(PLAIN, base_storage=storage, stream_weights=streamed)
    block = block_bytes(sharded, dtype)
    transformer, most = loaded(sharded, dtype, memory, compose)
    others = sum(
        p.numel() * 4 for n, p in transformer.named_parameters() if "transformer_blocks" not in n
    )
    adapters = sum(4 * p.numel() for p in transformer.parameters() if p.requires_grad)
    # While it is quantised, a weight exists in fp32 too.
    room = others + 2 * adapters + block * (1 if storage is Storage.own else 4)
    assert most < all_blocks * block + room


def test_the_weights_of_a_full_fine_tuning_go_to_the_device_one_by_one(sharded):
    base = PretrainedModel(sharded, CPU, torch.bfloat16)
    transformer = FullWeights().attach(base, 0)
    stand_ins = [p.untyped_storage().nbytes() for p in transformer.parameters()]
    assert max(stand_ins) == 4 and all(p.requires_grad for p in transformer.parameters())
    blocks.arrange(transformer, PLAIN, recompute=True, device=CPU)
    expected = base.transformer(torch.float32)
    for ours, theirs in zip(transformer.parameters(), expected.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


# -- quantising ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64), (700, 512), (1, 2**19), (1030, 4096)])
def test_quantising_part_by_part_changes_no_bit(shape, dtype, monkeypatch):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, :64] = 0
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    data = (weight.float() / scale).round().to(torch.int8)
    int8, nf4 = (StoredWeight.store(weight, each) for each in (Storage.int8, Storage.nf4))
    assert torch.equal(int8.data, data) and torch.equal(int8.scale, scale)
    monkeypatch.setattr(stored, "AT_ONCE_ON_CPU", weight.numel())
    whole = StoredWeight.store(weight, Storage.nf4)
    for part in ("data", "scale", "code"):
        assert torch.equal(getattr(nf4, part), getattr(whole, part))


@pytest.fixture
def quantising(monkeypatch):
    """Records what is read from the model's files, and what is quantised."""
    done = {"read": [], "quantised": []}
    tensor, store = unread.UnreadWeights.tensor, StoredWeight.store.__func__

    def read(self, name):
        done["read"].append(name)
        return tensor(self, name)

    def quantise(cls, weight, storage):
        done["quantised"].append(storage)
        return store(cls, weight, storage)

    monkeypatch.setattr(unread.UnreadWeights, "tensor", read)
    monkeypatch.setattr(StoredWeight, "store", classmethod(quantise))
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "streamed"),
    [
        (Storage.int8, True),
        (Storage.nf4, False),
        *(
            pytest.param(storage, streamed, marks=pytest.mark.slow)
            for storage in QUANTISED
            for streamed in (False, True)
            if (storage, streamed) not in [(Storage.int8, True), (Storage.nf4, False)]
        ),
    ],
)
def test_the_second_start_takes_quantised_weights_from_the_cache(
    storage, streamed, sharded, compose, tmp_path, quantising
):
    memory = dataclasses.replace(PLAIN, base_storage=storage, stream_weights=streamed)
    first, _ = loaded(sharded, torch.bfloat16, memory, compose, Cache(tmp_path))
    assert len(quantising["quantised"]) > 100
    quantising["read"].clear(), quantising["quantised"].clear()
    second, _ = loaded(sharded, torch.bfloat16, memory, compose, Cache(tmp_path))
    assert quantising["quantised"] == []
    assert not any("transformer_blocks" in name for name in quantising["read"])
    assert quantising["read"]
    same_forms(first, second)
    # Another dtype or form is another file.
    other = dataclasses.replace(memory, base_storage=QUANTISED[QUANTISED.index(storage) - 1])
    loaded(sharded, torch.bfloat16, other, compose, Cache(tmp_path))
    assert quantising["quantised"]
    quantising["quantised"].clear()
    loaded(sharded, torch.float32, memory, compose, Cache(tmp_path))
    assert quantising["quantised"]


def same_forms(first, second) -> None:
    for ours, theirs in zip(first.offloader.stored, second.offloader.stored, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one.storage, one.shape, one.dtype) == (other.storage, other.shape, other.dtype)
            for part in ("data", "scale", "code"):
                a, b = getattr(one, part), getattr(other, part)
                assert (a is None and b is None) or torch.equal(
                    a.view(torch.uint8), b.view(torch.uint8)
                )


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        "cut off",
        pytest.param("flipped", marks=pytest.mark.slow),
        pytest.param("gone", marks=pytest.mark.slow),
        pytest.param("other model", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_or_missing_file_is_made_again(
    damage, sharded, compose, tmp_path, quantising, capsys
):
    memory = dataclasses.replace(PLAIN, base_storage=Storage.int8)
    folder = shutil.copytree(sharded, tmp_path / "model")
    cache = Cache(tmp_path / "cache")
    first, _ = loaded(folder, torch.bfloat16, memory, compose, cache)
    blocks_quantised = len(quantising["quantised"])
    files = sorted((tmp_path / "cache" / "quantised").rglob("*.safetensors"))
    assert len(files) == 12
    if damage == "cut off":
        files[3].write_bytes(files[3].read_bytes()[:-5])
    elif damage == "flipped":
        content = files[3].read_bytes()
        files[3].write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "gone":
        files[3].unlink()
    else:
        weights = next((folder / "transformer").glob("*.safetensors"))
        save_file({n: t * 2 for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    quantising["quantised"].clear(), capsys.readouterr()
    second, _ = loaded(folder, torch.bfloat16, memory, compose, cache)
    expected = blocks_quantised if damage == "other model" else blocks_quantised // 12
    assert len(quantising["quantised"]) == expected
    said = capsys.readouterr().out.count(f"warning {files[3]} is damaged, and made again: ")
    assert said == (damage in ("cut off", "flipped"))
    if damage != "other model":
        same_forms(first, second)


@pytest.mark.slow
def test_a_full_disk_does_not_end_the_run(sharded, compose, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    memory = dataclasses.replace(PLAIN, base_storage=Storage.int8)
    loaded(sharded, torch.bfloat16, memory, compose, Cache(tmp_path))
    assert capsys.readouterr().out.count("No space left on device") == 1
    assert not list((tmp_path / "quantised").rglob("*.safetensors"))


def test_nf4_without_bitsandbytes_says_what_to_install(compose, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name)
    )
    compose("memory=low")
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        compose("memory=low", "memory.base_storage=nf4")


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("norm_out.linear.bias"), "norm_out.linear.bias is missing"),
        (
            lambda t: t.update({"norm_out.linear.bias": torch.zeros(3)}),
            r"norm_out.linear.bias has shape \(3,\), expected",
        ),
    ],
)
def test_weights_of_another_model_are_named(change, said, family_folder, tmp_path):
    folder = shutil.copytree(family_folder("2b"), tmp_path / "model")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=said):
        PretrainedModel(folder, CPU, torch.float32).transformer()


def test_weights_that_are_not_used_are_told(family_folder, tmp_path, capsys):
    folder = shutil.copytree(family_folder("2b"), tmp_path / "model")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"more": torch.zeros(3)}, path, {"format": "pt"})
    PretrainedModel(folder, CPU, torch.float32).transformer()
    assert "has weights that are not used: more" in capsys.readouterr().out


def test_dora_starts_from_the_norms_of_the_real_weights(family_folder, compose):
    base = PretrainedModel(family_folder("2b"), CPU, torch.float32)
    settings = compose("lora.rank=4", "lora.use_dora=true").lora
    transformer = LoraWeights(settings).attach(base, 0)
    layer = transformer.transformer_blocks[0].attn1.to_q
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert torch.allclose(magnitude, layer.base_layer.weight.norm(dim=1), rtol=1e-5)


# -- the text encoder in fp16 --------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_t5_in_fp16_keeps_wo_in_fp32_as_the_pipeline_does(streamed, family_folder):
    from transformers import T5EncoderModel

    folder = family_folder("2b")
    theirs = T5EncoderModel.from_pretrained(
        folder, subfolder="text_encoder", dtype=torch.float16
    ).eval()
    kept = {n for n, p in theirs.named_parameters() if p.dtype is torch.float32}
    assert kept and all(".wo." in name for name in kept)
    base = PretrainedModel(folder, CPU, torch.float16)
    _, ours = base.text_encoder(streamed=streamed)
    tokens = torch.arange(1, 17)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens)[0], theirs(tokens)[0])
