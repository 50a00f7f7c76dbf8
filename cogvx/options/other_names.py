"""Names that other trainers use, and our own older ones, with what to type here instead.

Every name of these tables is answered by a message when someone types it, and the page about
diffusers' script is made from DIFFUSERS. One entry is an OtherName(ours, note):

- `ours` without "=": our setting, which takes the same value (rank=16 is lora.rank=16).
- `ours` with "=": what to type, whole (use_8bit_adam is optimizer=adam8bit).
- `ours` is None: there is no such setting, and `note` says why.
- `note`: a sentence for the reader; "" where the setting says all.
"""

from typing import NamedTuple


class OtherName(NamedTuple):
    ours: str | None
    note: str = ""


# Every flag of examples/cogvideo/train_cogvideox_lora.py and, at the end,
# those that only train_cogvideox_image_to_video_lora.py has, in the order of the scripts.
DIFFUSERS: dict[str, OtherName] = {
    "pretrained_model_name_or_path": OtherName(
        "model.path",
        "model=2b (or 5b, 5b_i2v, 1_5_5b, 1_5_5b_i2v) chooses the released model; "
        "model.path is needed only for a copy of it",
    ),
    "revision": OtherName("model.revision"),
    "variant": OtherName(
        None, "The plain files are loaded; train.mixed_precision sets the precision."
    ),
    "cache_dir": OtherName(
        None,
        "Downloads go to the cache of huggingface_hub: set the variable HF_HOME. "
        "For latents and prompt embeddings: data.cache_dir.",
    ),
    "dataset_name": OtherName("data.dataset_name", "with data=dataset or data=csv"),
    "dataset_config_name": OtherName(
        None, "data=dataset reads the default configuration of a dataset."
    ),
    "instance_data_root": OtherName("data.instance_data_root"),
    "video_column": OtherName("data.video_column"),
    "caption_column": OtherName("data.caption_column"),
    "id_token": OtherName("data.id_token", "here a space follows it"),
    "dataloader_num_workers": OtherName(
        None,
        "Clips are decoded and encoded once, before training, which then reads the cache. "
        "Two processes decode the next clips while the VAE encodes one.",
    ),
    "validation_prompt": OtherName("validation.validation_prompt"),
    "validation_prompt_separator": OtherName("validation.validation_prompt_separator"),
    "num_validation_videos": OtherName("validation.num_validation_videos"),
    "validation_epochs": OtherName(
        "validation.validation_steps=STEPS", "it counts optimizer steps, not epochs"
    ),
    "guidance_scale": OtherName("validation.guidance_scale"),
    "use_dynamic_cfg": OtherName("validation.use_dynamic_cfg"),
    "seed": OtherName("seed"),
    "rank": OtherName("lora.rank"),
    "lora_alpha": OtherName("lora.lora_alpha"),
    "mixed_precision": OtherName("train.mixed_precision"),
    "output_dir": OtherName("output_dir", "the folder of this one run"),
    "height": OtherName("data.height"),
    "width": OtherName("data.width"),
    "video_reshape_mode": OtherName(
        "data.video_reshape_mode", "center, random, pad or none; clips are never stretched"
    ),
    "fps": OtherName("data.fps", "frames are taken by their time, so clips keep their speed"),
    "max_num_frames": OtherName("data.max_num_frames"),
    "skip_frames_start": OtherName("data.skip_frames_start"),
    "skip_frames_end": OtherName("data.skip_frames_end"),
    "random_flip": OtherName("data.flip=true", "captions that say left and right are warned of"),
    "train_batch_size": OtherName("train.train_batch_size"),
    "num_train_epochs": OtherName("train.num_train_epochs"),
    "max_train_steps": OtherName("train.max_train_steps"),
    "checkpointing_steps": OtherName("train.checkpointing_steps"),
    "checkpoints_total_limit": OtherName("train.checkpoints_total_limit"),
    "resume_from_checkpoint": OtherName(
        "train.resume=outputs/RUN", "a run's folder, or one of its checkpoints"
    ),
    "gradient_accumulation_steps": OtherName("train.gradient_accumulation_steps"),
    "gradient_checkpointing": OtherName(
        "memory.gradient_checkpointing", "memory=balanced and below turn it on"
    ),
    "learning_rate": OtherName("optimizer.learning_rate"),
    "scale_lr": OtherName(
        None, "optimizer.learning_rate is used as it is given; multiply it yourself."
    ),
    "lr_scheduler": OtherName("scheduler"),
    "lr_warmup_steps": OtherName("scheduler.lr_warmup_steps"),
    "lr_num_cycles": OtherName(
        "scheduler.lr_num_cycles", "with scheduler=cosine or scheduler=cosine_with_restarts"
    ),
    "lr_power": OtherName("scheduler.lr_power", "with scheduler=polynomial"),
    "enable_slicing": OtherName(
        None, "Nothing to switch on: clips and videos pass through the VAE one at a time."
    ),
    "enable_tiling": OtherName("memory.vae_tiling", "memory=balanced and below turn it on"),
    "optimizer": OtherName("optimizer"),
    "use_8bit_adam": OtherName(
        "optimizer=adamw8bit", "optimizer=adam8bit is the same without weight decay"
    ),
    "adam_beta1": OtherName("optimizer.beta1"),
    "adam_beta2": OtherName("optimizer.beta2"),
    "prodigy_beta3": OtherName("optimizer.beta3", "with optimizer=prodigy"),
    "prodigy_decouple": OtherName("optimizer.decouple", "with optimizer=prodigy, where it is on"),
    "adam_weight_decay": OtherName("optimizer.weight_decay", "optimizer=adam has none"),
    "adam_epsilon": OtherName("optimizer.epsilon"),
    "max_grad_norm": OtherName("train.max_grad_norm"),
    "prodigy_use_bias_correction": OtherName(
        "optimizer.use_bias_correction", "with optimizer=prodigy, where it is on"
    ),
    "prodigy_safeguard_warmup": OtherName(
        "optimizer.safeguard_warmup", "with optimizer=prodigy, where it is on"
    ),
    "tracker_name": OtherName("tracking.project", "with tracking=wandb or trackio"),
    "push_to_hub": OtherName(
        None, "The name of the repository is enough: train.hub_repo_id=NAME/REPOSITORY."
    ),
    "hub_token": OtherName(None, "Log in once: hf auth login."),
    "hub_model_id": OtherName("train.hub_repo_id"),
    "logging_dir": OtherName(None, "All logs are in the run's folder, output_dir."),
    "allow_tf32": OtherName(
        None, "TF32 is never switched on; train.mixed_precision=bf16 is faster."
    ),
    "report_to": OtherName("tracking", "none, tensorboard, trackio or wandb"),
    # image to video
    "validation_images": OtherName("validation.validation_images"),
    "noised_image_dropout": OtherName("train.image_dropout"),
    "nccl_timeout": OtherName(None, "Processes wait for each other for up to a day."),
    # in earlier versions of the image-to-video script
    "ignore_learned_positional_embeddings": OtherName(
        None, "The checkpoint's own positions are always used; other sizes are refused."
    ),
}

