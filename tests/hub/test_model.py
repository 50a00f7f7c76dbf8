"""A model from the hub is trained as the same model in a folder is, and its commit is recorded."""

import json

import pytest
from safetensors.torch import load_file
from settings import QUICK
from stand_in import Fault

from cogvx import config as configuration

NAME = "zai/tiny-5b"
SMALL = [
    "model=5b",
    "data=world",
    "data.clips=8",
    "data.height=64",
    "data.width=64",
    "data.max_num_frames=9",
]
STEPS = ["train.max_train_steps=3", "train.mixed_precision=no"]


@pytest.fixture
def train(launch, hub, cache, tmp_path):
    """train("name", ...): the run's folder and what was printed."""

    def start(name, *overrides, expect=0, **variables):
        more = [f"output_dir='{tmp_path / name}'", f"data.cache_dir='{cache}'"]
        env = hub.environment(tmp_path / "home", **variables)
        said = launch(*QUICK, *SMALL, *STEPS, *more, *overrides, env=env)
        assert said.returncode == expect, said.stdout + said.stderr
        return tmp_path / name, said

    return start


def weights(run):
    return load_file(run / "pytorch_lora_weights.safetensors")


def same(one, other):
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all((first[k] == second[k]).all() for k in first)


@pytest.mark.slow
def test_it_is_trained_as_a_folder_is_and_repeated_with_its_commit(
    checkpoint, hub, train, launch, tmp_path
):
    repo = hub.add(NAME, checkpoint)
    commit = repo.names["main"]
    here, _ = train("here", f"model.path='{checkpoint}'")
    hub.faults.append(Fault("GET", "/storage/", after=1000))
    there, _ = train("there", f"model.path={NAME}")
    assert same(here, there)
    assert hub.count("assets|README") == 0, "only the parts of the pipeline are fetched"
    settings = json.loads((there / "inference.json").read_text())
    assert (settings["base_model"], settings["revision"]) == (NAME, commit)
    assert configuration.read(there / "config.yaml").model.revision == commit
    assert json.loads((there / "environment.json").read_text())["model_commit"] == commit

    # The authors change the model. The record's commit is used, also without a network.
    changed = dict(repo.files)
    [name] = [each for each in changed if each.endswith("00001-of-00002.safetensors")][:1]
    changed[name] = changed[name][:-4] + b"\0\0\0\0"
    assert repo.commit(changed) != commit
    again = ["--config-dir", there, "--config-name", "config", f"output_dir='{tmp_path / 'again'}'"]
    said = launch(*again, env=hub.environment(tmp_path / "home", HF_HUB_OFFLINE="1"))
    assert said.returncode == 0, said.stdout + said.stderr
    assert same(there, tmp_path / "again")
    _, said = train("there", f"model.path={NAME}")
    assert "is finished: nothing to do" in said.stdout
    train("pinned", f"model.path={NAME}", f"model.revision={commit}")
    assert same(there, tmp_path / "pinned")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.path=zai/nothing"], "there is no public model of that name on the hub. Check"),
        (
            [f"model.path={NAME}", "model.revision=v9"],
            f"model.path={NAME} is on the hub, but model.revision=v9 is no branch, tag or commit",
        ),
        (["model.path=zai/gated"], "its authors ask you to accept its licence. Do so on its page"),
    ],
)
def test_what_is_not_there_ends_with_one_line_and_nothing_is_lost(
    checkpoint, hub, train, overrides, said
):
    hub.add(NAME, {"README.md": b"a card"})
    hub.add("zai/gated", checkpoint, accepted=set())
    run, found = train("wrong", *overrides, expect=2)
    [line] = [each for each in found.stderr.splitlines() if each.startswith("error: ")]
    assert said in line
    assert "Traceback" not in found.stderr
    assert not list(run.glob("*.safetensors"))


@pytest.mark.slow
def test_what_is_no_video_model_is_refused_before_its_weights_come(hub, train):
    settings = {"_class_name": "FluxTransformer2DModel"}
    weights = bytes(200_000)
    hub.add(
        "zai/pictures",
        {
            "transformer/config.json": json.dumps(settings).encode(),
            "transformer/diffusion_pytorch_model.safetensors": weights,
        },
    )
    _, found = train("pictures", "model.path=zai/pictures", expect=2)
    assert "is a FluxTransformer2DModel" in found.stderr
    assert hub.count("safetensors|storage") == 0
