"""The table of docs/models.md: each family, LoRA and full, from clips to plain diffusers."""

import json
from pathlib import Path

import imageio.v3
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from families import FAMILIES, differences_from_the_pipeline, pipeline_class, tiny

from cogvx.export import result as export
from cogvx.model import full, lora
from cogvx.model.cogvideox import CogVideoX

PROJECT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
KINDS = {"LoRA": [], "full": ["lora=null", "optimizer.learning_rate=3e-4"]}


TRAINS = {"LoRA": "LoRA trains", "full": "full fine-tuning trains"}
COLUMNS = [
    "inputs equal the pipeline's",
    *TRAINS.values(),
    "result loads in diffusers",
    "resuming is bit-equal",
]
# By family and column: the kinds of training for which the tests below found it to hold.
held: dict[tuple[str, str], set[str]] = {}


def note(family: str, column: str, kind: str) -> None:
    assert column in COLUMNS
    held.setdefault((family, column), set()).add(kind)


@pytest.fixture
def delivered(monkeypatch):
    """The output of each run's model when its result was written."""
    answers, deliver = [], export.deliver

    def deliver_and_answer(folder, transformer, *others):
        answers.append(answer(transformer, others[-1].geometry(), others[-1].noise_scheduler()))
        return deliver(folder, transformer, *others)

    monkeypatch.setattr(export, "deliver", deliver_and_answer)
    return answers


def answer(transformer, geometry, noise_scheduler) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((1, 4, geometry.in_channels, 12, 16), generator=generator)
    noisy, condition = latents[:, :, :16], latents[:, :, 16:] if geometry.image_to_video else None
    embeds = torch.randn((1, geometry.text_tokens, 64), generator=generator)
    model = CogVideoX(transformer, noise_scheduler, geometry, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        return model.predict_velocity(noisy, condition, embeds, torch.tensor([400]))


def settings_of(family: str, folder: Path) -> list[str]:
    """A length with an odd number of latent frames, which 1.5 pads; 5B-I2V has its one size."""
    size = [
        "data.height=48",
        "data.width=64",
        "data.fps=8",
        "data.max_num_frames=9",
        "train.mixed_precision=no",
    ]
    short = [
        "train.max_train_steps=12",
        "train.checkpointing_steps=6",
        "optimizer.learning_rate=5e-3",
        "validation.preview=latents",
        "validation.preview_steps=6",
    ]
    return [f"model={family}", f"model.path='{folder}'", *size, *short]


def in_plain_diffusers(run_folder: Path, family: str, folder: Path, kind: str):
    """A pipeline as the run's README tells to build it."""
    if kind == "LoRA":
        pipeline = pipeline_class(family).from_pretrained(folder)
        pipeline.load_lora_weights(str(run_folder))
        return pipeline
    tuned = CogVideoXTransformer3DModel.from_pretrained(run_folder / "transformer")
    return pipeline_class(family).from_pretrained(folder, transformer=tuned)


def tensors_of(folder: Path, kind: str) -> dict:
    return lora.read_adapter(folder)[0] if kind == "LoRA" else dict(full.saved(folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_clips_become_a_result_that_plain_diffusers_reproduces(
    family, kind, run, stopped, family_folder, delivered, compose
):
    folder, geometry = family_folder(family), tiny(family).geometry
    assert differences_from_the_pipeline(folder, family, compose, 9, 48, 64) == []
    note(family, COLUMNS[0], kind)
    settings = [*settings_of(family, folder), *KINDS[kind]]
    whole = run("whole", *settings)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"], "it trains"
    note(family, TRAINS[kind], kind)
    previews = sorted(whole.glob("previews/*/01_preview.mp4"))
    assert [path.parent.name for path in previews] == ["step_000006", "step_000012"]
    assert len(imageio.v3.imread(previews[0])) == 9, "without the frames that 1.5 needs in front"

    pipeline = in_plain_diffusers(whole, family, folder, kind)
    loaded = answer(pipeline.transformer, geometry, pipeline.scheduler)
    base = answer(
        pipeline_class(family).from_pretrained(folder).transformer, geometry, pipeline.scheduler
    )
    assert torch.allclose(loaded, delivered[0], atol=1e-5), (
        "the loaded model answers as the trained one"
    )
    assert (loaded - base).abs().max() > 1e-3, "and not as the base model"
    note(family, "result loads in diffusers", kind)

    resumed = stopped("resumed", whole, 6)
    assert run("resumed", *settings) == resumed
    found, expected = tensors_of(resumed, kind), tensors_of(whole, kind)
    assert lora.compare(expected, found, values=True) == [], "stopping and resuming changes no bit"
    assert (
        lora.compare(tensors_of(whole / "checkpoints" / "step_000012", kind), found, values=True)
        == []
    )
    assert (
        lora.compare(tensors_of(whole / "checkpoints" / "step_000006", kind), found, values=False)
        == []
    )
    note(family, "resuming is bit-equal", kind)


def table() -> str:
    lines = [f"| `model=` | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in FAMILIES:
        wanted = [
            {column.split()[0]} if column.endswith(" trains") else set(KINDS) for column in COLUMNS
        ]
        found = [held.get((family, column), set()) for column in COLUMNS]
        cells = [
            "yes" if f == w else f"not by {', '.join(sorted(w - f))}"
            for w, f in zip(wanted, found, strict=True)
        ]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_was_found():
    """`python -m pytest -n0 -s tests/end_to_end/test_every_family.py` prints the table."""
    assert len(held) == len(FAMILIES) * len(COLUMNS), "runs after the others of this file"
    print("\n" + table())
    assert table() in (PROJECT / "docs" / "models.md").read_text(encoding="utf-8")