# Names of CogVideo's own trainer, finetrainers, cogvideox-factory, kohya's scripts and peft.
ELSEWHERE: dict[str, OtherName] = {
    # model
    "pretrained_model": OtherName("model.path", "model=2b, model=5b, ... choose a released model"),
    "pretrained_model_path": OtherName("model.path", "model=2b, ... choose a released model"),
    "base_model": OtherName("model.path", "model=2b, model=5b, ... choose a released model"),
    "model_path": OtherName("model.path", "model=2b, model=5b, ... choose a released model"),
    "model_name": OtherName("model", "2b, 5b, 5b_i2v, 1_5_5b, 1_5_5b_i2v or nano"),
    "model_name_or_path": OtherName("model.path", "model=2b, ... choose a released model"),
    "model_type": OtherName("model=5b_i2v", "image-to-video; model=5b is text-to-video"),
    "checkpoint": OtherName("train.resume", "to go on with a run; a model is chosen with model=2b"),
    "training_type": OtherName("lora=null", "to train every weight; a LoRA is the default"),
    "train_type": OtherName("lora=null", "to train every weight; a LoRA is the default"),
    "full_finetune": OtherName("lora=null"),
    "sft": OtherName("lora=null"),
    "use_lora": OtherName("lora.rank=64", "a LoRA is the default; lora=null trains every weight"),
    # data
    "data_root": OtherName("data.instance_data_root"),
    "data_dir": OtherName("data.instance_data_root"),
    "data_path": OtherName("data.instance_data_root"),
    "dataset_path": OtherName("data.instance_data_root"),
    "train_data_dir": OtherName("data.instance_data_root"),
    "instance_data_dir": OtherName("data.instance_data_root"),
    "video_folder": OtherName("data.instance_data_root"),
    "root": OtherName("data.instance_data_root"),
    "dataset": OtherName("data.dataset_name", "with data=dataset or data=csv"),
    "dataset_file": OtherName("data.dataset_name", "with data=csv"),
    "train_data": OtherName("data.instance_data_root"),
    "image_column": OtherName("data.image_column"),
    "trigger_word": OtherName("data.id_token"),
    "trigger": OtherName("data.id_token"),
    "resolution": OtherName("data.height=480 data.width=720", "height and width in pixels"),
    "train_resolution": OtherName(
        "data.max_num_frames=49 data.height=480 data.width=720", "frames, height, width"
    ),
    "size": OtherName("data.height=480 data.width=720", "height and width in pixels"),
    # finetrainers; musubi-tuner and sd-scripts; diffusion-pipe
    "video_resolution_buckets": OtherName("data.buckets", "sizes such as [49x480x720], or auto"),
    "enable_bucket": OtherName("data.buckets=auto"),
    "enable_ar_bucket": OtherName("data.buckets=auto"),
    "frame_buckets": OtherName("data.buckets", "sizes such as [49x480x720], or auto"),
    "num_frames": OtherName("data.max_num_frames"),
    "max_frames": OtherName("data.max_num_frames"),
    "frames": OtherName("data.max_num_frames"),
    "video_length": OtherName("data.max_num_frames"),
    "num_workers": DIFFUSERS["dataloader_num_workers"],
    "pin_memory": DIFFUSERS["dataloader_num_workers"],
    "caption_dropout_p": OtherName("train.caption_dropout"),
    "caption_dropout": OtherName("train.caption_dropout"),
    "caption_dropout_rate": OtherName("train.caption_dropout"),
    "image_dropout": OtherName("train.image_dropout"),
    # length and size of steps
    "steps": OtherName("train.max_train_steps"),
    "train_steps": OtherName("train.max_train_steps"),
    "max_steps": OtherName("train.max_train_steps"),
    "num_steps": OtherName("train.max_train_steps"),
    "num_train_steps": OtherName("train.max_train_steps"),
    "iterations": OtherName("train.max_train_steps"),
    "epochs": OtherName("train.num_train_epochs"),
    "num_epochs": OtherName("train.num_train_epochs"),
    "train_epochs": OtherName("train.num_train_epochs"),
    "max_train_epochs": OtherName("train.num_train_epochs"),
    "batch_size": OtherName("train.train_batch_size"),
    "per_device_train_batch_size": OtherName("train.train_batch_size"),
    "micro_batch_size": OtherName("train.train_batch_size"),
    "grad_accum": OtherName("train.gradient_accumulation_steps"),
    "grad_accum_steps": OtherName("train.gradient_accumulation_steps"),
    "gradient_accumulation": OtherName("train.gradient_accumulation_steps"),
    "grad_clip": OtherName("train.max_grad_norm"),
    "clip_grad_norm": OtherName("train.max_grad_norm"),
    "gradient_clipping": OtherName("train.max_grad_norm"),
    # captions
    "shuffle_caption": OtherName("data.tag_shuffles=8", "orders are encoded in advance"),
    "shuffle_tags": OtherName("data.tag_shuffles=8", "orders are encoded in advance"),
    "keep_tokens": OtherName("data.keep_tags"),
    "num_repeats": OtherName(None, "A source of data=mix has a share: data.sources.NAME.share."),
    "enable_wildcard": OtherName("data.caption_split=lines", "each line is a caption"),
    # precision and memory
    "precision": OtherName("train.mixed_precision"),
    "dtype": OtherName("train.mixed_precision", "no, fp16 or bf16"),
    "torch_dtype": OtherName("train.mixed_precision", "no, fp16 or bf16"),
    "bf16": OtherName("train.mixed_precision=bf16"),
    "fp16": OtherName("train.mixed_precision=fp16"),
    "fp32": OtherName("train.mixed_precision=no"),
    "grad_checkpointing": OtherName("memory.gradient_checkpointing"),
    "low_vram": OtherName("memory=low", "or memory=balanced, memory=minimal"),
    "lowvram": OtherName("memory=low", "or memory=balanced, memory=minimal"),
    "blocks_to_swap": OtherName("memory=minimal"),
    "cpu_offload": OtherName("memory=minimal", "or memory=low"),
    "enable_model_cpu_offload": OtherName("memory=low", "or memory=minimal"),
    "fp8_base": OtherName("memory=low memory.base_storage=fp8"),
    "quantize": OtherName("memory=low memory.base_storage=int8", "fp8, int8 or nf4"),
    "load_in_8bit": OtherName("memory=low memory.base_storage=int8"),
    "load_in_4bit": OtherName("memory=low memory.base_storage=nf4"),
    "vae_tiling": OtherName("memory.vae_tiling"),
    "vae_slicing": DIFFUSERS["enable_slicing"],
    "torch_compile": OtherName("train.compile"),
    "compile": OtherName("train.compile"),
    # LoRA
    "r": OtherName("lora.rank"),
    "lora_r": OtherName("lora.rank"),
    "lora_rank": OtherName("lora.rank"),
    "network_dim": OtherName("lora.rank"),
    "alpha": OtherName("lora.lora_alpha"),
    "network_alpha": OtherName("lora.lora_alpha"),
    "target_modules": OtherName("lora.target_modules"),
    "lora_target_modules": OtherName("lora.target_modules"),
    "dropout": OtherName(None, "There is no dropout inside the LoRA; see train.caption_dropout."),
    "lora_dropout": OtherName(
        None, "There is no dropout inside the LoRA; see train.caption_dropout."
    ),
    "network_weights": OtherName("lora.init_from"),
    "lora_path": OtherName("lora.init_from"),
    "use_dora": OtherName("lora.use_dora"),
    "use_rslora": OtherName("lora.use_rslora"),
    # optimizer and schedule
    "lr": OtherName("optimizer.learning_rate"),
    "unet_lr": OtherName("optimizer.learning_rate"),
    "optim": OtherName("optimizer"),
    "optimizer_type": OtherName("optimizer"),
    "beta1": OtherName("optimizer.beta1"),
    "beta2": OtherName("optimizer.beta2"),
    "beta3": OtherName("optimizer.beta3", "with optimizer=prodigy"),
    "betas": OtherName("optimizer.beta1=0.9 optimizer.beta2=0.95"),
    "eps": OtherName("optimizer.epsilon"),
    "epsilon": OtherName("optimizer.epsilon"),
    "weight_decay": OtherName("optimizer.weight_decay", "optimizer=adam has none"),
    "lr_schedule": OtherName("scheduler"),
    "lr_scheduler_type": OtherName("scheduler"),
    "warmup": OtherName("scheduler.lr_warmup_steps"),
    "warmup_steps": OtherName("scheduler.lr_warmup_steps"),
    "use_ema": OtherName("train.ema_decay=0.999"),
    "ema": OtherName("train.ema_decay=0.999"),
    "ema_decay": OtherName("train.ema_decay"),
    "snr_gamma": OtherName("train.min_snr_gamma"),
    "min_snr_gamma": OtherName("train.min_snr_gamma"),
    # validation
    "prompt": OtherName("validation.validation_prompt"),
    "prompts": OtherName("validation.validation_prompt", "several with ::: between them"),
    "validation_prompts": OtherName(
        "validation.validation_prompt", "several with ::: between them"
    ),
    "sample_prompts": OtherName("validation.validation_prompts_file"),
    "validation_prompts_file": OtherName("validation.validation_prompts_file"),
    "validation_steps": OtherName("validation.validation_steps"),
    "num_inference_steps": OtherName("validation.num_inference_steps"),
    "cfg_scale": OtherName("validation.guidance_scale"),
    "cfg": OtherName("validation.guidance_scale"),
    "negative_prompt": OtherName("validation.negative_prompt"),
    "sampler": OtherName("validation.scheduler"),
    "noise_scheduler": OtherName("validation.scheduler"),
    # checkpoints, folders, trackers, processes
    "save_steps": OtherName("train.checkpointing_steps"),
    "save_every": OtherName("train.checkpointing_steps"),
    "save_every_n_steps": OtherName("train.checkpointing_steps"),
    "save_total_limit": OtherName("train.checkpoints_total_limit"),
    "checkpointing_limit": OtherName("train.checkpoints_total_limit"),
    "resume": OtherName("train.resume"),
    "output": OtherName("output_dir"),
    "out_dir": OtherName("output_dir"),
    "save_dir": OtherName("output_dir"),
    "output_path": OtherName("output_dir"),
    "logging_steps": OtherName("train.logging_steps"),
    "log_with": OtherName("tracking", "none, tensorboard, trackio or wandb"),
    "logger": OtherName("tracking", "none, tensorboard, trackio or wandb"),
    "wandb": OtherName("tracking=wandb"),
    "tensorboard": OtherName("tracking=tensorboard"),
    "wandb_project": OtherName("tracking.project", "with tracking=wandb or trackio"),
    "project": OtherName("tracking.project", "with tracking=wandb or trackio"),
    "num_gpus": OtherName("parallel.num_processes", "with parallel=ddp"),
    "num_processes": OtherName("parallel.num_processes", "with parallel=ddp"),
    "gpus": OtherName("parallel.num_processes", "with parallel=ddp"),
    "device": OtherName(None, "A GPU is used where there is one; CUDA_VISIBLE_DEVICES chooses it."),
    "config": OtherName("experiment", "conf/experiment holds the recipes"),
    "recipe": OtherName("experiment", "conf/experiment holds the recipes"),
}

