"""From a task's settings to the code that runs it: the only place that knows all tasks.

Each function imports its own code, so that a task never waits for the imports of another.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cogvx.errors import UserError
from cogvx.libraries import load_libraries
from cogvx.options import tasks
from cogvx.options.cards import may_have_gpu
from cogvx.options.train import FP16_WITHOUT_GPU, Precision

if TYPE_CHECKING:
    from cogvx.config import Config

# What train.deterministic is for.
COMPUTE_ON_DEVICE = (
    tasks.TrainTask,
    tasks.EncodeTask,
    tasks.EvaluateTask,
    tasks.GenerateTask,
)


def require_ready(config: Config) -> None:
    """UserError for what can be known before torch is imported and a folder is made."""
    task, data, model = config.task, config.data, config.model
    if task.needs_data:
        data.require_list()
    if not isinstance(task, tasks.TrainTask | tasks.EncodeTask):
        return
    if data.is_demo() and not model.is_built_in:
        raise UserError(
            f"model={config.choices['model']} needs your clips: data.instance_data_root=/clips. "
            f"The demo's clips are for model=nano. To try the model on them: "
            f"data=world data.clips=32"
        )
    model.require_here()
    if config.train.mixed_precision is Precision.fp16 and not may_have_gpu():
        raise UserError(FP16_WITHOUT_GPU)


def start_task(config: Config, folder: Path) -> dict:
    """Runs config.task in the run's folder and returns the run's summary.

    Of a task that makes no run: its exit_code, if that is not 0.
    """
    start = STARTS_BY_TASK[type(config.task)]
    if not config.train.deterministic or not isinstance(config.task, COMPUTE_ON_DEVICE):
        return start(config, folder)
    from cogvx.training.deterministic import deterministic_kernels

    with deterministic_kernels(compiled=config.train.compile):
        return start(config, folder)


def start_training(config: Config, folder: Path) -> dict:
    load_libraries()
    from cogvx.plan.clock import Expectation, present_card
    from cogvx.training.run import train_model

    is_main = os.environ.get("RANK", "0") == "0"
    with Expectation(folder, present_card() if is_main else None) as expected:
        return train_model(config, folder, expected)


def start_plan(config: Config, folder: Path) -> dict:
    from cogvx.plan.planner import plan

    return plan(config, folder)


def start_encoding(config: Config, folder: Path) -> dict:
    load_libraries()
    from cogvx.training.run import encode_data

    return encode_data(config, folder)


def start_inspecting(config: Config, folder: Path) -> dict:
    from cogvx.plan.inspecting import inspect_clips

    return inspect_clips(config, folder)


def start_captions(config: Config, folder: Path) -> dict:
    from cogvx.inference.captions import write_captions
    from cogvx.progress import quiet_libraries

    quiet_libraries()
    write_captions(config, config.task)
    return {}


def start_nano_vae(config: Config, folder: Path) -> dict:
    load_libraries()
    from cogvx.training.autoencoder import train_vae

    return train_vae(config, config.task, folder)


def start_evaluation(config: Config, folder: Path) -> dict:
    load_libraries()
    from cogvx.evaluation.evaluate import evaluate

    return evaluate(config, config.task, folder)


def start_generating(config: Config, folder: Path) -> dict:
    load_libraries()
    from cogvx.evaluation.gallery import generate_videos

    return generate_videos(config, config.task, folder)


def start_export(config: Config, folder: Path) -> dict:
    from cogvx.progress import quiet_libraries

    quiet_libraries()
    load_libraries()
    from cogvx.export.exporter import export_result

    export_result(config, config.task)
    return {}


def start_import(config: Config, folder: Path) -> dict:
    from cogvx.progress import quiet_libraries

    quiet_libraries()
    load_libraries()
    from cogvx.export.importer import import_weights

    import_weights(config, config.task)
    return {}


def start_report(config: Config, folder: Path) -> dict:
    from cogvx.files import shown
    from cogvx.records import comparison, record, report, sweep

    place = config.task.run
    if (place / sweep.SWEEP).is_file():
        comparison.conclude(sweep.Sweep.read(place))
    elif (place / record.CONFIG).is_file():
        print(f"report  {shown(report.write_page(place))}")
    else:
        raise UserError(
            f"task.run={place} is not the folder of a run (it has no {record.CONFIG}) "
            f"and not the folder of a sweep (it has no {sweep.SWEEP})"
        )
    return {}


def start_comparison(config: Config, folder: Path) -> dict:
    from cogvx.files import shown
    from cogvx.records import comparison, leaderboard, record, sweep
    from cogvx.records.pages import joined

    places = config.task.runs
    for place in places:
        if not (place / record.CONFIG).is_file():
            raise UserError(
                f"task.runs: {place} is not the folder of a run: it has no {record.CONFIG}"
            )
    runs = dict(zip(sweep.told_apart(places), places, strict=True))
    rows = sweep.rows_of(runs, {}, [])
    leaderboard.show(rows, runs)
    leaderboard.show_surroundings(rows, runs)
    page = config.task.page or Path.cwd() / "outputs" / comparison.page_name(list(runs))
    print(f"report  {shown(comparison.write_comparison(page, joined(list(runs)), runs, rows))}")
    return {}


def start_list(config: Config, folder: Path) -> dict:
    from cogvx.records import folders

    folders.list_folders(config.task.folder)
    return {}


def start_clean(config: Config, folder: Path) -> dict:
    from cogvx.records import folders

    folders.clean_folders(config.task.folder, yes=config.task.yes)
    return {}


def start_cache(config: Config, folder: Path) -> dict:
    from cogvx.records import cached

    cached.work_on_cache(config.data.cache_dir, config.task)
    return {}


def start_doctor(config: Config, folder: Path) -> dict:
    from cogvx.training import doctor

    return {"exit_code": doctor.examine(config.task)}


STARTS_BY_TASK: dict[type[tasks.Task], Callable[[Config, Path], dict]] = {
    tasks.TrainTask: start_training,
    tasks.PlanTask: start_plan,
    tasks.EncodeTask: start_encoding,
    tasks.InspectTask: start_inspecting,
    tasks.CaptionTask: start_captions,
    tasks.NanoVaeTask: start_nano_vae,
    tasks.EvaluateTask: start_evaluation,
    tasks.GenerateTask: start_generating,
    tasks.ExportTask: start_export,
    tasks.ImportTask: start_import,
    tasks.ReportTask: start_report,
    tasks.CompareTask: start_comparison,
    tasks.ListTask: start_list,
    tasks.CleanTask: start_clean,
    tasks.CacheTask: start_cache,
    tasks.DoctorTask: start_doctor,
}
