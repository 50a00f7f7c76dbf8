"""The model card: README.md of a result on the hub, written from the run's record.   [no torch]"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from cogvx.config import Config
from cogvx.data.sources import Data
from cogvx.files import is_hub_id, read_json, read_json_lines
from cogvx.hub_client import split_revision
from cogvx.options.tasks import Format
from cogvx.progress import counted
from cogvx.records import record
from cogvx.records.usage import INFERENCE_SETTINGS

CURVE = "heldout_loss.png"
SAMPLES = "videos"
EVALUATION = "evaluation.json"
# What stands in the place of a path that is nobody's business.
YOUR = "your_"
# As on the model's pages: only the smallest model has a licence that is known by name.
APACHE = re.compile(r"CogVideoX-2b", re.IGNORECASE)
COGVIDEOX = re.compile(r"CogVideoX(1\.5)?-5b(-I2V)?", re.IGNORECASE)


@dataclass(frozen=True)
class SampleVideo:
    """A validation video, with the one of the base model for the same prompt and seed."""

    name: str  # "01_seed42"
    prompt: str
    tuned: Path
    base: Path | None

    @property
    def seed(self) -> int:
        return int(self.name.rpartition("seed")[2])


@dataclass(frozen=True)
class Published:
    """A result that goes to the hub, with what its card says."""

    run: Path
    config: Config
    repo_id: str
    format: Format
    weights: list[str]  # the names of its files there
    about: dict  # export.json: strength, rank
    summary: dict

    @property
    def inference(self) -> dict:
        return read_json(self.run / INFERENCE_SETTINGS)

    @property
    def is_lora(self) -> bool:
        return not any(name.startswith("transformer/") for name in self.weights)

    @property
    def differs(self) -> bool:
        """Whether it is another one than the run delivered: stronger, combined, or a checkpoint."""
        about = self.about
        changed = about.get("strength", 1) != 1 or about.get("added") or about.get("checkpoint")
        return bool(changed)

    @property
    def base_model(self) -> str | None:
        """Its hub id; None for a local folder, whose name is private."""
        path = self.config.model.path
        return path if is_hub_id(path) else None

    def samples(self) -> list[SampleVideo]:
        """The newest validation videos."""
        place = self.run / "validation"
        prompts, found = read_json(place / "prompts.json"), []
        steps = sorted(place.glob("step_*"))
        for name, prompt in prompts.items():
            tuned = steps[-1] / f"{name}.mp4" if steps else place / "none"
            base = place / "base" / f"{name}.mp4"
            if tuned.is_file():
                found.append(SampleVideo(name, prompt, tuned, base if base.is_file() else None))
        return found

    def heldout(self) -> list[dict]:
        rows = read_json_lines(self.run / "metrics.jsonl")
        return [row for row in rows if row.get("heldout_loss") is not None]

    def comparisons(self) -> list[dict]:
        """The scores of the result beside those of the base model, with their intervals."""
        compared = [read_json(path).get("comparisons", {}) for path in evaluations_of(self.run)]
        return next((found["result"] for found in compared if "result" in found), [])


def evaluations_of(run: Path) -> list[Path]:
    """Every evaluation.json of the run: of task=evaluate beside it, the newest first, and its own.

    The first one with the scores of the result counts.
    """
    own, beside = run / EVALUATION, []
    for path in run.parent.glob(f"*/{EVALUATION}"):
        judged = read_yaml(path.with_name(record.CONFIG)).get("task", {}).get("run")
        if judged is not None and Path(judged) == run.absolute():
            beside.append(path)
    return [*sorted(beside, key=lambda path: path.stat().st_mtime, reverse=True), own]


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def model_card(published: Published) -> str:
    """Front matter and text. The hub's client must have read it once without complaint."""
    from huggingface_hub import ModelCard

    parts = [
        "---\n" + metadata(published).to_yaml() + "\n---\n",
        f"# {published.repo_id.rpartition('/')[2]}",
        introduction(published),
        "<Gallery />" if published.samples() else None,
        use_of(published),
        videos_of(published),
        quality_of(published),
        training_of(published),
        repeating(published),
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n").content


# -- front matter --------------------------------------------------------------------------------


def metadata(published: Published):
    from huggingface_hub import ModelCardData

    config, base = published.config, published.base_model
    adaptation = "adapter" if published.is_lora else "finetune"
    known = {} if base is None else {"base_model": base, "base_model_relation": adaptation}
    samples = [
        {"text": sample.prompt, "output": {"url": f"{SAMPLES}/{sample.name}.mp4"}}
        for sample in published.samples()
    ]
    token = next(iter(config.data.id_tokens()), None)
    task = "image-to-video" if config.model.image_to_video else "text-to-video"
    return ModelCardData(
        **licence_of(base or ""),
        library_name="diffusers",
        pipeline_tag=task,
        tags=["cogvideox", "cogvx", "lora" if published.is_lora else "full-fine-tuning"],
        **known,
        **({"instance_prompt": token} if token else {}),
        **({"widget": samples} if samples else {}),
        model_name=published.repo_id.rpartition("/")[2],
        eval_results=eval_results(published, task) or None,
    )


def licence_of(base: str) -> dict[str, str]:
    """That of the base model, which a result shares; {} for a model that is not known here."""
    name = base.rpartition("/")[2]
    if APACHE.fullmatch(name):
        return {"license": "apache-2.0"}
    if COGVIDEOX.fullmatch(name):
        return {
            "license": "other",
            "license_name": "cogvideox-license",
            "license_link": f"{hub_page(base)}/blob/main/LICENSE",
        }
    return {}


def hub_page(repo_id: str) -> str:
    from huggingface_hub import constants

    return constants.HUGGINGFACE_CO_URL_HOME + repo_id


def eval_results(published: Published, task: str) -> list:
    from huggingface_hub import EvalResult

    found = []
    data = {"dataset_type": "private", "dataset_name": "held-out clips"}
    after = published.summary.get("heldout_loss_after")
    if after is not None:
        more = {"metric_type": "loss", "metric_name": "held-out loss"}
        found.append(EvalResult(task_type=task, **data, **more, metric_value=round(after, 5)))
    prompts = {"dataset_type": "private", "dataset_name": "evaluation prompts"}
    for each in published.comparisons():
        more = {"metric_type": each["measure"], "metric_name": score_name(each)}
        value = round(each["tuned"], 4)
        found.append(EvalResult(task_type=task, **prompts, **more, metric_value=value))
    return found


def score_name(comparison: dict) -> str:
    return f"{comparison['measure']}, {comparison['kind']} prompts"


# -- text ----------------------------------------------------------------------------------------


def cell(text: object) -> str:
    """Text in a table of Markdown."""
    text = " ".join(str(text).split())
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", text)


def table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *[[cell(value) for value in row] for row in rows]]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def base_in_words(published: Published) -> str:
    base, config = published.base_model, published.config
    if base is None:
        if config.model.is_built_in:
            return "the built-in nano model of cogvx, which is not on the hub"
        return f"a local CogVideoX checkpoint (cogvx: model={config.choices['model']})"
    revision = published.inference.get("revision")
    return f"[{base}]({hub_page(base)})" + (f" (commit {revision[:8]})" if revision else "")


