"""Frozen vision transformers as teachers: DINOv2, MAE, SigLIP, BEiT."""
