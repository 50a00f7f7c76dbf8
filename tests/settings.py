"""Settings that many tests give their runs, and the order of the files."""

# Small and without videos: what a run costs where its result is not looked at.
QUICK = [
    "lora.rank=4",
    "lora.lora_alpha=2",
    "scheduler.lr_warmup_steps=2",
    "validation.num_validation_videos=0",
    "validation.scored_prompts=0",
    "validation.heldout_timesteps=2",
    "data.image_noise_variants=2",
]

# These take longest. Begun last, one of them would keep one process busy while the others wait.
LONG_FILES = [
    "end_to_end/test_sweeps.py",
    "training/test_speed.py",
    "end_to_end/test_run.py",
    "end_to_end/test_every_family.py",
    "options/test_optimizers.py",
    "kill/test_kill.py",
    "evaluation/test_evaluate.py",
    "end_to_end/test_quality.py",
    "plan/test_planner.py",
    "inference/test_pixels.py",
]