def introduction(published: Published) -> str:
    kind = "A LoRA" if published.is_lora else "All weights of the transformer, fine-tuned,"
    if published.format is Format.merged:
        kind = "A whole pipeline, fine-tuned,"
    rank = published.about.get("rank") or published.inference.get("rank")
    of_rank = f" of rank {rank}" if published.is_lora and rank else ""
    lines = [f"{kind}{of_rank} for {base_in_words(published)}, trained with cogvx."]
    token = next(iter(published.config.data.id_tokens()), None)
    if token:
        lines.append(f"Put the word **{cell(token)}** into the prompt.")
    if published.differs:
        lines.append("The videos and numbers below are of the run's own result at its end.")
    if not licence_of(published.base_model or ""):
        lines.append("The licence of the base model holds for this result too.")
    return "\n".join(lines)


def use_of(published: Published) -> str | None:
    heading = "## Use it\n\n"
    if published.format in (Format.comfyui, Format.comfyui_wrapper):
        [file] = [name for name in published.weights if name.endswith(".safetensors")]
        node = "Load LoRA" if published.format is Format.comfyui else "CogVideo LoRA Select"
        return f"{heading}For ComfyUI: `{file}`, node {node}, strength 1.0."
    if not published.inference:
        return None
    return f"{heading}```python\n{hub_snippet(published)}\n```"


