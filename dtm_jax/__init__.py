"""Dynamic Token Morphing: pre-training of vision transformers with frozen teachers, in JAX."""

__version__ = "0.1.0"
