"""The training loop."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from cogvx.config import Config
from cogvx.files import read_json_lines, shown
from cogvx.inference import scores
from cogvx.model.cogvideox import CogVideoX
from cogvx.progress import PULSE, bar, heartbeat
from cogvx.records import record
from cogvx.records.left import skipped_in
from cogvx.training import checkpoint as checkpoints
from cogvx.training.batches import Batches
from cogvx.training.heldout import HeldOutLoss, heldout_loss, require_finite
from cogvx.training.in_backward import SteppingInBackward
from cogvx.training.loss_log import LossLog
from cogvx.training.metrics import Metrics
from cogvx.training.out_of_memory import forget_frames, lack_of, noting_lack, said_of_skipped
from cogvx.training.outcome import RunOutcome, deliver_result
from cogvx.training.peaks import give_memory_back
from cogvx.training.prepare import Prepared
from cogvx.training.previews import Previews
from cogvx.training.profiler import profiler
from cogvx.training.ranks import Made, Ranks
from cogvx.training.state import TrainingState
from cogvx.training.step import training_losses
from cogvx.training.stop import REQUESTS, SAVE, CutShort
from cogvx.training.timing import StepTimer
from cogvx.training.torch_optimizer import can_skip_on_device, estimated_rate, set_learning_rate
from cogvx.training.videos import ValidationVideos

# What a signal cuts short, as a checkpoint's manifest names it.
HELD_OUT_LOSS, PREVIEW, VIDEOS = "held-out loss", "preview", "videos"


# A repr would read every weight from the device.
@dataclass(repr=False)
class Trainer:
    """One run. setup.build_trainer() makes it."""

    config: Config
    folder: Path
    ranks: Ranks
    data: Prepared
    model: CogVideoX
    state: TrainingState
    batches: Batches
    losses: LossLog
    timer: StepTimer
    videos: ValidationVideos
    previews: Previews | None
    metrics: Metrics | None  # of the process that logs
    in_backward: SteppingInBackward | None
    source: Path | None  # the checkpoint to resume from
    steps: int  # optimizer steps of the whole run
    step: int  # how many of them are done
    grad_norm: torch.Tensor | None = None  # of the last step, on the device
    latest: tuple[int, HeldOutLoss | None] | None = None  # a step and its held-out loss
    missing: list[str] = field(default_factory=list)  # of this step: a signal cut it short
    has_base_videos: bool = True  # False: there was no memory for them

    # -- the run -----------------------------------------------------------------------------

    def run(self) -> dict:
        """Trains until the last step, or until a stop signal. Returns the run's summary."""
        before, latest = self.begin()
        # The first step does not begin with what the base model's loss has left reserved.
        give_memory_back()
        with REQUESTS.after_the_step():
            stopped = self.train()
            if stopped is not None:
                return self.interrupted(stopped)
        return self.finish(before, self.latest[1] if self.latest else latest)

    def train(self) -> int | None:
        """The step loop. Returns the signal that ended it, or None after the last step."""
        train, validation = self.config.train, self.config.validation
        phase = self.ranks.peaks.phase("train")
        with phase, self.progress_bar() as progress, self.profiler() as profile:
            self.timer.start(progress)
            PULSE.at_step(self.step, self.steps)
            while self.step < self.steps:
                asked = REQUESTS.asked(self.ranks)
                if asked == SAVE:
                    self.save_when_asked()
                elif asked is not None:
                    return asked
                rate = self.optimizer_step()
                self.step += 1
                PULSE.at_step(self.step, self.steps)
                progress.update()
                profile.step()
                if self.is_due(train.logging_steps):
                    self.log(progress, rate)
                if self.is_due(validation.heldout_steps) or self.is_due(train.checkpointing_steps):
                    self.evaluate()
                if self.is_due(validation.preview_steps):
                    self.write_preview()
                if self.is_due(validation.validation_steps) and self.step < self.steps:
                    self.write_videos()
                if self.is_due(train.checkpointing_steps):
                    self.save_checkpoint()
            asked = REQUESTS.asked(self.ranks)
        return None if asked == SAVE else asked

    def is_due(self, every: int | None) -> bool:
        """What happens every so many steps also happens after the last one; None: never."""
        return every is not None and (self.step % every == 0 or self.step == self.steps)

    def begin(self) -> tuple[HeldOutLoss | None, HeldOutLoss | None]:
        """The base model's held-out loss, and the present one."""
        if self.ranks.saves:
            kept = checkpoints.number_kept(self.steps, self.config.train)
            with noting_lack("save", "a rehearsal before the first step"):
                checkpoints.rehearse(self.folder, self.state, kept=kept)
        self.write_videos(base=True)
        before = latest = self.evaluate(base=True)
        if self.source is not None:
            self.state.load(self.source)
            self.make_missing()
        doing = f"steps {self.step + 1} to {self.steps}"
        # A run that was killed after its last step still has to deliver its result.
        if self.step == self.steps:
            latest = self.evaluate()
            doing = "all steps are done"
        loss = f"; held-out loss of the base model {before}{noise_floor(before)}" if before else ""
        self.ranks.say(f"train   {doing}{loss}")
        return before, latest

    def make_missing(self) -> None:
        """What a signal cut short after the step that this run goes on from."""
        missing = checkpoints.read_manifest(self.source).get("missing", [])
        if not missing or self.source.parent.parent != self.folder:
            return
        makers = {
            HELD_OUT_LOSS: self.evaluate,
            PREVIEW: self.write_preview,
            VIDEOS: self.write_videos,
        }
        made = {what: makers[what]() for what in missing}
        if self.ranks.saves:
            found = made.get(HELD_OUT_LOSS)
            now = {"heldout_loss": found.mean} if found else {}
            checkpoints.note_in_manifest(self.source, missing=[], **now)

    @contextlib.contextmanager
    def cut_short_by_signals(self, what: str) -> Iterator[None]:
        """The block ends early once a signal has come in the step loop. `what` is then missing."""
        try:
            yield
        except CutShort:
            self.missing.append(what)

    def save_when_asked(self) -> None:
        """For the file `save` in the run's folder."""
        if self.step:
            self.save_checkpoint()
            self.ranks.say(f"saved   a checkpoint after step {self.step}, as asked")

    def interrupted(self, number: int) -> dict:
        """number: the signal's."""
        self.save_checkpoint()
        self.ranks.say(
            f"stopped after step {self.step} of {self.steps}; a checkpoint is saved. "
            f"Go on with:  python launch.py train.resume={shown(self.folder)}"
        )
        return {"status": "interrupted", "signal": number, "step": self.step}

    def finish(self, before: HeldOutLoss | None, after: HeldOutLoss | None) -> dict:
        usage = ""
        if self.ranks.saves:
            with noting_lack("save", "the result"):
                usage = deliver_result(self.folder, self.state, self.config, self.data)
        # Videos and scores come after the result is safe.
        videos, compared = self.write_videos(), self.compare()
        skipped = skipped_in(read_json_lines(self.metrics.path)) if self.metrics else {}
        outcome = RunOutcome(self.step, before, after, videos, compared, skipped)
        if self.ranks.logs:
            for line in (*outcome.lines(self.folder, self.state), *self.ranks.peaks.lines()):
                self.ranks.say(line)
            self.ranks.say(f"\nUse it in plain diffusers:\n\n{usage}\n")
        return (
            outcome.summary(self.folder, self.state.weights.result)
            if self.ranks.logs
            else {"status": "done"}
        )

    # -- one step ----------------------------------------------------------------------------

    def optimizer_step(self) -> float:
        """Returns the learning rate.

        Losses and gradient norm stay on the device, and the CPU does not wait for them, unless the
        optimizer cannot skip a step whose gradient is not finite by itself.
        """
        train, optimizer = self.config.train, self.state.optimizer
        accumulation, peak = train.gradient_accumulation_steps, self.config.optimizer.learning_rate
        rate = peak * self.config.scheduler.multiplier(self.step, self.steps, peak)
        set_learning_rate(optimizer, rate)
        for micro_step in range(self.step * accumulation, (self.step + 1) * accumulation):
            self.backward(micro_step)
        self.ranks.peaks.place = f"optimizer of step {self.step + 1}"
        self.state.wait_for_gradients()
        self.grad_norm = self.clip_gradients()
        samples = accumulation * train.train_batch_size
        self.losses.end_step(self.step + 1, self.grad_norm, samples)
        if self.skips_by_itself() or not self.report_skipped():
            if self.in_backward is None:
                optimizer.step()
            if self.state.average is not None:
                self.state.average.step(self.state.parameters)
        optimizer.zero_grad()
        return rate

    def backward(self, micro_step: int) -> None:
        """Adds a micro-batch's gradients. The processes average them after the last one."""
        train, accelerator = self.config.train, self.ranks.accelerator
        last = (micro_step + 1) % train.gradient_accumulation_steps == 0
        peaks, step = self.ranks.peaks, self.step + 1
        peaks.place = f"forward pass of step {step}"
        alone = contextlib.nullcontext() if last else accelerator.no_sync(self.model.transformer)
        with alone:
            with self.timer.waiting_for_data():
                batch, draw = self.batches.load(micro_step)
            self.timer.tokens += self.model.tokens(batch.latent_moments)
            losses, timesteps = training_losses(self.model, batch, draw)
            self.losses.add(self.batches.names(draw), timesteps, losses)
            if train.min_snr_gamma is not None:
                losses = losses * self.model.min_snr_weight(timesteps, train.min_snr_gamma)
            peaks.place = f"backward pass of step {step}"
            accelerator.backward(losses.mean() / train.gradient_accumulation_steps)
            PULSE.beat()

    def clip_gradients(self) -> torch.Tensor:
        """Returns the norm of all gradients before they are clipped to train.max_grad_norm."""
        if self.in_backward is not None:
            return self.in_backward.grad_norm()
        most = self.config.train.max_grad_norm
        most = math.inf if most is None else most
        return self.ranks.accelerator.clip_grad_norm_(self.state.parameters, most)

    def skips_by_itself(self) -> bool:
        """Whether a gradient that is not finite changes nothing, without the CPU looking at it."""
        if self.uses_loss_scaling or self.in_backward is not None:
            return True
        return can_skip_on_device(self.state.optimizer, self.grad_norm)

    @property
    def uses_loss_scaling(self) -> bool:
        """With fp16. Loss scaling skips steps by itself."""
        return self.ranks.accelerator.scaler is not None

    def report_skipped(self) -> list[int]:
        """The steps skipped since the last call. A warning names each with its clips."""
        found = self.losses.skipped(expected=self.uses_loss_scaling)
        for step, clips in found.items():
            if self.metrics:
                self.metrics.log(step, skipped=clips)
                what = "the gradient is not finite"
                tqdm.write(f"warning step {step} is skipped, {what}: {'; '.join(clips)}")
        return list(found)

    # -- what a run shows and saves ----------------------------------------------------------

    def log(self, progress: tqdm, rate: float) -> None:
        """Means over the steps since the last call, and over all processes.

        UserError if the run's folder is gone.
        """
        if self.metrics:
            record.require_there(self.folder)
        # Reading these waits for the device. The steps are done, and timed, after that.
        self.report_skipped()
        losses, grad_norm = self.losses.means(), float(self.grad_norm)
        lap = self.timer.lap(self.step)
        # The first steps are slower.
        if self.step >= 2 * self.config.train.logging_steps:
            self.timer.warn_if_slow(lap.seconds, lap.waited)
        if losses:
            text = f"loss {losses['loss']:.4f}, lr {rate:.2e}"
            progress.set_postfix_str(text, refresh=sys.stderr.isatty())
        if self.metrics:
            finds_rate = self.config.optimizer.finds_its_own_rate
            self.metrics.log(
                self.step,
                **losses,
                grad_norm=grad_norm if math.isfinite(grad_norm) else None,
                lr=rate,
                **(estimated_rate(self.state.optimizer) if finds_rate else {}),
                seconds=round(lap.seconds, 4),
                data_seconds=round(lap.waited, 4),
                tokens_per_second=round(lap.tokens * self.ranks.count),
                peak_memory_gib=self.ranks.peaks.of_line("train"),
            )

    def evaluate(self, *, base: bool = False) -> HeldOutLoss | None:
        """The held-out loss of the weights that would be delivered now; None without clips.

        base: that of the base model, which is step 0 in metrics.jsonl. It must be there: without
        it nothing can be said of the result. A later one is None if memory ends, or if a signal
        has cut it short.
        """
        if base:
            return self.judge(base=True)
        found = self.unless_memory_ends(HELD_OUT_LOSS, self.judge)
        self.latest = (self.step, found)
        return found

    def judge(self, *, base: bool = False) -> HeldOutLoss | None:
        """If an average is delivered, heldout_loss_trained is that of the trained weights."""
        step, more, found = 0 if base else self.step, {}, None
        peaks = self.ranks.peaks
        doing = heartbeat("train   still computing the held-out loss")
        short = self.cut_short_by_signals(HELD_OUT_LOSS)
        with short, self.timer.paused(), peaks.phase("held-out loss", self.when(base)), doing:
            if self.state.average is not None and not base:
                trained = self.heldout_loss()
                more["heldout_loss_trained"] = trained and trained.mean
            with self.state.base_model() if base else self.state.averaged():
                found = self.heldout_loss(base=base)
        if self.metrics and found and not self.metrics.has("heldout_loss", step):
            peak = peaks.of_line("held-out loss")
            self.metrics.log(step, **found.for_metrics(), **more, peak_memory_gib=peak)
        return found

    def heldout_loss(self, *, base: bool = False) -> HeldOutLoss | None:
        """UserError if it is not finite."""
        data, validation = self.data, self.config.validation
        found = heldout_loss(
            self.model, len(data.held_out), data.held_out_batch, validation, self.ranks
        )
        if not found:
            return None
        require_finite(found, self.config, self.folder, None if base else self.step)
        return found.apart([clip.example.source for clip in data.held_out])

    def write_videos(self, *, base: bool = False) -> list[tuple[Path, str]]:
        """This step's videos, and the title of the real clip beside each.

        base: only those of the base model, before the first step, so that a lack of memory shows.
        None are made if memory ends. Without the base model's there are no later ones.
        """
        if not self.videos.prompts and not self.videos.scored:
            return []
        written = []
        if self.ranks.makes_videos and base:
            made = self.unless_memory_ends(VIDEOS, self.make_base_videos, step=0)
            self.has_base_videos = made is not None
        elif self.ranks.makes_videos and self.has_base_videos:
            written = self.unless_memory_ends(VIDEOS, self.make_videos) or []
        if self.metrics:
            self.metrics.videos([path for path, _ in written], self.step)
        self.ranks.wait()
        return written

    def make_base_videos(self) -> bool:
        with self.cut_short_by_signals(VIDEOS), self.generating(base=True):
            self.videos.write_base(self.state.transformer)
        return True

    def make_videos(self) -> list[tuple[Path, str]]:
        with self.cut_short_by_signals(VIDEOS), self.generating():
            return self.videos.write(self.state.transformer, self.step)
        return []

    def unless_memory_ends(
        self, what: str, make: Callable[[], Made], *, step: int | None = None
    ) -> Made | None:
        """What make() returns. If memory ends in it: None and a warning, and training goes on.

        what: the part of validation that is skipped.
        """
        step = self.step if step is None else step
        try:
            return make()
        except Exception as error:
            if lack_of(error) is None:
                raise
            if self.ranks.logs:
                of_what = f"{what} of step {step}" if step else f"{what} of the base model"
                tqdm.write(said_of_skipped(error, of_what, self.config, self.folder))
            forget_frames(error)
        # Until here the error held what was in memory when it was raised.
        give_memory_back(collect=True)
        if self.metrics:
            self.metrics.log(step, out_of_memory=what)
        return None

    def when(self, base: bool = False) -> str:
        """For messages."""
        return f"after step {self.step}" if self.step and not base else "before the first step"

    def write_preview(self) -> None:
        if self.previews is None:
            return
        written = []
        if self.ranks.makes_videos:
            short = self.cut_short_by_signals(PREVIEW)
            with short, self.timer.paused(), self.ranks.peaks.phase("preview"):
                written = self.previews.write(self.step)
        if self.metrics:
            self.metrics.videos(written, self.step)
        self.ranks.wait()

    @contextlib.contextmanager
    def generating(self, *, base: bool = False):
        REQUESTS.cut_short_if_asked()
        with self.timer.paused(), self.state.base_model() if base else self.state.averaged():
            # What training keeps for its next step leaves no room for the VAE, and the reverse.
            give_memory_back(collect=True)
            with self.ranks.peaks.phase("video", self.when(base)):
                yield
                give_memory_back(collect=True)

    def compare(self) -> list[scores.Comparison]:
        """The base model's and the result's scores; evaluation.json and evaluation.csv."""
        found = []
        if self.videos.scored and self.ranks.makes_videos and self.has_base_videos:
            found = self.unless_memory_ends("scores", self.make_scores) or []
        self.ranks.wait()
        return found

    def make_scores(self) -> list[scores.Comparison]:
        with self.generating():
            rows = self.videos.score_both(self.state.transformer, self.step)
        found = scores.comparisons(rows["base"], rows["result"])
        scores.write_evaluation(self.folder, rows, {"result": found}, {"step": self.step})
        return found

    def save_checkpoint(self) -> None:
        """UserError if the weights are not finite, or the run's folder is gone."""
        if self.ranks.saves:
            record.require_there(self.folder)
        step, found = self.latest or (None, None)
        heldout = found.mean if found and step == self.step else None
        with self.timer.paused():
            self.report_skipped()
            pending = self.losses.of_all_processes()
            self.state.require_finite(self.step, self.folder)
            if self.metrics:
                self.metrics.flush()
            if self.ranks.saves:
                limit = self.config.train.checkpoints_total_limit
                with noting_lack("save", f"the checkpoint of step {self.step}"):
                    checkpoints.write_checkpoint(
                        self.folder,
                        self.state,
                        self.step,
                        pending,
                        heldout,
                        limit=limit,
                        missing=self.missing,
                    )
            self.ranks.wait()

    def progress_bar(self) -> tqdm:
        hidden = not self.ranks.logs or self.step == self.steps
        return bar(total=self.steps, initial=self.step, desc="train ", unit="step", disable=hidden)

    def profiler(self):
        steps = self.config.train.profile_steps if self.ranks.logs else 0
        return profiler(steps, self.folder, self.ranks.accelerator.device)


def noise_floor(loss: HeldOutLoss) -> str:
    return "" if loss.noise_floor is None else f" (noise floor {loss.noise_floor:.4f})"