# Keys that earlier versions of this project had.
RENAMED: dict[str, OtherName] = {
    "plan.card": OtherName("task.card"),
    "plan.measure": OtherName("task.measure"),
    "train.gradient_checkpointing": OtherName("memory.gradient_checkpointing"),
}

# What Hydra's own plugin for Optuna, hydra-optuna-sweeper, calls its settings.
SWEEPER: dict[str, OtherName] = {
    "hydra.sweeper.direction": OtherName(None, "The lowest held-out loss is always the best."),
    "hydra.sweeper.n_jobs": OtherName("hydra.launcher.jobs"),
    "hydra.sweeper.sampler": OtherName(
        None, "Optuna's TPE proposes the jobs; hydra.sweeper.seed is its seed."
    ),
    "hydra/sweeper/sampler": OtherName(
        None, "Optuna's TPE proposes the jobs; hydra.sweeper.seed is its seed."
    ),
    "hydra.sweeper.study_name": OtherName("output_dir", "the folder of the search"),
    "hydra.sweeper.storage": OtherName(
        None, "What a search knows is in the folders of its jobs; output_dir is the whole folder."
    ),
    "hydra.sweeper.search_space": OtherName("hydra.sweeper.params"),
    "hydra.sweeper.max_failure_rate": OtherName(
        None, "A job that fails stops no other; see hydra.launcher.on_fail."
    ),
}

