"""A result on the hub: its weights, how to use them, and the model card. Nothing else is sent."""

from __future__ import annotations

from pathlib import Path

from cogvx.config import Config
from cogvx.errors import first_line
from cogvx.export.card import (
    CURVE,
    SAMPLES,
    Published,
    curve_picture,
    model_card,
    shareable_config,
    shareable_json,
)
from cogvx.export.result import AVERAGED, IMAGE
from cogvx.files import shown
from cogvx.hub_upload import Upload
from cogvx.model.trained_weights import weights_of
from cogvx.options.tasks import Format
from cogvx.records import record
from cogvx.records.usage import INFERENCE_SETTINGS


def upload_of_run(config: Config) -> Upload | None:
    train = config.train
    if train.hub_repo_id is None:
        return None
    return Upload(train.hub_repo_id, train.hub_private, train.hub_checkpoints, "train.hub_repo_id")


def publish_run(config: Config, run: Path, upload: Upload, summary: dict) -> dict:
    """Uploads the result of a run that has just ended. Returns what summary.json says of it.

    The result is on disk, so a failed upload is no failed run: one line says how to try again.
    """
    weights = run / weights_of(config.lora).result
    paths = [weights] if weights.is_file() else sorted(weights.rglob("*"))
    try:
        commit = publish(config, run, upload, relative(paths, run), Format.diffusers, {}, summary)
        return {"repo_id": upload.repo_id, "commit": commit}
    # Whatever it is, days of training must not count as failed because of it.
    except (Exception, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        reason = "stopped by Ctrl-C" if stopped else first_line(error)
        again = f"python launch.py task=export task.run={shown(run)} "
        again += f"task.hub_repo_id={upload.repo_id}"
        again += "" if upload.private else " task.hub_private=false"
        again += " task.hub_checkpoints=true" if upload.checkpoints else ""
        print(f"warning the upload failed, the result is safe here: {reason}. Again:  {again}")
        return {"repo_id": upload.repo_id, "error": reason, "again": again}


def publish(
    config: Config,
    run: Path,
    upload: Upload,
    weights: dict[str, Path],
    weight_format: Format,
    about: dict,
    summary: dict,
) -> str:
    """Uploads the weights, with a card, in one commit; returns the commit.

    weights: files by their names there. about: what export.json says. UserError if it fails.
    """
    published = Published(run, config, upload.repo_id, weight_format, [*weights], about, summary)
    files = {
        name: shareable_json(path, config) if path.suffix == ".json" else path
        for name, path in weights.items()
    }
    files |= explaining_files(published)
    if upload.checkpoints:
        files |= checkpoint_files(config, run)
    commit = upload.send(files, f"{weight_format.name} weights and model card")
    print(f"hub     {upload.repo_id}, commit {commit[:8]}", flush=True)
    return commit


def relative(paths: list[Path], folder: Path) -> dict[str, Path]:
    """Files by their names in the folder. Hidden ones are of this machine alone."""
    shown = [path for path in paths if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path for path in shown}


def explaining_files(published: Published) -> dict[str, Path | bytes]:
    """All but the weights."""
    run, config = published.run, published.config
    text = (run / record.CONFIG).read_text(encoding="utf-8")
    files: dict[str, Path | bytes] = {
        "README.md": model_card(published).encode(),
        record.CONFIG: shareable_config(config, text).encode(),
    }
    if (run / INFERENCE_SETTINGS).is_file():
        files[INFERENCE_SETTINGS] = shareable_json(run / INFERENCE_SETTINGS, config)
    if (run / IMAGE).is_file():
        files[IMAGE] = run / IMAGE
    curve = curve_picture(published)
    if curve is not None:
        files[CURVE] = curve
    for sample in published.samples():
        files[f"{SAMPLES}/{sample.name}.mp4"] = sample.tuned
        if sample.base is not None:
            files[f"{SAMPLES}/{sample.name}_base.mp4"] = sample.base
    return files


def checkpoint_files(config: Config, run: Path) -> dict[str, Path | bytes]:
    """The weights of every checkpoint, without what only training needs."""
    result, found = weights_of(config.lora).result, {}
    for folder in sorted((run / "checkpoints").glob("step_*")):
        place = folder / AVERAGED if (folder / AVERAGED / result).exists() else folder
        paths = [place / result] if (place / result).is_file() else [*(place / result).rglob("*")]
        for name, path in relative(sorted(paths), place).items():
            is_json = path.suffix == ".json"
            found[f"{folder.name}/{name}"] = shareable_json(path, config) if is_json else path
    return found
