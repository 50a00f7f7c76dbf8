"""One run, from its configuration to its result: encode, rehearse, train, validate, keep, deliver."""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from cogvx.config import Config, as_dict, flat
from cogvx.data.video import read_clip, to_bytes
from cogvx.errors import UserError
from cogvx.export import result as export
from cogvx.files import shown
from cogvx.inference import scores
from cogvx.model import attention, blocks, lora
from cogvx.model.cogvideox import CogVideoX
from cogvx.model.trained_weights import FullWeights, LoraWeights, weights_of
from cogvx.options.train import PROFILE_AFTER, TimestepSampling
from cogvx.progress import bar
from cogvx.records import record
from cogvx.training import checkpoint as checkpoints
from cogvx.training import guards
from cogvx.training.in_backward import SteppingInBackward
from cogvx.training.metrics import Metrics
from cogvx.training.on_cpu import Masters
from cogvx.training.prepare import Prepared, start_processes
from cogvx.training.step import Batch, Draw, sample_order, training_losses
from cogvx.training.torch_optimizer import can_skip_on_device, estimated_rate, set_learning_rate
from cogvx.training.validation import HeldOutLoss, Videos, heldout_loss


def encode(config: Config, folder: Path) -> dict:
    """task=encode: fills the cache and reports on every clip. Returns the run's summary."""
    started, accelerator = time.monotonic(), start_processes(config)
    data = Prepared.from_config(config, folder, accelerator)
    return {
        "status": "done",
        "clips": len(data.train) + len(data.held_out),
        "seconds": round(time.monotonic() - started, 1),
    }


def train(
    config: Config, folder: Path, expected: Callable[[], float | None] = lambda: None
) -> dict:
    """task=train: the main job. Returns the run's summary. expected(): seconds a step should take, when that is known."""
    started, accelerator = time.monotonic(), start_processes(config)
    if resume_source(config.train.resume, folder) is None:
        weights_of(config.lora).require_start()
    config.tracking.require_login()
    asked = scores.video_requests(
        scores.scored_prompts_of(config, config.validation.scored_prompts), seed=0
    )
    data = Prepared.from_config(config, folder, accelerator, [each.prompt for each in asked])
    with attention.using(config.train.attention):
        trainer = Trainer.build(config, folder, accelerator, data)
        trainer.expected, trainer.asked = expected, asked
        status = "failed"
        try:
            summary = trainer.run()
            status = summary["status"]
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            if trainer.metrics:
                trainer.metrics.finish(status)
    return {
        **summary,
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_gib": peak_memory_gib(accelerator.device),
    }


