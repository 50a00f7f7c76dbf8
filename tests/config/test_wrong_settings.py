"""Everything that is wrong is named at once, with what to type, before torch is imported."""

import shutil

import pytest

from cogvx import compose as composing
from cogvx import config as configuration
from cogvx.errors import UserError


@pytest.mark.slow
def test_everything_wrong_is_reported_at_once(door):
    ran = door(
        *("lora.rnak=8", "optimzer.learning_rate=1", "data.max_num_frames=50", "data.height=50"),
        *("+lora.foo=2", "lora.lora_alpha=abc", "model=2c", "train.mixed_precision=bf8"),
    )
    assert ran.returncode == 2
    for part in (
        "8 settings are wrong",
        "unknown setting lora.rnak; did you mean lora.rank?",
        "did you mean optimizer.learning_rate?",
        "data.max_num_frames=50: must be 4k + 1; nearest: 49 or 53",
        "data.height=50: must be a multiple of 8",
        "unknown setting lora.foo",
        "lora.lora_alpha=abc: must be a number",
        "model=2c: there is no such option",
        "train.mixed_precision=bf8: must be one of no, fp16, bf16",
    ):
        assert part in ran.stderr
    assert "Traceback" not in ran.stderr and ran.stdout == ""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.rank=16,64", "add -m"),
        ("model.image_to_video=true", "model=nano_i2v"),
        ("data.video_column=prompts.txt", "each need their own column"),
        ("memory.offload_optimizer=true", "is for lora=null"),
        ("memory.base_storage=int8", "without memory.gradient_checkpointing=true saves nothing"),
        ("memory.feed_forward_chunks=0", "must be 1 (whole) or more"),
        ("train.ema_decay=1", "0.999 is usual"),
        ("train.attention=fast", "must be one of auto, flash, efficient, cudnn, math, fa3, fa4"),
        ("train.profile_steps=-1", "must be 0 (no profile) or more"),
        ("train.timestep_sampling=normal", "must be one of uniform, stratified, logit_normal"),
        ("lora.rank=0", "must be 1 or more"),
        ("seed=-1", "must be 0 or more"),
        ("data=text_files", "data.instance_data_root must be given"),
        ("parallel.num_processes=2", "add parallel=ddp"),
        ("+foo=3", "unknown setting foo"),
        ("data.height=0", "nearest: 8"),
        ("data.fps=0", "must be above 0"),
        ("lora.rank=x", "lora.rank=x: must be a whole number\n"),
        ("lora.rank=1.5", "lora.rank=1.5: must be a whole number\n"),
        ("lora.rank=null", "lora.rank=null: must be a whole number\n"),
        ("train.max_train_steps=x", "must be a whole number, or null\n"),
        ("optimizer.beta1=x", "optimizer.beta1=x: must be a number\n"),
        ("train.compile=maybe", "train.compile=maybe: must be true or false\n"),
        ("seed=x", "seed=x: must be a whole number\n"),
        ("modle=2b", "did you mean model=2b?"),
        ("modle=nanno", "did you mean model=nano?"),
        ("taks=plan", "did you mean task=plan?"),
        ("schedular=cosine", "did you mean scheduler=cosine?"),
        ("datas=csv", "did you mean data=csv?"),
        ("+datas=csv", "did you mean data=csv?"),
        ("outptu_dir=x", "did you mean output_dir=x?"),
        ("experiment=seed_5b", "did you mean seed_2b? experiment is one of nano_pretrain, "),
        ("model=THUDM/CogVideoX-5b-I2V", "did you mean model=5b_i2v?"),
        ("lora=none", "type lora=null"),
        ("lora=None", "type lora=null"),
        ("lora=false", "type lora=null"),
        ("tracking=null", "did you mean tracking=none?"),
        ("train=fast", "train has several settings; set one of them, train.KEY=VALUE"),
        ("report_to=wandb", "report_to is tracking here: type tracking=wandb"),
        ("rank=16", "rank is lora.rank here: type lora.rank=16"),
        ("+rank=16", "rank is lora.rank here: type lora.rank=16"),
        ("train.lr=1e-4", "type optimizer.learning_rate=1e-4"),
        ("use_8bit_adam=true", "type optimizer=adamw8bit"),
        ("push_to_hub=true", "push_to_hub: there is no such setting here. The name of the"),
        ("train.hub_repo_id=lora", "train.hub_repo_id=lora: must be name/repo, your name or"),
        ("train.hub_repo_id=me/a--b", "train.hub_repo_id=me/a--b: must be name/repo"),
        ("optimizer.momentum=0.9", "is a setting of optimizer=muon, and another option is chosen"),
        ("plan.card=a100_80gb", "plan.card is task.card here: type task.card=a100_80gb"),
        ("plan.measure=true", "type task.measure=true"),
        ("train.gradient_checkpointing=true", "type memory.gradient_checkpointing=true"),
    ],
)
def test_a_wrong_setting_is_named_with_exit_code_2(door, override, said):
    ran = door(override)
    assert ran.returncode == 2
    assert said in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["memory=balanced", "train.compile=true"], "memory.recompute=full"),
        (["memory=balanced", "train.attention=math"], "memory.recompute=full"),
        (["memory=low", "train.compile=true"], "memory.feed_forward_chunks=1"),
        (
            ["train.profile_steps=9", "train.max_train_steps=12", "scheduler=constant"],
            "there must be 13 or more",
        ),
    ],
)
def test_settings_that_exclude_each_other_say_which_to_change(compose, overrides, said):
    with pytest.raises(UserError, match=said):
        compose(*overrides)


