"""What a run delivers goes to the hub with a card, and nothing else does."""

import getpass
import json
import re
import shutil

import pytest
import yaml
from stand_in import OWNER, READER, Fault

from cogvx.compose import compose_config
from cogvx.data import world
from cogvx.data.mp4 import write_video
from cogvx.errors import UserError
from cogvx.export import card
from cogvx.hub_upload import Upload

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def a_run(trained, clips_with_a_name):
    """A short run on clips in a folder that is nobody's business."""
    return trained(
        "model=nano",
        f"data.instance_data_root={clips_with_a_name}",
        "data.id_token=ZORB",
        "train.max_train_steps=4",
        "train.checkpointing_steps=2",
        "validation.heldout_steps=2",
        "validation.num_validation_videos=1",
        "validation.num_inference_steps=2",
        "validation.validation_prompt='a | cat <b>::: a dog'",
    )


@pytest.fixture(scope="module")
def clips_with_a_name(tmp_path_factory):
    root = tmp_path_factory.mktemp("client_of_ours") / "clips"
    # Equal clips would all be on the same side of the split.
    for number in range(6):
        write_video(root / f"{number}.mp4", world.draw_clip(world.scenes(6, seed=0)[number]), fps=8)
    (root / "prompts.txt").write_text("".join(f"a secret caption {n}\n" for n in range(6)))
    (root / "videos.txt").write_text("".join(f"{n}.mp4\n" for n in range(6)))
    return root


@pytest.fixture
def push(launch, hub, tmp_path):
    """push(run, "task.format=..."): what was printed."""

    def start(run, *overrides, token=OWNER, expect=0):
        env = hub.environment(tmp_path / "home", token=token)
        said = launch("task=export", f"task.run={run}", *overrides, env=env)
        assert said.returncode == expect, said.stdout + said.stderr
        assert "Traceback" not in said.stderr
        return said.stdout + said.stderr

    return start


@pytest.fixture
def copied(a_run, tmp_path):
    return shutil.copytree(a_run, tmp_path / "my-run")


