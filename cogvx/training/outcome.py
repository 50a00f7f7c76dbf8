"""What a finished run delivers, prints and puts into summary.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cogvx.config import Config
from cogvx.export import result as export
from cogvx.files import shown
from cogvx.inference import scores
from cogvx.records.usage import INFERENCE_SETTINGS
from cogvx.training import checkpoint as checkpoints
from cogvx.training.heldout import HeldOutLoss
from cogvx.training.prepare import Prepared
from cogvx.training.state import AVERAGED, TrainingState


def deliver_result(folder: Path, state: TrainingState, config: Config, data: Prepared) -> str:
    """Writes the result. Returns the lines of Python that use it."""
    prompt = data.example_prompt
    with state.averaged():
        return export.deliver(
            folder,
            state.transformer,
            state.weights,
            config,
            prompt,
            data.images.get(prompt),
            data.pretrained,
        )


@dataclass(frozen=True)
class RunOutcome:
    step: int
    before: HeldOutLoss | None  # the base model's
    after: HeldOutLoss | None
    videos: list[tuple[Path, str]]  # each with the title of the real clip beside it
    compared: list[scores.Comparison]
    skipped: dict[str, list[int]]  # parts of validation that memory did not suffice for; steps

    def lines(self, folder: Path, state: TrainingState) -> Iterator[str]:
        """What the terminal shows."""
        if self.before and self.after:
            yield f"done    held-out loss {self.before} before, {self.after} after: {self.verdict}"
            for source, loss in self.after.by_source.items():
                before = self.before.by_source[source]
                yield f"source  {source}: held-out loss {before:.4f} before, {loss:.4f} after"
        elif self.before:
            yield f"done    held-out loss {self.before} before; that of the result is not known"
        for what, steps in self.skipped.items():
            yield f"skipped {what} after step {', '.join(map(str, steps))}: memory ended"
        best = checkpoints.best_checkpoint(folder)
        if best is not None:
            manifest = checkpoints.read_manifest(best)
            place = best / AVERAGED if state.delivers_an_average() else best
            if manifest["step"] != self.step:
                loss = f"{manifest['heldout_loss']:.4f} after step {manifest['step']}"
                yield f"best    held-out loss {loss}: {shown(place)}"
        for path, real_clip in self.videos:
            panels = f"base model, tuned, {real_clip}"
            yield f"video   {shown(path)} ({panels}; also as .gif and .png)"
        if self.compared:
            yield f"score   {scores.score_line(self.compared)}"
        yield f"result  {shown(folder / state.weights.result)}"

    @property
    def verdict(self) -> str:
        if round(self.after.mean, 4) < round(self.before.mean, 4):
            return "lower"
        return "NOT lower: more steps or another learning rate may help"

    def summary(self, folder: Path, result: str) -> dict:
        """result: the name of the file or folder that the run delivers."""
        after = self.after
        best = checkpoints.best_checkpoint(folder)
        manifest = {} if best is None else checkpoints.read_manifest(best)
        return {
            "status": "done",
            "step": self.step,
            "objective": after.mean if after else None,
            "heldout_loss_before": self.before.mean if self.before else None,
            "heldout_loss_after": after.mean if after else None,
            "heldout_standard_error": after.standard_error if after else None,
            "heldout_noise_floor": after.noise_floor if after else None,
            "best_heldout_loss": manifest.get("heldout_loss"),
            "best_step": manifest.get("step"),
            **scores.summary_scores(self.compared),
            **({"skipped_validation": self.skipped} if self.skipped else {}),
            "result_files": result_files(folder, result),
        }


def result_files(folder: Path, result: str) -> dict[str, dict]:
    """Size and SHA-256 of each file of the result, so that damage can be found later."""
    place = folder / result
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    return {
        path.relative_to(folder).as_posix(): checkpoints.facts_of_file(path)
        for path in [*files, folder / INFERENCE_SETTINGS]
        if path.is_file()
    }
