"""One run, from its configuration to its result: encode, rehearse, train, validate, keep, deliver."""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from cogvx.config import Config, as_dict
from cogvx.data.encode import EncodedClip
from cogvx.errors import UserError
from cogvx.inference import export
from cogvx.model import lora
from cogvx.model.cogvideox import CogVideoX
from cogvx.progress import bar
from cogvx.runs import record
from cogvx.training import checkpoint as checkpoints
from cogvx.training.metrics import Metrics
from cogvx.training.prepare import Prepared, read_tensor, start_processes
from cogvx.training.step import Batch, Draw, sample_order, training_loss
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


def train(config: Config, folder: Path) -> dict:
    """task=train: the main job. Returns the run's summary."""
    started, accelerator = time.monotonic(), start_processes(config)
    data = Prepared.from_config(config, folder, accelerator)
    trainer = Trainer.build(config, folder, accelerator, data)
    try:
        summary = trainer.run()
    finally:
        if trainer.metrics:
            trainer.metrics.tracking.finish()
    return {
        **summary,
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_gib": peak_memory_gib(accelerator.device),
    }


@dataclass
class Trainer:
    config: Config
    folder: Path
    accelerator: Accelerator
    data: Prepared
    model: CogVideoX
    parameters: list[torch.nn.Parameter]
    state: checkpoints.TrainingState
    metrics: Metrics
    steps: int  # optimizer steps of the whole run
    step: int = 0  # of these, done
    asked_to_stop: int | None = None  # the signal that asked
    clock: float = field(default_factory=time.monotonic)  # when the steps since the last log began,
    timed_from: int = 0  # and after which step
    grad_norm: torch.Tensor | None = None  # of the last step, on the device
    since_logged: list[torch.Tensor] = field(default_factory=list)  # losses, on the device

    @classmethod
    def build(cls, config: Config, folder: Path, accelerator: Accelerator, data: Prepared) -> Trainer:
        transformer = data.checkpoint.transformer()
        config.lora.attach(transformer, config.seed)
        if config.train.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        parameters = lora.trainable(transformer)
        optimizer = accelerator.prepare(config.optimizer.build(parameters))
        state = checkpoints.TrainingState(transformer, optimizer, accelerator.scaler)
        source = resume_source(config.train.resume, folder)
        step, losses = (0, []) if source is None else state.load(source)
        if source is not None:
            accelerator.print(f"resume  {record.shown(source)} after step {step}")
        elif config.train.resume == "auto":
            accelerator.print("resume  nothing to go on from yet: starting at step 0")
        model = CogVideoX(
            accelerator.prepare(transformer), data.checkpoint.noise_scheduler(), data.checkpoint.geometry(),
            device=accelerator.device, dtype=data.checkpoint.dtype,
        )  # fmt: skip
        tracked = accelerator.is_main_process
        metrics = Metrics(folder, config.tracking, as_dict(config), resumed_at=step) if tracked else None
        return cls(
            config, folder, accelerator, data, model, parameters, state, metrics, step=step,
            steps=number_of_steps(config, len(data.train), accelerator.num_processes), timed_from=step,
            since_logged=[torch.tensor(loss, device=accelerator.device) for loss in losses],
        )  # fmt: skip

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        say, train, validation = self.accelerator.print, self.config.train, self.config.validation
        count = sum(p.numel() for p in self.parameters)
        say(
            f"lora    rank {self.config.lora.rank}, alpha {self.config.lora.lora_alpha:g}: {count / 1e6:.2f} M trainable parameters"
        )
        if self.step > self.steps:
            raise UserError(
                f"the checkpoint is at step {self.step} and train.max_train_steps is {self.steps}: raise it to go on"
            )
        if self.accelerator.is_main_process:
            checkpoints.rehearse(self.folder, self.state, kept=self.checkpoints_kept())
        self.write_videos(base=True)
        before = self.evaluate(base=True)
        # A run that was killed after its last step has only its end before it.
        latest = self.evaluate() if self.step == self.steps else before
        doing = "all steps are done" if self.step == self.steps else f"steps {self.step + 1} to {self.steps}"
        say(f"train   {doing}" + (f"; held-out loss of the base model {before}" if before else ""))
        with self.stop_signals(), self.progress_bar() as progress:
            self.clock = time.monotonic()
            while self.step < self.steps and not self.must_stop():
                loss, self.grad_norm, rate = self.optimizer_step()
                self.since_logged.append(loss)
                self.step += 1
                progress.update()
                at_end = self.step == self.steps
                if self.step % train.logging_steps == 0 or at_end:
                    self.log(progress, rate)
                if self.step % validation.heldout_steps == 0 or at_end:
                    latest = self.evaluate()
                if validation.validation_steps and self.step % validation.validation_steps == 0 and not at_end:
                    self.write_videos()
                if self.step % train.checkpointing_steps == 0 or at_end:
                    self.keep()
        return self.stopped() if self.step < self.steps else self.finished(before, latest)

    def stopped(self) -> dict:
        self.keep()
        self.accelerator.print(
            f"stopped after step {self.step} of {self.steps}; everything is kept. Go on with:  python launch.py train.resume={record.shown(self.folder)}"
        )
        return {"status": "interrupted", "signal": self.asked_to_stop, "step": self.step}

    def finished(self, before: HeldOutLoss | None, after: HeldOutLoss | None) -> dict:
        say = self.accelerator.print
        prompt = (self.data.validation_prompts or [self.data.train[0].example.prompt])[0]
        if self.accelerator.is_main_process:
            lines = export.deliver(self.folder, self.state.transformer, self.config, prompt, self.data.checkpoint)
        videos = self.write_videos()  # after the result is safe
        if self.accelerator.is_main_process:
            if before and after:
                verdict = (
                    "lower" if after.mean < before.mean else "NOT lower: more steps or another learning rate may help"
                )
                say(f"done    held-out loss {before} before, {after} after: {verdict}")
            for path in videos:
                say(f"video   {record.shown(path)} (base model left, tuned right)")
            say(f"result  {record.shown(self.folder / lora.WEIGHTS)}\n\nUse it in plain diffusers:\n\n{lines}\n")
        return {
            "status": "done",
            "step": self.step,
            "objective": after.mean if after else None,
            "heldout_loss_before": before.mean if before else None,
            "heldout_loss_after": after.mean if after else None,
            "heldout_standard_error": after.standard_error if after else None,
        }

    # -- one step -----------------------------------------------------------------------------------------------------

    def optimizer_step(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Mean loss of this process's samples and gradient norm, both still on the device, and the learning rate."""
        accumulation, peak = self.config.train.gradient_accumulation_steps, self.config.optimizer.learning_rate
        rate = peak * self.config.scheduler.multiplier(self.step, self.steps, peak)
        optimizer = self.state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = []
        for micro_step in range(self.step * accumulation, (self.step + 1) * accumulation):
            last = (micro_step + 1) % accumulation == 0
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model.transformer):
                batch, draw = self.batch(micro_step)
                loss = training_loss(self.model, batch, draw)
                self.accelerator.backward(loss / accumulation)
            losses.append(loss.detach())
        most = self.config.train.max_grad_norm
        grad_norm = self.accelerator.clip_grad_norm_(self.parameters, math.inf if most is None else most)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean(), grad_norm, rate

    def batch(self, micro_step: int) -> tuple[Batch, Draw]:
        """This process's clips of a micro-step. All processes together take consecutive places of the sample order, so the
        clips and draws of an optimizer step depend on its total batch alone, not on how many processes share it."""
        size, processes = self.config.train.train_batch_size, self.accelerator.num_processes
        start = (micro_step * processes + self.accelerator.process_index) * size
        samples = sample_order(self.config.seed, len(self.data.train), start, size)
        draw = Draw(self.config.seed, samples, self.accelerator.device)
        clips = [self.data.train[index] for _, index in samples]
        dropped = draw.drops_caption(self.config.train.caption_dropout)
        prompts = ["" if drop else clip.example.prompt for clip, drop in zip(clips, dropped, strict=True)]
        return self.load_batch(clips, prompts), draw

    def load_batch(self, clips: list[EncodedClip], prompts: list[str]) -> Batch:
        return Batch(
            latent_moments=torch.stack([read_tensor(clip.path, "latent_moments") for clip in clips]).to(
                self.accelerator.device
            ),
            prompt_embeds=torch.stack([self.data.embeds(prompt) for prompt in prompts]).to(self.accelerator.device),
        )

    # -- seeing and keeping -------------------------------------------------------------------------------------------

    def log(self, progress, rate: float) -> None:
        """The mean over the steps since the last call, and over all processes. The only place where the step's numbers are
        waited for."""
        loss = self.accelerator.reduce(torch.stack(self.since_logged).mean(), reduction="mean").item()
        seconds = (time.monotonic() - self.clock) / (self.step - self.timed_from)
        self.require_finite([loss])
        self.since_logged.clear()
        self.clock, self.timed_from = time.monotonic(), self.step
        grad_norm = float(self.grad_norm)
        progress.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2e}", refresh=sys.stderr.isatty())
        if self.metrics:
            self.metrics.log(
                self.step, loss=loss, grad_norm=grad_norm if math.isfinite(grad_norm) else None, lr=rate, seconds=round(seconds, 4),
                peak_memory_gib=peak_memory_gib(self.accelerator.device),
            )  # fmt: skip

    def require_finite(self, losses: list[float]) -> None:
        """Nothing that is not a number is logged or kept. fp16's loss scaling skips steps with infinite gradients by design."""
        wrong = [loss for loss in losses if not math.isfinite(loss)]
        if self.accelerator.scaler is None and self.grad_norm is not None and not math.isfinite(self.grad_norm):
            wrong.append(float(self.grad_norm))
        if wrong:
            raise UserError(
                f"the loss or its gradient is {wrong[0]} at step {self.step}. The checkpoints in {self.folder} are from before. "
                f"Usual causes: optimizer.learning_rate={self.config.optimizer.learning_rate} too high, fp16 where bf16 is needed"
            )

    def evaluate(self, *, base: bool = False) -> HeldOutLoss | None:
        """The held-out loss now, or the base model's, which stands in metrics.jsonl as step 0."""
        clips, timesteps = self.data.held_out, self.config.validation.heldout_timesteps
        with self.not_timed(), self.adapters_off() if base else contextlib.nullcontext():
            found = heldout_loss(self.model, len(clips), self.load_held_out, timesteps, self.accelerator)
        step = 0 if base else self.step
        if self.metrics and found and not self.metrics.has("heldout_loss", step):
            self.metrics.log(
                step, heldout_loss=found.mean, heldout_standard_error=found.standard_error,
                heldout_by_timestep={str(t): loss for t, loss in found.by_timestep.items()},
            )  # fmt: skip
        return found

    def load_held_out(self, index: int) -> Batch:
        clip = self.data.held_out[index]
        return self.load_batch([clip], [clip.example.prompt])

    @contextlib.contextmanager
    def adapters_off(self):
        """The base model."""
        self.state.transformer.disable_adapters()
        yield
        self.state.transformer.enable_adapters()

    @contextlib.contextmanager
    def not_timed(self):
        """Validation and checkpoints do not count into a step's seconds."""
        started = time.monotonic()
        yield
        self.clock += time.monotonic() - started

    def write_videos(self, *, base: bool = False) -> list[Path]:
        """The videos of this step; or only the base model's, before the first step, so that a lack of memory shows then."""
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return []
        videos = Videos(
            self.folder, self.config, self.data.checkpoint,
            {prompt: self.data.embeds(prompt) for prompt in self.data.validation_prompts}, self.data.embeds(""),
        )  # fmt: skip
        with self.not_timed():
            if base:
                with self.adapters_off():
                    videos.write_base(self.state.transformer)
            written = [] if base else videos.write(self.state.transformer, self.step)
        self.metrics.tracking.videos(written, self.step)
        self.accelerator.wait_for_everyone()
        return written

    def keep(self) -> None:
        limit = self.config.train.checkpoints_total_limit
        with self.not_timed():
            losses = [self.accelerator.reduce(loss, reduction="mean").item() for loss in self.since_logged]
            self.require_finite(losses)
            if self.accelerator.is_main_process:
                checkpoints.write(self.folder, self.state, self.step, losses, limit=limit)
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

    # -- stopping -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stop_signals(self):
        """Ctrl-C or a termination ends the run after the present step, with a checkpoint. A second one ends it at once."""
        before = {number: signal.signal(number, self.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def ask_to_stop(self, number: int, frame: object) -> None:
        self.asked_to_stop = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def must_stop(self) -> bool:
        """Whether any process was asked to: all of them stop after the same step."""
        if self.accelerator.num_processes == 1:
            return self.asked_to_stop is not None
        asked = torch.tensor(self.asked_to_stop or 0, device=self.accelerator.device)
        self.asked_to_stop = int(self.accelerator.gather(asked[None]).max()) or None
        return self.asked_to_stop is not None


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
        train.num_train_epochs * clips / (train.train_batch_size * train.gradient_accumulation_steps * processes)
    )


def peak_memory_gib(device: torch.device) -> float:
    """Reserved by torch on a GPU; of the whole process otherwise."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_reserved(device) / 2**30, 3)
    kilobyte = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes here
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 2**30, 3)