def metadata_of(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def uploaded(hub, name: str) -> dict[str, bytes]:
    return hub.repos["model", name].files


@pytest.mark.slow
def test_only_what_is_of_use_to_others_is_uploaded(copied, hub, push, clips_with_a_name):
    said = push(copied, "task.hub_repo_id=me/My-Lora")
    repo = hub.repos["model", "me/My-Lora"]
    assert repo.private, "unless it is asked for otherwise"
    samples = {f"videos/0{n}_seed42{base}.mp4" for n in (1, 2) for base in ("", "_base")}
    assert set(repo.files) == samples | {
        *(".gitattributes", "README.md", LORA, "inference.json", "export.json", "config.yaml"),
        "heldout_loss.png",
    }
    assert repo.files[LORA] == (copied / LORA).read_bytes()
    assert repo.files["heldout_loss.png"].startswith(b"\x89PNG")
    assert f"hub     me/My-Lora, commit {repo.names['main'][:8]}" in said


@pytest.mark.slow
def test_nothing_private_is_uploaded(copied, hub, push, clips_with_a_name):
    push(copied, "task.hub_repo_id=me/careful", "task.hub_checkpoints=true")
    files = uploaded(hub, "me/careful")
    private = [str(copied), str(clips_with_a_name), "client_of_ours", "secret caption"]
    private += [f"/{getpass.getuser()}/", "/tmp"]
    found = [
        (name, text)
        for name, content in files.items()
        for text in private
        if text.encode() in content
    ]
    assert found == []
    assert {f"step_00000{n}/{LORA}" for n in (2, 4)} <= set(files)
    assert not any("optimizer" in name or "manifest" in name for name in files)


@pytest.mark.slow
def test_the_config_starts_the_run_again(copied, hub, push, tmp_path, clips_with_a_name):
    push(copied, "task.hub_repo_id=me/again")
    from cogvx.runs import translate

    recipe, scratch = tmp_path / "recipe", tmp_path / "scratch"
    recipe.mkdir(), scratch.mkdir()
    (recipe / "config.yaml").write_bytes(uploaded(hub, "me/again")["config.yaml"])
    command = uploaded(hub, "me/again")["README.md"].decode()
    [line] = [each for each in command.splitlines() if each.startswith("python launch.py")]
    words = line.replace("recipe", str(recipe)).replace("/clips", str(clips_with_a_name)).split()
    found = translate.translated(words[2:], scratch)
    config = compose_config(found.overrides(), scratch, found.composer.searchpath)
    assert config.train.max_train_steps == 4 and config.data.id_token == "ZORB"
    assert config.train.hub_repo_id is None


@pytest.mark.slow
def test_the_card_says_what_it_is_and_how_it_was_made(copied, hub, push):
    push(copied, "task.hub_repo_id=me/carded")
    text = uploaded(hub, "me/carded")["README.md"].decode()
    found = metadata_of(text)
    assert (found["library_name"], found["pipeline_tag"]) == ("diffusers", "text-to-video")
    assert found["instance_prompt"] == "ZORB" and {"lora", "cogvideox"} <= {*found["tags"]}
    assert [each["text"] for each in found["widget"]] == ["a | cat <b>", "a dog"]
    assert found["widget"][0]["output"] == {"url": "videos/01_seed42.mp4"}
    [result] = found["model-index"][0]["results"]
    summary = json.loads((copied / "summary.json").read_text())
    assert result["metrics"][0]["value"] == round(summary["heldout_loss_after"], 5)
    assert "base_model" not in found, "it is a folder of this machine"
    assert r"| a \| cat \<b\> | 42 | [video](videos/01_seed42.mp4)" in text
    assert (
        re.search(r"[1-5] clips? to train on, [1-5] held out", text) and "9 frames of 64x64" in text
    )
    assert "rank 4, alpha 2" in text and "![held-out loss](heldout_loss.png)" in text
    assert "Put the word **ZORB** into the prompt." in text


@pytest.mark.parametrize(
    ("base", "licence"),
    [
        ("THUDM/CogVideoX-2b", {"license": "apache-2.0"}),
        ("zai-org/CogVideoX-5b-I2V", {"license": "other", "license_name": "cogvideox-license"}),
        ("zai-org/CogVideoX1.5-5B", {"license": "other", "license_name": "cogvideox-license"}),
        ("me/CogVideoX-5b-cats", {}),
    ],
)
def test_a_result_has_the_licence_of_its_base(base, licence):
    found = card.licence_of(base)
    link = found.pop("license_link", None)
    assert found == licence
    assert (link is not None) == (licence.get("license") == "other")
    assert link is None or link.endswith(f"/{base}/blob/main/LICENSE")


@pytest.mark.slow
def test_scores_have_their_intervals(a_run, tmp_path):
    run = shutil.copytree(a_run, tmp_path / "run")
    scored = {"kind": "taught", "measure": "colour", "base": 0.1, "tuned": 0.9, "videos": 12}
    scored |= {"difference": 0.8, "low": 0.7, "high": 0.95}
    # What task=evaluate task.run=... leaves beside the run.
    judged, other = tmp_path / "judged", tmp_path / "other"
    for folder, of in ((judged, run), (other, tmp_path)):
        folder.mkdir()
        (folder / "config.yaml").write_text(f"task: {{run: {of}}}\n")
        (folder / "evaluation.json").write_text(json.dumps({"comparisons": {"result": [scored]}}))
        scored = scored | {"tuned": 0.2}
    from cogvx import config as configuration
    from cogvx.options.tasks import Format

    config = configuration.read(run / "config.yaml")
    published = card.Published(run, config, "me/x", Format.diffusers, [LORA], {}, {"step": 4})
    text = card.model_card(published)
    assert "| colour, taught prompts | 0.100 | 0.900 | +0.800 (+0.700 to +0.950) | 12 |" in text
    assert metadata_of(text)["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.9


@pytest.mark.slow
def test_other_formats_too(copied, hub, push):
    push(copied, "task.format=comfyui", "task.hub_repo_id=me/for-comfyui", "task.strength=0.5")
    files = uploaded(hub, "me/for-comfyui")
    assert "my-run_comfyui.safetensors" in files and LORA not in files
    text = files["README.md"].decode()
    assert "For ComfyUI: `my-run_comfyui.safetensors`, node Load LoRA, strength 1.0." in text
    assert "The videos and numbers below are of the run's own result at its end." in text


def test_json_files_lose_the_paths_of_this_machine(compose, tmp_path):
    config = compose("data.cache_dir=/home/me/cache")
    settings = {"_name_or_path": "/home/me/cache/models/nano_4", "sizes": [1, 2], "asked": "a hash"}
    settings |= {"base_model": "/models/of a client", "image": "~/pictures/one.png"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    assert json.loads(card.shareable_json(path, config)) == {
        "_name_or_path": "outputs/cache/models/nano_4",
        "sizes": [1, 2],
        "base_model": "your_base_model",
        "image": "your_image",
    }


def test_an_error_of_our_own_is_no_failed_run(a_run, monkeypatch, capsys):
    from cogvx import config as configuration
    from cogvx.export import publish

    def broken(*_):
        raise KeyError("a fault in the card")

    monkeypatch.setattr(publish, "model_card", broken)
    config = configuration.read(a_run / "config.yaml")
    upload = Upload("me/broken", False, True, "train.hub_repo_id")
    said = publish.publish_run(config, a_run, upload, {"status": "done"})
    assert "a fault in the card" in said["error"]
    assert said["again"].endswith("task.hub_private=false task.hub_checkpoints=true")
    assert said["again"] in capsys.readouterr().out


# -- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        (None, "me/x", "task.hub_repo_id=me/x and nobody is logged in: log in with a token that"),
        ("hf_of_last_year", "me/x", "the hub refuses your token (a token in HF_TOKEN comes first)"),
        (READER, "me/x", "task.hub_repo_id=me/x: your token may only read; log in with a token"),
        (OWNER, "you/x", "your account me may not write there, only to me/..., lab/..."),
        (OWNER, "me/open", "is there already and is public, and task.hub_private=true: make it"),
        (OWNER, "me/a--b", "task.hub_repo_id=me/a--b: must be name/repo"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_anything_is_written(
    copied, hub, push, token, repo, said
):
    hub.add("me/open", {"README.md": b"everybody sees this"})
    found = push(copied, f"task.hub_repo_id={repo}", token=token, expect=2)
    assert said in found
    assert not (copied / "export").exists()
    assert uploaded(hub, "me/open") == {"README.md": b"everybody sees this"}


def send(hub, name="me/sent", **files) -> None:
    Upload(name, True, False, "train.hub_repo_id").send(files, "a message")


def test_an_upload_that_is_cut_goes_on_where_it_stopped(hub, set_up, waited, tmp_path):
    set_up(HF_TOKEN=OWNER)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    one.write_bytes(bytes(range(256)) * 12_000)
    two.write_bytes(b"another" * 1000)
    hub.faults.append(Fault("POST", "/commit/", after=100, times=2))
    send(hub, one=one, two=two)
    assert uploaded(hub, "me/sent")["one"] == one.read_bytes()
    assert hub.count("POST .*/commit/main") == 3
    parts = -(-one.stat().st_size // (1 << 20))
    assert hub.count("PUT /storage/") == parts + (0 if two.stat().st_size < 100_000 else 1)


def test_a_hub_that_fails_for_a_moment_gets_it_later(hub, set_up, waited):
    set_up(HF_TOKEN=OWNER)
    hub.faults.append(Fault("POST", "/api/repos/create", status=503))
    hub.faults.append(Fault("POST", "/commit/", status=429, headers={"Retry-After": "77"}))
    send(hub, "me/patience", card=b"text")
    assert uploaded(hub, "me/patience")["card"] == b"text"
    assert 77 in waited


def test_rights_that_the_hub_alone_knows_of(hub, set_up, waited):
    set_up(HF_TOKEN=OWNER)
    hub.faults.append(Fault("POST", "/commit/", status=403))
    with pytest.raises(UserError, match=r"your account may not write there \(403\); log in with"):
        send(hub, "me/forbidden", card=b"text")


def test_what_an_earlier_upload_left_is_removed(hub, set_up):
    set_up(HF_TOKEN=OWNER)
    mine = {"videos/my.mp4": b"3", "step_by_step.md": b"4"}
    more = {"videos/02_seed7_base.mp4": b"2", f"step_000004/{LORA}": b"5"}
    send(hub, "me/twice", **{"videos/01_seed7.mp4": b"1"}, **more, **mine)
    send(hub, "me/twice", **{"videos/01_seed7.mp4": b"1"})
    assert {*uploaded(hub, "me/twice")} == {".gitattributes", "videos/01_seed7.mp4", *mine}


# -- when a run is done --------------------------------------------------------------------------


@pytest.fixture
def train(launch, hub, tmp_path, cache, clips):
    def start(*overrides, token=OWNER, expect=0, **variables):
        from settings import QUICK

        more = [f"output_dir='{tmp_path / 'run'}'", f"data.cache_dir='{cache}'"]
        more.append(f"data.instance_data_root='{clips}'")
        env = hub.environment(tmp_path / "home", token=token, **variables)
        said = launch(*QUICK, "train.max_train_steps=3", *more, *overrides, env=env)
        assert said.returncode == expect, said.stdout + said.stderr
        return tmp_path / "run", said.stdout + said.stderr

    return start


KEYS = {"WANDB_API_KEY": "wandb-secret", "OPENAI_API_KEY": "sk-secret", "AWS_SECRET": "aws-secret"}


@pytest.mark.slow
def test_a_run_uploads_its_result_when_it_is_done(hub, train):
    run, said = train("train.hub_repo_id=lab/done", "train.hub_private=false", **KEYS)
    # No token is in what a run leaves, prints or uploads.
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    texts = [*files.values(), *hub.repos["model", "lab/done"].files.values(), said.encode()]
    assert len(files) > 10
    for secret in (OWNER, *KEYS.values()):
        assert not any(secret.encode() in text for text in texts)
    repo = hub.repos["model", "lab/done"]
    assert not repo.private and repo.files[LORA] == (run / LORA).read_bytes()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["hub"] == {"repo_id": "lab/done", "commit": repo.names["main"]}


@pytest.mark.slow
def test_a_failed_upload_is_no_failed_run(hub, train, push):
    hub.faults.append(Fault("POST", "/api/repos/create", status=403, times=9))
    run, said = train("train.hub_repo_id=me/failed")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done" and (run / LORA).is_file()
    assert "may not write there (403)" in summary["hub"]["error"]
    [line] = [each for each in said.splitlines() if each.startswith("warning the upload failed")]
    again = f"python launch.py task=export task.run={run} task.hub_repo_id=me/failed"
    assert line.endswith(f"Again:  {again}") and summary["hub"]["again"] == again
    hub.faults.clear()
    push(run, "task.hub_repo_id=me/failed")
    assert LORA in uploaded(hub, "me/failed")
    # Again, with another message on the way: the export is there already.
    push(run, "task.hub_repo_id=me/failed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "variables", "said"),
    [
        (None, {}, "train.hub_repo_id=me/night and nobody is logged in"),
        (OWNER, {"HF_HUB_OFFLINE": "1"}, "train.hub_repo_id=me/night uploads, and HF_HUB_OFFLINE"),
        (READER, {}, "your token may only read"),
    ],
)
def test_no_night_is_spent_first(hub, train, token, variables, said):
    run, found = train("train.hub_repo_id=me/night", token=token, expect=2, **variables)
    assert said in found
    assert not (run / "metrics.jsonl").exists() and not list(run.glob("*.safetensors"))


@pytest.mark.slow
def test_the_jobs_of_a_sweep_do_not_share_a_repository(launch, hub, tmp_path):
    said = launch(
        "-m",
        "lora.rank=4,8",
        "train.hub_repo_id=me/one",
        f"output_dir='{tmp_path / 'sweep'}'",
        env=hub.environment(tmp_path / "home", token=OWNER),
    )
    assert said.returncode == 2
    assert "several jobs of the sweep would upload to one repository" in said.stderr
