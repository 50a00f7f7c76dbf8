"""Every phase of a run on a second device, apart from the CPU and without a GPU.

A tensor that is left on the CPU fails here as it does on a GPU. So do an fp32 tensor where the run
is in 16 bits, and a weight that stays on the device while weights are streamed.
"""

import contextlib
import functools
import gc
import multiprocessing
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import torch as safetensors_torch

from cogvx.data import encode
from cogvx.data.encode import Encoder
from cogvx.evaluation import evaluate
from cogvx.inference import generate
from cogvx.model import lora, offload, stored
from cogvx.model.cogvideox import CogVideoX
from cogvx.plan import phases, second_device
from cogvx.plan.trace import patched, tracing
from cogvx.training import on_cpu
from cogvx.training import step as steps
from cogvx.training import trainer as trainers
from cogvx.training.state import TrainingState

FAMILIES = ["2b", "5b", "5b_i2v", "1_5_5b", "1_5_5b_i2v"]
BF16, AGAIN = "train.mixed_precision=bf16", "memory.gradient_checkpointing=true"
FULL = ["lora=null", "optimizer.learning_rate=1e-5"]
# 9 frames are the fewest with two chunks of the VAE.
SHORT = ["data.max_num_frames=9"]
TRAIN = ["load", "held-out loss", "train"]


