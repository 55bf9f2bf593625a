"""raytune_ds: fine-tunes DeepSeek-family models on Ray."""
