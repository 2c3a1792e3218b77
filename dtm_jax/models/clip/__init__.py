"""CLIP: both towers, tokenizer, prompts, config and weights."""