def hub_snippet(published: Published) -> str:
    """Lines of Python that make the first sample video in plain diffusers."""
    settings, samples = published.inference, published.samples()
    pipeline, model = settings["pipeline"], "CogVideoXTransformer3DModel"
    scheduler, has_image = settings.get("scheduler"), bool(settings["image"])
    whole, repo = published.format is Format.merged, repr(published.repo_id)
    dtype = f"torch_dtype=torch.{settings['torch_dtype']}"
    revision = settings["revision"]
    base = repr(published.base_model or f"{YOUR}base_model")
    base += "" if revision is None else f", revision={revision!r}"
    used = [pipeline, *([] if published.is_lora or whole else [model])]
    used += [] if scheduler is None else [scheduler]
    lines = ["import torch", f"from diffusers import {', '.join(sorted(used))}"]
    lines.append(f"from diffusers.utils import export_to_video{', load_image' * has_image}")
    if has_image:
        lines.append("from huggingface_hub import hf_hub_download")
    lines += ["", 'device = "cuda" if torch.cuda.is_available() else "cpu"']
    if whole:
        lines.append(f"pipe = {pipeline}.from_pretrained({repo}, {dtype})")
    elif published.is_lora:
        lines += [f"pipe = {pipeline}.from_pretrained(", f"    {base},", f"    {dtype},", ")"]
        lines.append(f"pipe.load_lora_weights({repo})")
    else:
        lines.append(f"tuned = {model}.from_pretrained({repo}, subfolder='transformer', {dtype})")
        lines += [f"pipe = {pipeline}.from_pretrained(", f"    {base},", "    transformer=tuned,"]
        lines += [f"    {dtype},", ")"]
    if scheduler is not None:
        lines.append(f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config)")
    lines += ["pipe.to(device)", "video = pipe("]
    if has_image:
        lines.append(f"    image=load_image(hf_hub_download({repo}, 'first_frame.png')),")
    call, seed = settings["call"], samples[0].seed if samples else 0
    call = call | ({"prompt": samples[0].prompt} if samples and not has_image else {})
    lines += [f"    {name}={value!r}," for name, value in call.items()]
    lines.append(f"    generator=torch.Generator().manual_seed({seed}),")
    fps = settings["fps"] or published.config.model.fps
    lines += [").frames[0]", f"export_to_video(video, 'video.mp4', fps={fps:g})"]
    return "\n".join(lines)