@pytest.fixture(autouse=True)
def another_run():
    """Lets a test choose its precision, as a new process could."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def traced(compose):
    """traced("model=2b", ..., phases=[...], layers=2): the recorder of these phases in bf16."""

    def trace(*overrides: str, wanted: list[str] = TRAIN, layers: int = 2):
        config = compose(BF16, *overrides)
        recorder = phases.run_phases(config, wanted, layers=layers)
        require_16_bits(recorder)
        return recorder

    return trace


def require_16_bits(recorder) -> None:
    """AssertionError if a phase computes in fp32 what a run in bf16 computes in 16 bits."""
    wide = [
        f"{phase}: {op}"
        for (phase, op, dtype), work in recorder.work.items()
        if dtype is torch.float32 and work.flops
    ]
    assert not wide, f"in fp32: {wide}"


def weights_in_fp32(recorder, what: str) -> int:
    """Bytes on the device of these weights that are in fp32."""
    return sum(
        about.size
        for about in recorder.storages.values()
        if about.what == what and about.dtype is torch.float32 and not about.on_host
    )


# -- the device ----------------------------------------------------------------------------------


def test_a_tensor_on_the_cpu_is_refused_as_on_a_gpu():
    device = second_device.device()
    with tracing():
        here = torch.zeros(4, 4, device=device)
        with pytest.raises(RuntimeError, match="at least two devices"):
            here + torch.zeros(4, 4)
        assert (here + torch.zeros(())).device == device, "a number on the CPU is allowed"
        assert (here + torch.zeros(4, 4).to(device)).device == device


def test_both_memories_are_counted_apart():
    device = second_device.device()
    with tracing() as recorder:
        here, there = torch.zeros(1000, device=device), torch.zeros(500)
        assert (recorder.now[False], recorder.now[True]) == (4000, 2000)
        moved = there.to(device)
        assert (recorder.now[False], recorder.now[True]) == (6000, 2000)
        del here, there, moved
        assert (recorder.now[False], recorder.now[True]) == (0, 0)


def test_autocast_is_that_of_cuda():
    device = second_device.device()
    with tracing():
        weight = torch.nn.Parameter(torch.zeros(8, 8, device=device))
        inputs = torch.zeros(2, 8, device=device, dtype=torch.bfloat16)
        norm = torch.nn.LayerNorm(8).to(device, torch.bfloat16)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.nn.functional.linear(inputs, weight).dtype is torch.bfloat16
            assert norm(inputs).dtype is torch.float32
            assert inputs.softmax(-1).dtype is inputs.exp().dtype is torch.float32
            assert torch.cat([inputs, inputs.float()]).dtype is torch.float32
            assert (inputs + inputs).dtype is torch.bfloat16
        assert norm(inputs).dtype is torch.bfloat16


def test_autocast_keeps_a_cast_weight_until_it_ends():
    device = second_device.device()
    with tracing() as recorder:
        weight = torch.nn.Parameter(torch.zeros(100, 100, device=device))
        inputs = torch.zeros(1, 100, device=device, dtype=torch.bfloat16)
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            torch.nn.functional.linear(inputs, weight)
            one = recorder.now[False]
            torch.nn.functional.linear(inputs, weight)
            assert recorder.now[False] == one == 4 * 100 * 100 + 200 + 2 * 100 * 100
        assert recorder.now[False] == 4 * 100 * 100 + 200


# -- every phase ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["model=5b_i2v", "memory=balanced", "train.ema_decay=0.99"],
        ["model=2b", "memory=minimal"],
        ["model=2b", "memory=low_full", *FULL],
    ],
    ids=" ".join,
)
def test_a_run_leaves_nothing_on_the_cpu(traced, overrides):
    recorder = traced(*overrides)
    assert recorder.work and weights_in_fp32(recorder, "frozen weights") == 0


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["fast", "balanced", "low", "minimal"])
@pytest.mark.parametrize("model", FAMILIES)
def test_a_lora_of_every_family_in_every_memory_mode(traced, model, memory):
    recorder = traced(f"model={model}", f"memory={memory}", "train.ema_decay=0.99")
    assert weights_in_fp32(recorder, "frozen weights") == 0


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["fast", "balanced", "low_full"])
@pytest.mark.parametrize("model", FAMILIES)
def test_full_fine_tuning_of_every_family_in_every_memory_mode(traced, model, memory):
    traced(f"model={model}", f"memory={memory}", *FULL)


OPTIONS = [
    [],
    [AGAIN],
    [AGAIN, "memory.recompute=selective"],
    [AGAIN, "memory.offload_activations=true"],
    ["memory.feed_forward_chunks=4"],
    [AGAIN, "memory.feed_forward_chunks=4"],
    [AGAIN, "memory.base_storage=fp8"],
    [AGAIN, "memory.base_storage=int8"],
    [AGAIN, "memory.base_storage=nf4"],
    [AGAIN, "memory.stream_weights=true"],
    [AGAIN, "memory.stream_weights=true", "memory.base_storage=int8"],
    [*FULL, AGAIN, "memory.offload_optimizer=true"],
    [*FULL, AGAIN, "memory.offload_optimizer=true", "train.ema_decay=0.99"],
    [*FULL, AGAIN, "memory.step_in_backward=true", "train.max_grad_norm=null"],
    ["lora.use_dora=true"],
    ["train.ema_decay=0.99"],
    ["train.min_snr_gamma=5", "train.gradient_accumulation_steps=2"],
    ["train.train_batch_size=2", "train.caption_dropout=0.5"],
    ["optimizer=adam8bit"],
    ["optimizer=prodigy"],
    ["optimizer=schedule_free"],
    ["optimizer=muon"],
    ["parallel=ddp"],
]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", OPTIONS, ids=" ".join)
def test_every_option_by_itself(traced, overrides):
    traced("model=2b", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("tiling", ["false", "true"])
def test_clips_and_images_are_encoded(compose, tiling):
    config = compose(BF16, "model=5b_i2v", f"memory.vae_tiling={tiling}", *SHORT)
    with phases.planned_run(config, 1) as run:
        run.recorder.begin("encode clips")
        data, pretrained = run.config.data, run.pretrained
        vae = pretrained.vae(tiling=config.memory.vae_tiling)
        how = Encoder(None, "", pretrained.dtype, pretrained.device)
        frames = torch.zeros(data.max_num_frames, 3, data.height, data.width)
        clip = encode.latent_moments(vae, frames, how)
        image = encode.image_moments(vae, frames[:1], how, 1, seed="12")
        for moments in (clip, image):
            assert moments.device.type == "cpu" and moments.dtype is torch.bfloat16
    require_16_bits(run.recorder)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", ["false", "true"])
def test_prompts_are_encoded(traced, streamed):
    recorder = traced(
        "model=2b", f"memory.stream_text_encoder={streamed}", wanted=["encode prompts"]
    )
    assert weights_in_fp32(recorder, "text encoder weights") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["model=2b", "memory=fast"],
        ["model=5b_i2v", "memory=low"],
        ["model=1_5_5b_i2v", "memory=minimal"],
        ["model=2b", "memory=low_full", *FULL],
    ],
    ids=" ".join,
)
def test_videos_are_made(traced, overrides):
    traced(*overrides, *SHORT, wanted=["video"])


# -- saving, resuming, evaluating ----------------------------------------------------------------


def in_a_process_of_its_own(test):
    """Copies of tensors without contents can crash the process when they are collected later."""

    @functools.wraps(test)
    def start(**given):
        def run() -> None:
            gc.disable()
            test(**given)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join()
        assert process.exitcode == 0

    return start


class Disk:
    """In the place of files, which cannot hold tensors without contents."""

    def __init__(self):
        self.adapters: dict[Path, tuple[dict, dict]] = {}
        self.files: dict[str, object] = {}

    def write_adapter(self, save_directory, transformer_lora_layers, **more) -> None:
        self.require_on_cpu(transformer_lora_layers.values())
        settings = more["transformer_lora_adapter_metadata"]
        self.adapters[Path(save_directory)] = transformer_lora_layers, settings
        (Path(save_directory)).mkdir(exist_ok=True, parents=True)
        (Path(save_directory) / lora.WEIGHTS).touch()

    def read_adapter(self, folder: Path) -> tuple[dict, dict]:
        return self.adapters[folder]

    def save(self, states: object, path: Path) -> None:
        self.files[str(path)] = states

    def load(self, path: Path, map_location: str, weights_only: bool) -> object:
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda tensor: tensor.to(map_location), self.files[str(path)]
        )

    def save_file(self, tensors: dict, path, **more) -> None:
        self.require_on_cpu(tensors.values())
        self.files[str(path)] = tensors

    @staticmethod
    def require_on_cpu(tensors) -> None:
        assert {tensor.device.type for tensor in tensors} == {"cpu"}


@pytest.fixture
def disk():
    from diffusers import CogVideoXPipeline

    disk = Disk()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(CogVideoXPipeline, save_lora_weights=disk.write_adapter))
        stack.enter_context(patched(lora, read_adapter=disk.read_adapter))
        stack.enter_context(patched(torch, save=disk.save, load=disk.load))
        stack.enter_context(patched(safetensors_torch, save_file=disk.save_file))
        yield disk


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["memory=balanced", "train.ema_decay=0.99"],
        pytest.param(["memory=low"], marks=pytest.mark.slow),
        pytest.param(["memory=minimal"], marks=pytest.mark.slow),
        pytest.param(["optimizer=schedule_free"], marks=pytest.mark.slow),
        pytest.param(["optimizer=prodigy"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
@in_a_process_of_its_own
def test_a_run_is_saved_resumed_and_judged(compose, disk, tmp_path, overrides):
    """An averaged run goes on after it is saved, from what was saved."""
    config = compose(BF16, "model=2b", *overrides)
    with phases.planned_run(config, 2) as run:
        trainer = run.trainer()
        trainer.optimizer_step()
        trainer.evaluate()
        trainer.state.save(tmp_path)
        trainer.state.require_finite(1, tmp_path)
        trainer.state.load(tmp_path)
        trainer.optimizer_step()
        optimizer = trainer.state.optimizer
        moments = [t for t in phases.states_of(optimizer) if t.ndim > 0]
        assert moments and {t.device.type for t in moments} == {second_device.NAME}


@pytest.mark.slow
@in_a_process_of_its_own
def test_evaluate_judges_on_the_device(compose, disk, tmp_path):
    config = compose(BF16, "model=2b", "memory=low", *SHORT)
    with phases.planned_run(config, 1) as run:
        trainer = run.trainer()
        trainer.state.save(tmp_path)
        wanted = [evaluate.Variant("base", None), evaluate.Variant("result", tmp_path)]
        losses = []
        for _, model in evaluate.models(config, trainer.data, wanted, trainer.ranks):
            run.recorder.begin("held-out loss")
            losses.append(
                trainers.heldout_loss(
                    model, 1, trainer.data.held_out_batch, config.validation, trainer.ranks
                )
            )
        assert len(losses) == 2
    require_16_bits(run.recorder)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_states_of_the_optimizer_are_on_the_device(compose, optimizer):
    config = compose(BF16, "model=2b", f"optimizer={optimizer}")
    with phases.planned_run(config, 1) as run:
        trainer = run.trainer()
        trainer.optimizer_step()
        states = list(phases.states_of(trainer.state.optimizer))
        assert states and {state.device.type for state in states} == {second_device.NAME}


# -- planted mistakes ----------------------------------------------------------------------------


def at_least_two_devices():
    return pytest.raises(RuntimeError, match="at least two devices")


def test_found_noise_that_is_left_on_the_cpu(traced, monkeypatch):
    monkeypatch.setattr(phases, "no_noise", lambda draw, stream, shape: torch.zeros(shape))
    with at_least_two_devices():
        traced("model=2b", wanted=["train"])


@pytest.mark.parametrize("phase", ["held-out loss", "train"])
def test_found_prompts_that_are_left_on_the_cpu(traced, monkeypatch, phase):
    load = phases.Prepared.load_batch

    def left(self, clips, prompts, images):
        batch = load(self, clips, prompts, images)
        return steps.Batch(batch.latent_moments, batch.prompt_embeds.cpu())

    monkeypatch.setattr(phases.Prepared, "load_batch", left)
    with at_least_two_devices():
        traced("model=2b", wanted=[phase])


def test_found_a_clip_that_is_left_on_the_cpu(compose, monkeypatch):
    config = compose(BF16, "model=2b", *SHORT)
    with phases.planned_run(config, 1) as run, at_least_two_devices():
        vae = run.pretrained.vae(tiling=False)
        frames = torch.zeros(9, 3, config.data.height, config.data.width)
        encode.latent_moments(vae, frames, Encoder(None, "", torch.bfloat16, torch.device("cpu")))


def test_found_a_text_encoder_that_is_left_on_the_cpu(traced, monkeypatch):
    monkeypatch.setattr(phases, "placed", lambda encoder, device, streamed: encoder)
    with at_least_two_devices():
        traced("model=2b", wanted=["encode prompts"])


@pytest.mark.slow
def test_found_a_prompt_that_is_left_on_the_cpu_for_a_video(traced, monkeypatch):
    made = generate.pipeline_of

    def left(*given):
        pipeline = made(*given)
        encode_prompt = pipeline.encode_prompt
        pipeline.encode_prompt = lambda *of, **more: [t.cpu() for t in encode_prompt(*of, **more)]
        return pipeline

    monkeypatch.setattr(generate, "pipeline_of", left)
    with at_least_two_devices():
        traced("model=2b", *SHORT, wanted=["video"], layers=1)


@in_a_process_of_its_own
def test_found_an_average_that_is_loaded_to_the_cpu(compose, disk, tmp_path, monkeypatch):
    def load(self, stored):
        self.average.load_state_dict(stored)

    monkeypatch.setattr(TrainingState, "load_average", load)
    with phases.planned_run(compose(BF16, "model=2b", "train.ema_decay=0.99"), 1) as run:
        trainer = run.trainer()
        trainer.state.save(tmp_path)
        trainer.state.load(tmp_path)
        with at_least_two_devices():
            trainer.optimizer_step()


@in_a_process_of_its_own
def test_found_a_checkpoint_with_tensors_of_the_device(compose, disk, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    with phases.planned_run(compose(BF16, "model=2b"), 1) as run:
        trainer = run.trainer()
        with pytest.raises(AssertionError):
            trainer.state.save(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["encode clips", "encode prompts"])
def test_found_an_encoder_in_fp32(traced, monkeypatch, phase):
    built = phases.PlannedModel.built
    monkeypatch.setattr(
        phases.PlannedModel, "built", lambda self, build, dtype: built(self, build, torch.float32)
    )
    monkeypatch.setattr(
        phases,
        "Encoder",
        lambda load, identity, dtype, device, **more: Encoder(
            load, identity, torch.float32, device, **more
        ),
    )
    with pytest.raises(AssertionError, match="in fp32"):
        traced("model=2b", *SHORT, wanted=[phase])


def test_found_frozen_weights_in_fp32(traced, monkeypatch):
    built = phases.PlannedModel.transformer
    monkeypatch.setattr(
        phases.PlannedModel, "transformer", lambda self, dtype=None: built(self, torch.float32)
    )
    # Under autocast the results are the same: only the memory tells.
    assert weights_in_fp32(traced("model=2b", wanted=["train"]), "frozen weights") > 2**30 / 8


@pytest.mark.parametrize("phase", ["held-out loss", "train"])
def test_found_a_pass_without_autocast(traced, monkeypatch, phase):
    predict = CogVideoX.predict_velocity

    def wide(self, *given):
        self.dtype = torch.float32
        return predict(self, *given)

    monkeypatch.setattr(Accelerator, "prepare", lambda self, what, **more: what)
    monkeypatch.setattr(CogVideoX, "predict_velocity", wide)
    with pytest.raises(AssertionError, match="in fp32"):
        traced("model=2b", *FULL, wanted=[phase], layers=1)


# -- what stays on the device --------------------------------------------------------------------


BLOCK = 111_000_000  # bytes of a 2B block's weights in bf16


def growth(compose, *overrides: str, phase: str = "train") -> float:
    """What each further layer leaves on the device after a phase, in blocks of bf16 weights."""
    once = ["validation.heldout_timesteps=1", "validation.heldout_draws=1"]
    config, left = compose(BF16, "model=2b", "lora.rank=1", *once, *overrides), []
    for layers in (3, 6):
        with phases.planned_run(config, layers) as run:
            trainer = run.trainer()
            if phase == "train":
                trainer.optimizer_step()
            else:
                trainer.heldout_loss()
            left.append(run.recorder.now[False])
    return (left[1] - left[0]) / 3 / BLOCK


STREAMED = [AGAIN, "memory.stream_weights=true"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["held-out loss", "train"])
def test_streamed_weights_do_not_stay_on_the_device(compose, phase):
    assert growth(compose, AGAIN, phase=phase) > 0.9
    assert growth(compose, *STREAMED, phase=phase) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["held-out loss", "train"])
def test_found_a_block_that_keeps_its_streamed_weights(compose, monkeypatch, phase):
    restored = stored.StoredWeight.restored
    monkeypatch.setattr(stored.StoredWeight, "restored", lambda self: restored(self).clone())
    monkeypatch.setattr(offload.WeightOffloader, "after", lambda self, *given: None)
    monkeypatch.setattr(offload.WeightSlots, "idle_slots", lambda self: self.slots)
    assert growth(compose, *STREAMED, phase=phase) > 0.9


@pytest.mark.slow
def test_found_a_weight_that_is_not_taken_away(compose, monkeypatch):
    places = offload.frozen_places
    monkeypatch.setattr(offload, "frozen_places", lambda block: places(block)[:-4])
    assert growth(compose, *STREAMED) > 0.1


@pytest.mark.slow
def test_found_gradients_that_stay_on_the_device(compose, monkeypatch):
    fetch, kept = on_cpu.Gradients.fetch, []

    def keep(self, index, copy):
        kept.append(copy.grad)
        fetch(self, index, copy)

    def held() -> int:
        with phases.planned_run(config, 2) as run:
            trainer = run.trainer()
            trainer.optimizer_step()
            gc.collect()
            return run.recorder.now[False]

    config = compose(BF16, "model=2b", *FULL, AGAIN, "memory.offload_optimizer=true")
    before = held()
    monkeypatch.setattr(on_cpu.Gradients, "fetch", keep)
    after = held()
    assert after - before > 0.9 * sum(gradient.nbytes for gradient in kept) > 0
