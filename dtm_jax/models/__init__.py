"""Flax Linen modules; their parameters are plain nested dicts, the blocks of a tower stacked [L, ...]."""