@dataclass(
    repr=False
)  # that of every weight; signal.signal() makes a handler's, for an error that it catches
class Trainer:
    config: Config
    folder: Path
    accelerator: Accelerator
    data: Prepared
    model: CogVideoX
    state: checkpoints.TrainingState
    source: Path | None  # the checkpoint to go on from
    watch: guards.Watch
    metrics: Metrics | None  # of the main process
    in_backward: SteppingInBackward | None
    steps: int  # optimizer steps of the whole run
    step: int  # of these, done
    timed_from: int  # the step after which, at `clock`, the steps since the last log began
    clock: float = field(default_factory=time.monotonic)
    waited: float = 0.0  # seconds for data, since the last log
    grad_norm: torch.Tensor | None = None  # of the last step, on the device
    judged: tuple[int, HeldOutLoss | None] | None = (
        None  # the step of the last held-out loss, and it
    )
    asked_to_stop: int | None = None  # the signal that asked
    progress: tqdm | None = None
    expected: Callable[[], float | None] = lambda: None  # seconds a step should take
    found_slow: bool = False
    asked: list[scores.VideoRequest] = field(
        default_factory=list
    )  # of the videos that are only scored

    @classmethod
    def build(
        cls, config: Config, folder: Path, accelerator: Accelerator, data: Prepared
    ) -> Trainer:
        say, weights = accelerator.print, weights_of(config.lora)
        source = resume_source(config.train.resume, folder)
        transformer = weights.attach(data.pretrained, config.seed)
        found = [weights.describe(transformer)]
        if source is None:
            found += weights.start(transformer)
        types, masters = guards.audit(transformer, data.pretrained.dtype), None
        if config.memory.offload_optimizer:
            masters = Masters(
                lora.trainable(transformer), data.pretrained.device, data.pretrained.dtype
            )
        blocks.arrange(
            transformer, config.memory, recompute=config.memory.gradient_checkpointing, device=data.pretrained.device,
            compiled=config.train.compile,
        )  # fmt: skip
        parameters = lora.trainable(transformer) if masters is None else masters.weights
        for line in (
            *found,
            f"types   {guards.in_words(types)}",
            speed_in_words(config, transformer, data),
            *(f"warning {w}" for w in learning_rate_warnings(config, weights)),
        ):
            say(line)
        optimizer = accelerator.prepare(
            config.optimizer.build(parameters), device_placement=[masters is None]
        )
        if masters is not None:
            optimizer.optimizer.register_step_post_hook(masters.push)
        in_backward = (
            SteppingInBackward(optimizer.optimizer) if config.memory.step_in_backward else None
        )
        average = (
            None
            if config.train.ema_decay is None
            else EMAModel(parameters, decay=config.train.ema_decay)
        )
        state = checkpoints.TrainingState(
            transformer,
            weights,
            parameters,
            optimizer,
            config.optimizer,
            accelerator.scaler,
            average,
            masters,
        )
        step, pending = 0, []
        if source is not None:
            state.require_fit(source)
            about = checkpoints.manifest(source)
            step, pending = (
                about["step"],
                about["pending"][accelerator.process_index :: accelerator.num_processes],
            )
            say(f"resume  {shown(source)} after step {step}")
        elif config.train.resume == "auto":
            say("resume  nothing to go on from yet: starting at step 0")
        steps = number_of_steps(config, len(data.train), accelerator.num_processes)
        if step > steps:
            raise UserError(
                f"the checkpoint is at step {step} and train.max_train_steps is {steps}: raise it to go on"
            )
        model = CogVideoX(
            accelerator.prepare(transformer), data.pretrained.noise_scheduler(), data.pretrained.geometry(),
            device=accelerator.device, dtype=data.pretrained.dtype,
        )  # fmt: skip
        watch = guards.Watch(config.train.max_skipped_steps, rows=pending)
        metrics = None
        if accelerator.is_main_process:
            record.note(folder, dtypes=types, steps=steps)
            metrics = Metrics(
                folder, config.tracking, config.choices | flat(as_dict(config)), resumed_at=step
            )
        return cls(
            config, folder, accelerator, data, model, state, source, watch, metrics, in_backward, steps=steps, step=step,
            timed_from=step,
        )  # fmt: skip

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        say, train, validation = self.accelerator.print, self.config.train, self.config.validation
        if self.accelerator.is_main_process:
            checkpoints.rehearse(self.folder, self.state, kept=self.checkpoints_kept())
        self.write_videos(base=True)
        before = self.evaluate(base=True)
        if self.source is not None:
            self.state.load(self.source)
        # A run that was killed after its last step has only its end before it.
        latest = self.evaluate() if self.step == self.steps else before
        doing = (
            "all steps are done"
            if self.step == self.steps
            else f"steps {self.step + 1} to {self.steps}"
        )
        say(
            f"train   {doing}"
            + (f"; held-out loss of the base model {before}{floor_of(before)}" if before else "")
        )
        with self.stop_signals(), self.progress_bar() as progress, self.profiler() as profiler:
            self.clock, self.progress = time.monotonic(), progress
            while self.step < self.steps and not self.must_stop():
                rate = self.optimizer_step()
                self.step += 1
                progress.update()
                profiler.step()
                at_end = self.step == self.steps
                keeping = self.step % train.checkpointing_steps == 0 or at_end
                if self.step % train.logging_steps == 0 or at_end:
                    self.log(progress, rate)
                if self.step % validation.heldout_steps == 0 or keeping:
                    latest = self.evaluate()
                if (
                    validation.validation_steps
                    and self.step % validation.validation_steps == 0
                    and not at_end
                ):
                    self.write_videos()
                if keeping:
                    self.keep()
        return self.stopped() if self.step < self.steps else self.finished(before, latest)

    def stopped(self) -> dict:
        self.keep()
        self.accelerator.print(
            f"stopped after step {self.step} of {self.steps}; everything is kept. Go on with:  python launch.py train.resume={shown(self.folder)}"
        )
        return {"status": "interrupted", "signal": self.asked_to_stop, "step": self.step}

    def finished(self, before: HeldOutLoss | None, after: HeldOutLoss | None) -> dict:
        say, lines = self.accelerator.print, ""
        prompt = self.data.example_prompt
        if self.accelerator.is_main_process:
            with self.state.averaged():
                lines = export.deliver(
                    self.folder,
                    self.state.transformer,
                    self.state.weights,
                    self.config,
                    prompt,
                    self.data.images.get(prompt),
                    self.data.pretrained,
                )
        videos, compared = self.write_videos(), self.compare()  # after the result is safe
        best = checkpoints.best(self.folder)
        best_at = None if best is None else checkpoints.manifest(best)
        if self.accelerator.is_main_process:
            if before and after:
                lower = round(after.mean, 4) < round(before.mean, 4)
                verdict = (
                    "lower" if lower else "NOT lower: more steps or another learning rate may help"
                )
                say(f"done    held-out loss {before} before, {after} after: {verdict}")
            if best is not None and best_at["step"] != self.step:
                place = best / checkpoints.AVERAGED if self.state.delivers_an_average() else best
                say(
                    f"best    held-out loss {best_at['heldout_loss']:.4f} after step {best_at['step']}: {shown(place)}"
                )
            for path in videos:
                say(
                    f"video   {shown(path)} (base model, tuned, a training clip; .gif and .png beside it)"
                )
            if compared:
                say(f"score   {scores.score_line(compared)}")
            result = self.folder / self.state.weights.result
            say(f"result  {shown(result)}\n\nUse it in plain diffusers:\n\n{lines}\n")
        return {
            "status": "done",
            "step": self.step,
            "objective": after.mean if after else None,
            "heldout_loss_before": before.mean if before else None,
            "heldout_loss_after": after.mean if after else None,
            "heldout_standard_error": after.standard_error if after else None,
            "heldout_noise_floor": after.noise_floor if after else None,
            "best_heldout_loss": best_at["heldout_loss"] if best_at else None,
            "best_step": best_at["step"] if best_at else None,
            **scores.summary_scores(compared),
        }

    # -- one step -----------------------------------------------------------------------------------------------------

    def optimizer_step(self) -> float:
        """Returns the learning rate. Losses and gradient norm stay on the device, and nothing waits for it, unless the optimizer
        cannot leave out by itself a step whose gradient is not finite."""
        train, peak, optimizer = (
            self.config.train,
            self.config.optimizer.learning_rate,
            self.state.optimizer,
        )
        accumulation = train.gradient_accumulation_steps
        rate = peak * self.config.scheduler.multiplier(self.step, self.steps, peak)
        set_learning_rate(optimizer, rate)
        for micro_step in range(self.step * accumulation, (self.step + 1) * accumulation):
            last = (micro_step + 1) % accumulation == 0
            with (
                contextlib.nullcontext()
                if last
                else self.accelerator.no_sync(self.model.transformer)
            ):
                started = time.monotonic()
                batch, draw = self.batch(micro_step)
                self.waited += time.monotonic() - started
                losses, timesteps = training_losses(self.model, batch, draw)
                self.watch.saw(
                    [self.listed(sample.index) for sample in draw.samples], timesteps, losses
                )
                if train.min_snr_gamma is not None:
                    losses = losses * self.model.min_snr_weight(timesteps, train.min_snr_gamma)
                self.accelerator.backward(losses.mean() / accumulation)
        self.grad_norm = self.clipped()
        self.watch.stepped(self.step + 1, self.grad_norm, accumulation * train.train_batch_size)
        if self.leaves_out_by_itself() or not self.left_out():
            if self.in_backward is None:
                optimizer.step()
            if self.state.average is not None:
                self.state.average.step(self.state.parameters)
        optimizer.zero_grad()
        return rate

    def clipped(self) -> torch.Tensor:
        """The norm of all gradients, which are clipped where that is asked for."""
        if self.in_backward is not None:
            return self.in_backward.grad_norm()
        most = self.config.train.max_grad_norm
        return self.accelerator.clip_grad_norm_(
            self.state.parameters, math.inf if most is None else most
        )

    def leaves_out_by_itself(self) -> bool:
        """Whether a step without a finite gradient changes nothing, told or not: fp16's loss scaling leaves it out too."""
        scaled = self.accelerator.scaler is not None
        return (
            scaled
            or self.in_backward is not None
            or can_skip_on_device(self.state.optimizer, self.grad_norm)
        )

    def left_out(self) -> list[int]:
        """The steps since the last call that were left out, each said once with its clips."""
        found = self.watch.left_out(expected=self.accelerator.scaler is not None)
        for step, named in found.items():
            if self.metrics:
                self.metrics.log(step, skipped=named)
                tqdm.write(
                    f"warning step {step} left out, its gradient is not finite: {'; '.join(named)}"
                )
        return list(found)

    def listed(self, index: int) -> str:
        example = self.data.train[index].example
        return f"{example.origin} {example.video.name}"

    def batch(self, micro_step: int) -> tuple[Batch, Draw]:
        """This process's clips of a micro-step. All processes together take consecutive places of the sample order, so the
        clips and draws of an optimizer step depend on its total batch alone, not on how many processes share it."""
        train, processes = self.config.train, self.accelerator.num_processes
        size = train.train_batch_size
        start = (micro_step * processes + self.accelerator.process_index) * size
        samples = sample_order(self.config.seed, len(self.data.train), start, size)
        draw = Draw(
            self.config.seed, samples, self.accelerator.device,
            timestep_sampling=TimestepSampling(train.timestep_sampling, train.logit_mean, train.logit_std),
            caption_dropout=train.caption_dropout, image_dropout=train.image_dropout,
        )  # fmt: skip
        clips = [self.data.train[sample.index] for sample in samples]
        prompts = [
            "" if drop else clip.example.prompt
            for clip, drop in zip(clips, draw.drops_caption(), strict=True)
        ]
        noisy = self.config.data.image_noise_variants
        variants = [1 + variant for variant in draw.image_variants(noisy)] if noisy else [0] * size
        return self.data.load_batch(clips, prompts, variants), draw

    # -- seeing and keeping -------------------------------------------------------------------------------------------

    def log(self, progress, rate: float) -> None:
        """The mean over the steps since the last call, and over all processes."""
        seconds, waited = (
            (total / (self.step - self.timed_from))
            for total in (time.monotonic() - self.clock, self.waited)
        )
        self.left_out()
        losses = self.watch.means()
        self.clock, self.timed_from, self.waited = time.monotonic(), self.step, 0.0
        grad_norm = float(self.grad_norm)
        self.warn_if_slow(seconds, waited)
        if losses:
            progress.set_postfix_str(
                f"loss {losses['loss']:.4f}, lr {rate:.2e}", refresh=sys.stderr.isatty()
            )
        if self.metrics:
            self.metrics.log(
                self.step, **losses, grad_norm=grad_norm if math.isfinite(grad_norm) else None, lr=rate,
                **self.estimated_rate(), seconds=round(seconds, 4), data_seconds=round(waited, 4),
                peak_memory_gib=peak_memory_gib(self.accelerator.device),
            )  # fmt: skip

    def estimated_rate(self) -> dict[str, float]:
        finds = self.config.optimizer.finds_its_own_rate
        return estimated_rate(self.state.optimizer) if finds else {}

    def warn_if_slow(self, seconds: float, waited: float) -> None:
        """Once, not for the first steps, which are slower."""
        warmed_up = self.step >= 2 * self.config.train.logging_steps
        found = (
            guards.slow(seconds, waited, self.expected())
            if warmed_up and not self.found_slow
            else None
        )
        if found is not None:
            self.found_slow = True
            tqdm.write(f"warning {found}")

    def evaluate(self, *, base: bool = False) -> HeldOutLoss | None:
        """The held-out loss now, of the weights that would be delivered; or the base model's, which stands in metrics.jsonl as
        step 0. Where an average of the weights is delivered, the weights themselves are judged too, as heldout_loss_trained."""
        step, values = 0 if base else self.step, {}
        with self.not_timed():
            if self.state.average is not None and not base:
                trained = self.heldout_loss()
                values["heldout_loss_trained"] = trained and trained.mean
            with self.state.base_model() if base else self.state.averaged():
                found = self.heldout_loss(base=base)
        if not base:
            self.judged = (step, found)
        if self.metrics and found and not self.metrics.has("heldout_loss", step):
            self.metrics.log(
                step, heldout_loss=found.mean, **values, heldout_standard_error=found.standard_error,
                heldout_noise_floor=found.noise_floor, heldout_by_timestep={str(t): loss for t, loss in found.by_timestep.items()},
                heldout_by_clip=found.by_clip,
            )  # fmt: skip
        return found

    def heldout_loss(self, *, base: bool = False) -> HeldOutLoss | None:
        found = heldout_loss(
            self.model,
            len(self.data.held_out),
            self.data.held_out_batch,
            self.config.validation,
            self.accelerator,
        )
        if found and not math.isfinite(found.mean):
            if base:
                raise UserError(
                    f"the base model's held-out loss is {found.mean}: its weights are damaged, or too large for "
                    f"train.mixed_precision={self.config.train.mixed_precision.name}"
                )
            raise UserError(
                f"the held-out loss is {found.mean} after step {self.step}: the weights are spoilt. The checkpoints in "
                f"{self.folder} are from before. Usual causes: optimizer.learning_rate="
                f"{self.config.optimizer.learning_rate:g} too high, fp16 where bf16 is needed"
            )
        return found

    @contextlib.contextmanager
    def not_timed(self):
        """Validation and checkpoints do not count into a step's seconds, nor into the time that the progress bar expects."""
        started = time.monotonic()
        yield
        took = time.monotonic() - started
        self.clock += took
        if self.progress is not None and not self.progress.disable:
            self.progress.start_t += took
            self.progress.last_print_t += took

    def write_videos(self, *, base: bool = False) -> list[Path]:
        """The videos of this step; or only the base model's, before the first step, so that a lack of memory shows then."""
        if not self.data.validation_prompts and not self.asked:
            return []
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return []
        videos, written = self.videos(), []
        with self.not_timed(), self.state.base_model() if base else self.state.averaged():
            clear_device_cache(
                garbage_collection=True
            )  # what training keeps for its next step is in the way of the VAE
            if base:
                videos.write_base(self.state.transformer)
            else:
                written = videos.write(self.state.transformer, self.step)
            clear_device_cache(garbage_collection=True)  # of the VAE
        self.metrics.videos(written, self.step)
        self.accelerator.wait_for_everyone()
        return written

    def videos(self) -> Videos:
        prompts, data = self.data.validation_prompts, self.config.data
        clips = {prompt: self.data.clip_beside(prompt).example.video for prompt in prompts}
        beside = {prompt: to_bytes(read_clip(path, data).frames) for prompt, path in clips.items()}
        return Videos(
            self.folder, self.config, self.data.pretrained, prompts, self.data.embeds, self.data.images, beside, self.asked
        )  # fmt: skip

    def compare(self) -> list[scores.Comparison]:
        """The scores beside the base model's, at the end; also in evaluation.json and evaluation.csv."""
        found = []
        if self.asked and self.accelerator.is_main_process:
            with self.not_timed(), self.state.averaged():
                clear_device_cache(garbage_collection=True)
                rows = self.videos().score_both(self.state.transformer, self.step)
            found = scores.comparisons(rows["base"], rows["result"])
            scores.write_evaluation(self.folder, rows, {"result": found}, {"step": self.step})
        self.accelerator.wait_for_everyone()
        return found

    def keep(self) -> None:
        limit = self.config.train.checkpoints_total_limit
        judged_at, found = self.judged or (None, None)
        with self.not_timed():
            self.left_out()
            pending = self.watch.everyones()
            if not all(bool(parameter.isfinite().all()) for parameter in self.state.parameters):
                raise UserError(
                    f"trained weights are not finite after step {self.step}; the checkpoints in {self.folder} are from before. Usual "
                    f"cause: optimizer.learning_rate={self.config.optimizer.learning_rate:g} too high"
                )
            if self.accelerator.is_main_process:
                heldout_loss = found.mean if found and judged_at == self.step else None
                checkpoints.write(
                    self.folder, self.state, self.step, pending, heldout_loss, limit=limit
                )
            self.accelerator.wait_for_everyone()

    def checkpoints_kept(self) -> int:
        written = -(-self.steps // self.config.train.checkpointing_steps)
        limit = self.config.train.checkpoints_total_limit
        return written if limit is None else min(limit, written)

    def progress_bar(self):
        return bar(
            total=self.steps,
            initial=self.step,
            desc="train ",
            unit="step",
            disable=not self.accelerator.is_main_process or self.step == self.steps,
        )

    def profiler(self):
        """Records train.profile_steps steps, once the first are over."""
        count = self.config.train.profile_steps
        if not count or not self.accelerator.is_main_process:
            return contextlib.nullcontext(Unprofiled())
        when = torch.profiler.schedule(wait=PROFILE_AFTER - 1, warmup=1, active=count, repeat=1)
        return torch.profiler.profile(
            schedule=when, on_trace_ready=self.write_profile, record_shapes=True
        )

    def write_profile(self, recorded) -> None:
        place, kind = self.folder / "profile", self.accelerator.device.type
        place.mkdir(exist_ok=True)
        table = recorded.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=40)
        (place / "operations.txt").write_text(table, encoding="utf-8")
        recorded.export_chrome_trace(str(place / "trace.json"))
        tqdm.write(
            f"profile {shown(place / 'operations.txt')} says where the time of {self.config.train.profile_steps} steps went, "
            f"trace.json beside it shows it (chrome://tracing, Perfetto)"
        )

    # -- stopping -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stop_signals(self):
        """Ctrl-C or a termination ends the run after the present step, with a checkpoint. A second Ctrl-C ends it at once; of
        terminations a job may get several, from Slurm and from the process that started it."""
        before = {
            number: signal.signal(number, self.ask_to_stop)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def ask_to_stop(self, number: int, frame: object) -> None:
        self.asked_to_stop = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def must_stop(self) -> bool:
        """Whether any process was asked to: all of them stop after the same step."""
        if self.accelerator.num_processes == 1:
            return self.asked_to_stop is not None
        asked = torch.tensor(self.asked_to_stop or 0, device=self.accelerator.device)
        self.asked_to_stop = int(self.accelerator.gather(asked[None]).max()) or None
        return self.asked_to_stop is not None


class Unprofiled:
    """In a profiler's place."""

    def step(self) -> None:
        pass


def speed_in_words(config: Config, transformer: torch.nn.Module, data: Prepared) -> str:
    heads, width = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    kernel = attention.in_use(heads, width, data.pretrained.device, data.pretrained.dtype)
    return f"speed   attention by {kernel.name}" + (
        "; blocks compiled by torch" if config.train.compile else ""
    )


def learning_rate_warnings(config: Config, weights: LoraWeights | FullWeights) -> list[str]:
    optimizer, schedule = config.optimizer, config.scheduler
    found = [*optimizer.warnings(), *weights.warnings(optimizer)]
    if optimizer.averages_weights and schedule.decays:
        found.append(
            f"optimizer={config.choices['optimizer']} is meant for scheduler=constant_with_warmup; "
            f"this run has scheduler={config.choices['scheduler']}"
        )
    return found


def floor_of(loss: HeldOutLoss) -> str:
    return "" if loss.noise_floor is None else f" (noise floor {loss.noise_floor:.4f})"


def resume_source(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint to start from: this folder's own newest, if it has any, else the one asked for."""
    own = checkpoints.all_complete(folder)
    if own:
        return own[-1]
    return None if resume in (None, "auto") else checkpoints.newest(Path(resume))


def number_of_steps(config: Config, clips: int, processes: int) -> int:
    train = config.train
    if train.max_train_steps is not None:
        return train.max_train_steps
    return math.ceil(
        train.num_train_epochs
        * clips
        / (train.train_batch_size * train.gradient_accumulation_steps * processes)
    )


def peak_memory_gib(device: torch.device) -> float:
    """Reserved by torch on a GPU; of the whole process otherwise."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_reserved(device) / 2**30, 3)
    kilobyte = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes here
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 2**30, 3)