def test_settings_of_a_lora_that_is_not_there_are_refused_in_words(door):
    ran = door("lora=null", "lora.rank=3")
    assert ran.returncode == 2 and "there is no LoRA to set: leave out one of the two" in ran.stderr


def test_a_misspelt_key_in_a_yaml_is_named(tmp_path, cache):
    shutil.copytree(configuration.CONF, tmp_path / "conf")
    (tmp_path / "conf/optimizer/adamw.yaml").write_text("learning_rate: 1\nbeta4: 0.9\n")
    with pytest.raises(UserError, match=r"unknown setting optimizer.beta4; did you mean") as raised:
        composing.compose_config([f"data.cache_dir='{cache}'"], tmp_path / "conf")
    assert "optimizer.epsilon has no value" in str(raised.value)


@pytest.mark.slow
def test_a_bad_local_model_and_a_misspelt_key_are_both_named(door, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text("{}")
    ran = door("model=2b", f"model.path={tmp_path}", "lora.rnk=3", "optimizer.beta1=2")
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    for part in (
        "vae/config.json does not exist",
        "lora.rnk; did you mean lora.rank?",
        "optimizer.beta1=2.0: must be",
    ):
        assert part in ran.stderr


def wrong(compose, *overrides: str) -> list[str]:
    with pytest.raises(configuration.Wrong) as raised:
        compose(*overrides)
    return raised.value.problems


def test_a_wrong_type_does_not_hide_a_broken_rule(compose):
    assert wrong(compose, "lora.rank=abc", "lora.lora_alpha=-1", "train.max_grad_norm=0") == [
        "lora.rank=abc: must be a whole number",
        "lora.lora_alpha=-1.0: must be above 0; rank or rank / 2 are usual",
        "train.max_grad_norm=0.0: must be above 0; null: no clipping",
    ]


def test_a_value_taken_over_from_a_wrong_one_is_not_named(compose):
    assert wrong(compose, "lora.rank=abc") == ["lora.rank=abc: must be a whole number"]
    assert wrong(compose, "model.height=x") == ["model.height=x: must be a whole number"]
    tied = wrong(compose, "lora.lora_alpha=${model.path}")
    assert len(tied) == 1 and tied[0].startswith("lora.lora_alpha=")


def test_settings_that_must_be_given_are_listed_with_the_others(compose):
    problems = wrong(compose, "data=dataset", "data.fps=0")
    assert [problem.partition(":")[0] for problem in problems] == [
        "data.dataset_name must be given",
        "data.fps=0.0",
    ]


@pytest.mark.slow
def test_a_task_that_reads_no_clips_asks_for_no_data(compose):
    assert compose("task=plan", "experiment=seed_2b").data.instance_data_root is None
    for data in ("text_files", "csv", "dataset"):
        assert compose("task=plan", f"data={data}")
        assert "must be given" in wrong(compose, f"data={data}")[0]
    missing = wrong(compose, "data=text_files", "data.instance_data_root=null")
    assert missing == ["data.instance_data_root must be given: data.instance_data_root=..."]


@pytest.mark.slow
def test_only_a_warmup_that_nobody_asked_for_is_shortened(compose):
    for steps, warmup in ((5, 0), (15, 1), (20, 2), (21, 20), (100, 20)):
        config = compose(f"train.max_train_steps={steps}")
        assert config.scheduler.lr_warmup_steps == warmup
    assert compose().scheduler.lr_warmup_steps == 20
    for scheduler in ("linear", "cosine", "cosine_with_restarts", "polynomial"):
        config = compose(f"scheduler={scheduler}", "train.max_train_steps=20")
        assert config.scheduler.lr_warmup_steps == 2
    refused = "scheduler.lr_warmup_steps=20 with train.max_train_steps=20"
    typed = wrong(compose, "train.max_train_steps=20", "scheduler.lr_warmup_steps=20")
    assert len(typed) == 1 and typed[0].startswith(refused)
    recipe = ["experiment=seed_2b", "data.instance_data_root=/clips", "train.max_train_steps=20"]
    assert "lr_warmup_steps=200" in wrong(compose, *recipe)[0]


def test_a_shortened_warmup_is_said(compose):
    def said(*overrides: str) -> str | None:
        return configuration.shortened_warmup(composing.Composer().compose([*overrides]))

    assert "the usual warm-up of 20 steps" in said("train.max_train_steps=15")
    assert "takes 1 step;" in said("train.max_train_steps=15")
    for silent in ([], ["train.max_train_steps=21"], ["scheduler=constant"]):
        assert (
            said(
                "train.max_train_steps=15" if silent == ["scheduler=constant"] else "seed=1",
                *silent,
            )
            is None
        )
    assert said("train.max_train_steps=15", "scheduler.lr_warmup_steps=3") is None
