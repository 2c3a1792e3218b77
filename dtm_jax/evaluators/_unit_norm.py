"""Scales vectors to unit length."""

import numpy as np

from dtm_jax.arrays import Array, Float


def unit_norm(x: Float[Array | np.ndarray, "*B C"]) -> Float[Array | np.ndarray, "*B C"]:
  """Return x / |x| along the last axis, in the precision of x. Vectors of zeros stay zeros."""
  return x / ((x**2).sum(axis=-1, keepdims=True) ** 0.5).clip(1e-12)
