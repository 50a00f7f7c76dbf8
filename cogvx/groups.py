"""The groups of conf/ and the class of each option; the sections that conf/config.yaml holds.

To add an option: its YAML in conf/GROUP/, its class, and one line here.   [no torch]
"""

from cogvx.data import folder, load_dataset, mix, tables, tars, text_files
from cogvx.model import pretrained
from cogvx.model.lora import Lora
from cogvx.options import optimizers, parallel, schedules, tasks, tracking
from cogvx.options.memory import Memory
from cogvx.options.train import Train
from cogvx.options.validation import Validation

GROUPS: dict[str, dict[str, type]] = {
    "task": {
        "train": tasks.TrainTask,
        "inspect": tasks.InspectTask,
        "encode": tasks.EncodeTask,
        "caption": tasks.CaptionTask,
        "plan": tasks.PlanTask,
        "nano_vae": tasks.NanoVaeTask,
        "evaluate": tasks.EvaluateTask,
        "generate": tasks.GenerateTask,
        "export": tasks.ExportTask,
        "import": tasks.ImportTask,
        "report": tasks.ReportTask,
        "compare": tasks.CompareTask,
        "list": tasks.ListTask,
        "clean": tasks.CleanTask,
        "cache": tasks.CacheTask,
        "doctor": tasks.DoctorTask,
    },
    "model": {
        "nano": pretrained.Nano,
        "nano_i2v": pretrained.NanoI2v,
        "2b": pretrained.Model,
        "5b": pretrained.Model,
        "5b_i2v": pretrained.Model,
        "1_5_5b": pretrained.Model,
        "1_5_5b_i2v": pretrained.Model,
    },
    "data": {
        "demo": text_files.Demo,
        "world": text_files.World,
        "text_files": text_files.TextFiles,
        "csv": tables.TableOfClips,
        "table": tables.TableOfClips,
        "folder": folder.Folder,
        "dataset": load_dataset.Dataset,
        "webdataset": tars.WebDataset,
        "mix": mix.Mix,
    },
    "optimizer": {
        "adam": optimizers.Adam,
        "adamw": optimizers.AdamW,
        "adam8bit": optimizers.Adam8bit,
        "adamw8bit": optimizers.AdamW8bit,
        "adamw8bit_torchao": optimizers.AdamW8bitTorchao,
        "prodigy": optimizers.Prodigy,
        "schedule_free": optimizers.ScheduleFree,
        "muon": optimizers.Muon,
    },
    "scheduler": {
        "constant": schedules.Constant,
        "constant_with_warmup": schedules.ConstantWithWarmup,
        "linear": schedules.Linear,
        "cosine": schedules.Cosine,
        "cosine_with_restarts": schedules.CosineWithRestarts,
        "polynomial": schedules.Polynomial,
    },
    "memory": dict.fromkeys(("fast", "balanced", "low", "minimal", "low_full"), Memory),
    "parallel": {"single": parallel.Single, "ddp": parallel.DistributedDataParallel},
    "tracking": {
        "none": tracking.Tracking,
        "tensorboard": tracking.TensorBoard,
        "trackio": tracking.Trackio,
        "wandb": tracking.Wandb,
    },
}
SECTIONS: dict[str, type] = {"lora": Lora, "train": Train, "validation": Validation}
