"""CLIP: both towers, their configuration and weights, the tokenizer and the captions."""
