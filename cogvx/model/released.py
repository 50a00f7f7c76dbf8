"""The five released models, as their transformer/ and vae/ config.json describe them.   [no torch]

This is what must be known before a model is on this machine. Keys that are left out have the
defaults of the diffusers classes.

Source: huggingface.co/zai-org/CogVideoX-2b, -5b, -5b-I2V, CogVideoX1.5-5B, -5B-I2V (THUDM/
redirects there).
"""

TRANSFORMER_2B = {
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "num_layers": 30,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "max_text_seq_length": 226,
    "patch_size": 2,
    "patch_size_t": None,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "temporal_compression_ratio": 4,
    "spatial_interpolation_scale": 1.875,
    "temporal_interpolation_scale": 1.0,
    "ofs_embed_dim": None,
    "patch_bias": True,
    "use_rotary_positional_embeddings": False,
    "use_learned_positional_embeddings": False,
}
TRANSFORMER_5B = TRANSFORMER_2B | {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
TRANSFORMER_5B_I2V = TRANSFORMER_5B | {
    "in_channels": 32,
    "use_learned_positional_embeddings": True,
}
TRANSFORMER_1_5 = TRANSFORMER_5B | {
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_frames": 81,
    "sample_height": 300,
    "sample_width": 300,
}
TRANSFORMER_1_5_I2V = TRANSFORMER_1_5 | {"in_channels": 32, "ofs_embed_dim": 512}
VAE_2B = {
    "block_out_channels": [128, 256, 256, 512],
    "layers_per_block": 3,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "temporal_compression_ratio": 4,
    "sample_height": 480,
    "sample_width": 720,
    "scaling_factor": 1.15258426,
    "invert_scale_latents": False,
}
VAE_5B = VAE_2B | {"scaling_factor": 0.7}
VAE_1_5_I2V = VAE_5B | {"invert_scale_latents": True}

# By option of conf/model/: transformer, VAE, SNR shift of the noise schedule, stored dtype.
RELEASED = {
    "2b": (TRANSFORMER_2B, VAE_2B, 3.0, "F16"),
    "5b": (TRANSFORMER_5B, VAE_5B, 1.0, "BF16"),
    "5b_i2v": (TRANSFORMER_5B_I2V, VAE_5B, 1.0, "BF16"),
    "1_5_5b": (TRANSFORMER_1_5, VAE_5B, 1.0, "BF16"),
    "1_5_5b_i2v": (TRANSFORMER_1_5_I2V, VAE_1_5_I2V, 1.0, "BF16"),
}
NAMES = {
    "CogVideoX-2b": "2b",
    "CogVideoX-5b": "5b",
    "CogVideoX-5b-I2V": "5b_i2v",
    "CogVideoX1.5-5B": "1_5_5b",
    "CogVideoX1.5-5B-I2V": "1_5_5b_i2v",
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "clip_sample": False,
}
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
    "tie_word_embeddings": False,
}