def videos_of(published: Published) -> str | None:
    samples = published.samples()
    if not samples:
        return None
    head = ["Prompt", "Seed", "This model", "Base model"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- |"]
    for sample in samples:
        tuned, base = f"{SAMPLES}/{sample.name}.mp4", f"{SAMPLES}/{sample.name}_base.mp4"
        links = [f"[video]({tuned})", f"[video]({base})" if sample.base else ""]
        lines.append(f"| {cell(sample.prompt)} | {sample.seed} | {' | '.join(links)} |")
    return "## Sample videos\n\n" + "\n".join(lines)


def quality_of(published: Published) -> str | None:
    summary, parts = published.summary, []
    before, after = (summary.get(f"heldout_loss_{when}") for when in ("before", "after"))
    if before is not None and after is not None:
        error = summary.get("heldout_standard_error")
        within = f" ± {error:.4f}" if error is not None else ""
        parts.append(
            f"Loss on clips that were held out from training: {before:.4f} with the base model, "
            f"{after:.4f}{within} with this one."
        )
        if len(published.heldout()) > 1:
            parts.append(f"![held-out loss]({CURVE})")
    compared = published.comparisons()
    if compared:
        rows = [
            [
                score_name(each),
                f"{each['base']:.3f}",
                f"{each['tuned']:.3f}",
                f"{each['difference']:+.3f} ({each['low']:+.3f} to {each['high']:+.3f})",
                each["videos"],
            ]
            for each in compared
        ]
        head = ["Score", "Base model", "This model", "Difference (95 % interval)", "Videos"]
        parts.append(table(head, rows))
    return "## How good is it\n\n" + "\n\n".join(parts) if parts else None


def training_of(published: Published) -> str:
    rows = [[name, value] for name, value in training_rows(published) if value not in (None, "")]
    return "## Training\n\n" + table(["Setting", "Value"], rows)


def sizes_in_words(data: Data) -> str:
    given = f"{data.max_num_frames} frames of {data.width}x{data.height}"
    if data.buckets is None:
        return given
    if isinstance(data.buckets, list):
        return f"{', '.join(data.buckets)} (frames x height x width)"
    return f"{given}, and other shapes and lengths of at most as many tokens"


def training_rows(published: Published):
    config, facts = published.config, read_json(published.run / record.ENVIRONMENT)
    train, data, packages = config.train, config.data, facts.get("packages", {})
    yield "Data", data_in_words(published)
    yield "Size", sizes_in_words(data)
    yield "Frame rate", f"{data.fps or config.model.fps:g}"
    if published.is_lora and "rank" in published.inference:
        settings = published.inference
        yield "LoRA", f"rank {settings['rank']}, alpha {settings['lora_alpha']:g}"
        yield "Layers", targets_in_words(config)
        yield "Started from", start_in_words(config)
    yield "Steps", published.summary.get("step")
    yield "Batch", train.train_batch_size * train.gradient_accumulation_steps
    yield "Processes", facts.get("processes")
    yield "Optimizer", config.choices["optimizer"]
    yield "Learning rate", f"{config.optimizer.learning_rate:g}, {config.choices['scheduler']}"
    yield "Precision", train.mixed_precision.name.replace("no", "fp32")
    yield "Seed", config.seed
    yield "Machine", facts.get("device")
    seconds = published.summary.get("seconds")
    yield "Time", None if seconds is None else f"{seconds / 60:.1f} min"
    used = [name for name in ("torch", "diffusers", "peft") if name in packages]
    yield "Packages", ", ".join(f"{name} {packages[name]}" for name in used)


def hub_place(place: str) -> str:
    """name/repo@commit in words."""
    repo, revision = split_revision(place)
    return f"{repo} on the hub" + (f" (commit {revision[:8]})" if revision else "")


def start_in_words(config: Config) -> str | None:
    """The LoRA of the hub that training started from. One of this machine is nobody's business."""
    start = getattr(config.lora, "init_from", None)
    return hub_place(start) if start and is_hub_id(start) else None


def targets_in_words(config: Config) -> str | None:
    targets = getattr(config.lora, "target_modules", None)
    return ", ".join(targets) if isinstance(targets, list) else targets


def data_in_words(published: Published) -> str:
    """How many clips; not which."""
    path = published.run / "dataset_report.csv"
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", newline="") as file:
        uses = [row["use"] for row in csv.DictReader(file)]
    trained, out = uses.count("train"), uses.count("held out")
    name = getattr(published.config.data, "dataset_name", None)
    of = f"{hub_place(name)}: " if name and is_hub_id(name) else ""
    return f"{of}{counted(trained, 'clip')} to train on, {out} held out"


def repeating(published: Published) -> str:
    data = published.config.data
    root = " data.instance_data_root=/clips" if data.instance_data_root is not None else ""
    return (
        f"## Train it again\n\n```bash\nhf download {published.repo_id} --local-dir recipe\n"
        f"python launch.py --config-dir recipe --config-name config{root}\n```"
    )


# -- what may be shown ---------------------------------------------------------------------------


def shareable_config(config: Config, text: str) -> str:
    """config.yaml without paths of this machine, and without where the result was uploaded.

    text: the record. What was made in the cache has the cache's usual name.
    """
    recorded = yaml.safe_load(text)
    recorded["train"]["resume"] = recorded["train"]["hub_repo_id"] = None
    cache = str(config.data.cache_dir)
    recorded = without_paths(recorded, cache)
    recorded["data"]["cache_dir"] = "outputs/cache"
    recorded["output_dir"] = None
    head = "# Every value of the run, without its paths.\n"
    return head + yaml.safe_dump(recorded, sort_keys=False, allow_unicode=True, width=1000)


def without_paths(value: object, cache: str, name: str = "path") -> object:
    """A path of this machine becomes your_NAME, by the setting's name."""
    if isinstance(value, dict):
        return {key: without_paths(inner, cache, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner, cache, name) for inner in value]
    if isinstance(value, str) and value.startswith(f"{cache}/"):
        return "outputs/cache" + value.removeprefix(cache)
    if isinstance(value, str) and value.startswith(("/", "~")):
        return YOUR + name.lstrip("_")
    return value


def shareable_json(path: Path, config: Config) -> bytes:
    """A JSON file of a result, without paths of this machine."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values = without_paths(values, str(config.data.cache_dir))
    # A hash that tells two exports of this machine apart.
    values.pop("asked", None)
    if path.name == INFERENCE_SETTINGS and values.get("image"):
        values["image"] = "first_frame.png"
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def curve_picture(published: Published) -> bytes | None:
    """The held-out loss over the steps, as a PNG; None if there is nothing to draw."""
    rows = published.heldout()
    try:
        import matplotlib
    except ImportError:
        return None
    if len(rows) < 2:
        return None
    import io

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    steps, losses = ([row[name] for row in rows] for name in ("step", "heldout_loss"))
    axes.axhline(losses[0], color="#8590a2", linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(steps, losses, color="#d9662b", marker="o", markersize=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss")
    axes.set_title("held-out loss (dashed: base model)", fontsize=10.5, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return written.getvalue()
