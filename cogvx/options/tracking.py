"""Trackers: one YAML in conf/tracking/ and one class here for each.

They copy what is in metrics.jsonl, which is always written.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from cogvx.errors import UserError, first_line, lacking

# wandb's own exit code after Ctrl-C is 255. Every other status has 1.
EXIT_CODES = {"done": 0, "interrupted": 255}
# Seconds in which wandb's server must answer at the start, and take the rest at the end.
PATIENCE = 30


@dataclass
class Tracking:
    """No tracker."""

    def require_login(self) -> None:
        """UserError if start() would need a login. It is called before any clip is encoded."""

    def start(self, folder: Path, config: dict[str, object], step: int, group: str | None) -> None:
        """Called once, before the first log().

        config: {"lora.rank": 64}. step: the step that a resumed run goes on from, else 0. group:
        the name of the sweep if the run is one of its jobs, else None.
        """

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers of one step."""

    def videos(self, paths: list[Path], step: int) -> None:
        """Validation videos: mp4 files, each with a gif of the same name."""

    def finish(self, status: str) -> None:
        """Called once, also after an error. status: as in summary.json."""


@dataclass
class TensorBoard(Tracking):
    def problems(self) -> list[str]:
        return lacking("tensorboard", "tracking=tensorboard")

    def start(self, folder: Path, config: dict[str, object], step: int, group: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # purge_step hides what was written after the step that the run goes on from.
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)
        self.writer.add_text("config", "```\n" + json.dumps(config, indent=2) + "\n```")
        given = {
            name: str(value) if isinstance(value, list) else value for name, value in config.items()
        }
        _, started, _ = hparams(given, {})
        self.writer.file_writer.add_summary(started)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def videos(self, paths: list[Path], step: int) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        # TensorBoard plays a gif among its images. add_video() would need moviepy.
        for path in paths:
            gif = path.with_suffix(".gif")
            with Image.open(gif) as picture:
                width, height = picture.size
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=gif.read_bytes()
            )
            summary = Summary(value=[Summary.Value(tag=f"validation/{path.stem}", image=image)])
            self.writer.file_writer.add_summary(summary, step)

    def finish(self, status: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        ended = api_pb2.STATUS_SUCCESS if status == "done" else api_pb2.STATUS_FAILURE
        data = plugin_data_pb2.HParamsPluginData(
            session_end_info=plugin_data_pb2.SessionEndInfo(status=ended),
            version=metadata.PLUGIN_DATA_VERSION,
        )
        plugin = SummaryMetadata.PluginData(
            plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString()
        )
        value = Summary.Value(
            tag=metadata.SESSION_END_INFO_TAG, metadata=SummaryMetadata(plugin_data=plugin)
        )
        self.writer.file_writer.add_summary(Summary(value=[value]))
        self.writer.close()


@dataclass
class Wandb(Tracking):
    project: str
    mode: str
    entity: str | None
    group: str | None
    tags: list[str]

    def problems(self) -> list[str]:
        found = lacking("wandb", "tracking=wandb")
        if self.mode not in ("online", "offline"):
            found.append(f"tracking.mode={self.mode}: must be online or offline")
        return found

    def asked_mode(self) -> str:
        """wandb's own variable WANDB_MODE comes before the setting: online, offline, disabled."""
        return os.environ.get("WANDB_MODE") or self.mode

    def require_login(self) -> None:
        if self.asked_mode() != "online":
            return
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        if not wandb.login(prompt=False, verify=False):
            raise UserError(
                "tracking=wandb and nobody is logged in: log in with  wandb login  (or set "
                "WANDB_API_KEY), or use tracking.mode=offline"
            )

    def start(self, folder: Path, config: dict[str, object], step: int, group: str | None) -> None:
        """The jobs of a sweep are one group in wandb. A resumed run is the same run there."""
        import wandb

        settings = wandb.Settings(
            silent=True, init_timeout=PATIENCE, finish_timeout=PATIENCE, finish_timeout_raises=True
        )
        run = {
            "project": self.project,
            "entity": self.entity,
            "group": self.group or group,
            "tags": self.tags,
            "name": folder.name,
            "id": id_of(folder),
            "resume": "allow",
            "dir": folder,
            "config": config,
            "settings": settings,
        }
        try:
            self.run = wandb.init(**run, mode=self.asked_mode())
        except Exception as error:
            if self.asked_mode() != "online":
                raise
            print(
                f"warning wandb does not answer, so this run is offline: {first_line(error)}",
                flush=True,
            )
            # Without it wandb refuses to use the id a second time.
            wandb.teardown()
            self.run = wandb.init(**run | {"id": id_of(folder)}, mode="offline")
        if self.run.disabled:
            print("wandb   disabled, as WANDB_MODE says", flush=True)
        elif self.run.offline:
            print(f"wandb   offline; to send it later:  {self.sync()}", flush=True)
        else:
            print(f"wandb   {self.run.url}", flush=True)

    def sync(self) -> str:
        from cogvx.files import shown

        return f"wandb sync {shown(Path(self.run.settings.sync_dir))}"

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def videos(self, paths: list[Path], step: int) -> None:
        import wandb

        files = {f"validation/{path.stem}": wandb.Video(str(path), format="mp4") for path in paths}
        self.run.log(files, step=step)

    def finish(self, status: str) -> None:
        import wandb

        try:
            self.run.finish(exit_code=EXIT_CODES.get(status, 1))
        except TimeoutError as error:
            raise TimeoutError(
                f"wandb did not take everything in {PATIENCE} s; to send the rest:  {self.sync()}"
            ) from error
        finally:
            # It returns when everything is on the disk.
            wandb.teardown()


@dataclass
class Trackio(Tracking):
    """trackio 0.43, from its source: on this machine or in a Space of the hub."""

    project: str
    group: str | None
    space_id: str | None

    def problems(self) -> list[str]:
        return lacking("trackio", "tracking=trackio")

    def start(self, folder: Path, config: dict[str, object], step: int, group: str | None) -> None:
        """A resumed run is the same run there: trackio goes on with the newest run of its name."""
        import trackio

        # The jobs of two sweeps may have the same names.
        name = folder.name if group is None else f"{group}_{folder.name}"
        self.run = trackio.init(
            self.project,
            name=name,
            group=self.group or group,
            space_id=self.space_id,
            config=config,
            resume="allow" if step else "never",
            embed=False,
            # Its own thread would ask the GPU every ten seconds.
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def videos(self, paths: list[Path], step: int) -> None:
        import trackio

        files = {f"validation/{path.stem}": trackio.Video(str(path)) for path in paths}
        self.run.log(files, step=step)

    def finish(self, status: str) -> None:
        """trackio has no place for the status of a run that is not done. Waits for its thread."""
        self.run.finish()


def id_of(folder: Path) -> str | None:
    """wandb's id of the run that an earlier start made; None at the first start.

    It is the end of the folder's name: wandb/run-DATE_TIME-ID or wandb/offline-run-DATE_TIME-ID.
    """
    earlier = sorted(folder.glob("wandb/*run-*-*"), key=lambda path: path.name.partition("run-")[2])
    return earlier[-1].name.partition("run-")[2].partition("-")[2] if earlier else None
