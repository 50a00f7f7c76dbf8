"""Fine-tune CogVideoX from a folder of captioned clips."""
