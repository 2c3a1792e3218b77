"""Frozen vision transformers as teachers: SigLIP, DINOv2, MAE and the plain vision transformer."""