OTHER_NAMES: dict[str, OtherName] = {**ELSEWHERE, **DIFFUSERS, **RENAMED, **SWEEPER}

# Options by other names, in small letters.
OTHER_OPTIONS: dict[str, dict[str, str]] = {
    "model": {
        "thudm/cogvideox-2b": "2b",
        "thudm/cogvideox-5b": "5b",
        "thudm/cogvideox-5b-i2v": "5b_i2v",
        "thudm/cogvideox1.5-5b": "1_5_5b",
        "thudm/cogvideox1.5-5b-i2v": "1_5_5b_i2v",
        "cogvideox-2b": "2b",
        "cogvideox-5b": "5b",
        "cogvideox-5b-i2v": "5b_i2v",
        "cogvideox1.5-5b": "1_5_5b",
        "cogvideox1.5-5b-i2v": "1_5_5b_i2v",
        "5b-i2v": "5b_i2v",
        "i2v": "5b_i2v",
    },
    "data": {
        **dict.fromkeys(("text", "txt"), "text_files"),
        **dict.fromkeys(("huggingface", "hub"), "dataset"),
        **dict.fromkeys(("tar", "wds", "web_dataset"), "webdataset"),
    },
    "optimizer": {
        "adamw_8bit": "adamw8bit",
        "adamw-8bit": "adamw8bit",
        "adam_8bit": "adam8bit",
        "schedulefree": "schedule_free",
    },
    "memory": {"high": "fast", "none": "fast", "null": "fast", "default": "fast"},
    "parallel": {"null": "single", "multi_gpu": "ddp", "distributed": "ddp"},
    "tracking": {"null": "none", "false": "none", "tb": "tensorboard", "wandb.ai": "wandb"},
}
