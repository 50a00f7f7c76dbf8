"""task=train and task=encode, from the configuration to the run's summary."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cogvx.config import Config
from cogvx.data.split import run_around
from cogvx.export.publish import publish_run, upload_of_run
from cogvx.files import read_json
from cogvx.inference import scores
from cogvx.model import attention
from cogvx.model.trained_weights import weights_of
from cogvx.records import record
from cogvx.records.present import telling
from cogvx.training import checkpoint as checkpoints
from cogvx.training.kernel import chosen_attention
from cogvx.training.prepare import prepare
from cogvx.training.ranks import Ranks, start_processes
from cogvx.training.setup import build_trainer
from cogvx.training.trainer import Trainer


def encode_data(config: Config, folder: Path) -> dict:
    """task=encode: fills the cache and reports on every clip. Returns the run's summary."""
    started, ranks = time.monotonic(), start_processes(config)
    with telling(folder, ranks.about):
        data = prepare(config, folder, ranks, went_before=starts_from(config))
    for line in ranks.peaks.lines():
        ranks.say(line)
    return {
        "status": "done",
        "clips": len(data.train) + len(data.held_out),
        "seconds": round(time.monotonic() - started, 1),
        **ranks.peaks.summary(),
    }


def train_model(
    config: Config, folder: Path, expected: Callable[[], float | None] = lambda: None
) -> dict:
    """task=train. Returns the run's summary.

    expected() is the planned seconds per step, or None while they are not known.
    """
    started, ranks = time.monotonic(), start_processes(config)
    with telling(folder, ranks.about):
        summary = prepare_and_train(config, folder, ranks, expected)
    summary |= {"seconds": round(time.monotonic() - started, 1), **ranks.peaks.summary()}
    upload = upload_of_run(config)
    if upload is not None and ranks.logs and summary["status"] == "done":
        # The run is done, whatever becomes of the upload.
        record.finish(folder, summary)
        summary["hub"] = publish_run(config, folder, upload, summary)
    return summary


def prepare_and_train(
    config: Config, folder: Path, ranks: Ranks, expected: Callable[[], float | None]
) -> dict:
    # A resumed run has its own weights to start from.
    # The first process looks for all: what is damaged is set aside, and said once.
    source = ranks.done_by_first(
        lambda: checkpoints.resume_source(config.train.resume, folder, ranks.say)
    )
    start = starts_from(config) if source is None else [source.parent.parent]
    config.tracking.require_login()
    upload = upload_of_run(config)
    if upload is not None and ranks.logs:
        upload.require_writer()
    attention.require(config.train.attention, ranks.accelerator.device)
    prompts = scores.scored_prompts_of(config, config.validation.scored_prompts)
    scored = scores.video_requests(prompts, seed=0)
    more_prompts = [request.prompt for request in scored]
    data = prepare(config, folder, ranks, more_prompts, went_before=[folder, *start], trains=True)
    earlier = earlier_runs(folder, source)
    with chosen_attention(config, data.pretrained, folder, ranks, earlier):
        with ranks.peaks.phase("load"):
            trainer = build_trainer(
                config, folder, ranks, data, scored=scored, source=source, expected=expected
            )
        return run_and_tell_tracker(trainer)


def starts_from(config: Config) -> list[Path]:
    """The folder of the run whose LoRA this one starts from. UserError if there is no such LoRA."""
    place = weights_of(config.lora).require_start()
    run = None if place is None else run_around(place)
    return [] if run is None else [run]


def earlier_runs(folder: Path, source: Path | None) -> list[Path]:
    """The runs that this one goes on with or repeats. source: the checkpoint to resume from."""
    found = [] if source is None else [source.parent.parent]
    repeated = read_json(folder / record.ENVIRONMENT).get("rerun_of")
    return found if repeated is None else [*found, Path(repeated)]


def run_and_tell_tracker(trainer: Trainer) -> dict:
    """The tracker learns how the run ended, also after an error."""
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
    return summary
