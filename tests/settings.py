"""Settings that many tests give their runs."""

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
