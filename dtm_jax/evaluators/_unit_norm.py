"""Scales vectors to unit length."""

from typing import TypeVar

import numpy as np

from dtm_jax.arrays import Array, Float

Vectors = TypeVar("Vectors", Array, np.ndarray, Array | np.ndarray)


def unit_norm(x: Float[Vectors, "*B C"]) -> Float[Vectors, "*B C"]:
  """Return x / |x| along the last axis, in the precision of x. Vectors of zeros stay zeros."""
  return x / ((x**2).sum(axis=-1, keepdims=True) ** 0.5).clip(1e-12)
