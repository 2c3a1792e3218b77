"""CLIP's table of position embeddings for another grid of patches."""

import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dtm_jax.arrays import Array, Float


def resize_positions(table: Float[Array, "M D"], grid: tuple[int, int]) -> Float[Array, "T D"]:
  """The position table [1 + g², D] for another grid of patches; the row of CLS stays.

  Bicubic (Keys, a = -0.75, clamped at the border), output o of h sampled at
  (o + 0.5) g / (h + 0.1) - 0.5. The 0.1 is what the released implementation of the paper does, lest
  a rounded scale factor give one patch too few.
  """
  side = math.isqrt(table.shape[0] - 1)
  if grid == (side, side):
    return table
  rows, columns = (jnp.asarray(_bicubic(side, size), table.dtype) for size in grid)
  square = rearrange(table[1:], "(y x) d -> y x d", y=side)
  resized = jnp.einsum("ry,cx,yxd->rcd", rows, columns, square)
  return jnp.concatenate([table[:1], rearrange(resized, "r c d -> (r c) d")])


def _bicubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
  """The [new, old] matrix that resamples one axis."""
  centre = (np.arange(new) + 0.5) * old / (new + 0.1) - 0.5
  taps = np.floor(centre)[:, None] + np.arange(-1, 3)[None, :]
  distance = np.abs(centre[:, None] - taps)
  near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
  far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
  weights = np.where(distance <= 1, near, far)
  matrix = np.zeros((new, old))
  np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)), weights)
  return matrix
