"""Learned positions for another grid of patches: position embeddings, and tables of relative biases.

Every resize is a pair of matrices, one for each axis of the grid.
"""

import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from scipy.interpolate import make_interp_spline

from dtm_jax.arrays import Array, Float

BIAS_RESIZES = ("geometric", "bicubic")


def resize_positions(
  table: Float[Array, "M D"], grid: tuple[int, int], *, slack: float = 0.1
) -> Float[Array, "T D"]:
  """The position table [1 + g², D] for another grid of patches; the row of CLS stays.

  Bicubic (Keys, a = -0.75, clamped at the border), output o of h sampled at
  (o + 0.5) g / (h + slack) - 0.5. For CLIP, the released implementation of the paper has a slack of 0.1,
  lest a rounded scale factor give one patch too few; without slack the pixels' halves fit.
  """
  side = math.isqrt(table.shape[0] - 1)
  if grid == (side, side):
    return table
  rows, columns = (jnp.asarray(_bicubic(side, size, slack), table.dtype) for size in grid)
  square = rearrange(table[1:], "(y x) d -> y x d", y=side)
  resized = jnp.einsum("ry,cx,yxd->rcd", rows, columns, square)
  return jnp.concatenate([table[:1], rearrange(resized, "r c d -> (r c) d")])


def square_grid(*, table_rows: int | None = None, num_positions: int | None = None) -> tuple[int, int]:
  """(g, g) from the (2g-1)² + 3 rows of a table of relative biases, or from 1 + g² positions.

  Raises:
    ValueError: they are not of a square grid.
  """
  if table_rows is not None:
    side = (math.isqrt(table_rows - 3) + 1) // 2
    square = (2 * side - 1) ** 2 + 3 == table_rows
  else:
    side = math.isqrt(num_positions - 1)
    square = side**2 + 1 == num_positions
  if not square:
    raise ValueError(
      f"{table_rows or num_positions} rows are not of a square grid of patches: give the grid."
    )
  return side, side


def resize_bias_table(
  table: Float[np.ndarray, "*L M A"],
  old_grid: tuple[int, int],
  grid: tuple[int, int],
  *,
  method: str = "geometric",
) -> Float[np.ndarray, "*L T A"]:
  """Tables of relative position biases [(2r-1)(2c-1) + 3, A] for another grid of patches, on the host.

  The three last rows, which involve CLS, stay. "geometric" interpolates by a cubic spline between offsets
  that lie closer together near zero: where the n = g-1 offsets of the old grid shall reach the n' = g'-1 of
  the new one, offset k is taken to be 1 + q + ... + q^(k-1), with q in (1.01, 1.5) such that offset n is n'.
  So the biases of near neighbours keep their distance in patches. (BEiT's scheme, and the released code's.)
  "bicubic" stretches the table evenly.

  Raises:
    ValueError: an unknown method, or a table that is not of the old grid.
  """
  if method not in BIAS_RESIZES:
    raise ValueError(f"Unknown method {method!r}. Available: {', '.join(BIAS_RESIZES)}.")
  old_rows, old_columns = (2 * size - 1 for size in old_grid)
  if table.shape[-2] != old_rows * old_columns + 3:
    raise ValueError(
      f"A table of {table.shape[-2]} rows is not of the grid {old_grid}: {old_rows * old_columns + 3} rows."
    )
  if grid == old_grid:
    return table
  resample = _geometric if method == "geometric" else _bicubic
  rows, columns = (resample(2 * old - 1, 2 * new - 1) for old, new in zip(old_grid, grid, strict=True))
  offsets = rearrange(table[..., :-3, :], "... (y x) a -> ... y x a", y=old_rows)
  resized = np.einsum("ry,cx,...yxa->...rca", rows, columns, offsets, optimize=True).astype(table.dtype)
  return np.concatenate([rearrange(resized, "... r c a -> ... (r c) a"), table[..., -3:, :]], axis=-2)


def _bicubic(old: int, new: int, slack: float = 0.0, a: float = -0.75) -> np.ndarray:
  """The [new, old] matrix that resamples one axis."""
  centre = (np.arange(new) + 0.5) * old / (new + slack) - 0.5
  taps = np.floor(centre)[:, None] + np.arange(-1, 3)[None, :]
  distance = np.abs(centre[:, None] - taps)
  near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
  far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
  weights = np.where(distance <= 1, near, far)
  matrix = np.zeros((new, old))
  np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)), weights)
  return matrix


def _geometric(old: int, new: int) -> np.ndarray:
  """The [new, old] matrix of an interpolating cubic spline from geometric to whole offsets."""
  if old == new:
    return np.eye(old)
  places = geometric_offsets(old // 2, new // 2)
  spline = make_interp_spline(places, np.eye(old), k=3)
  return spline(np.clip(np.arange(new) - new // 2, places[0], places[-1]))


def geometric_offsets(count: int, reach: int) -> Float[np.ndarray, " M"]:
  """-d_n..0..d_n with d_k = 1 + q + ... + q^(k-1), n = `count`, and q in (1.01, 1.5) such that d_n = `reach`.

  Where no such q exists, the nearer end of the range is taken: a smaller grid cuts the table off.
  """
  low, high = 1.01, 1.5
  while high - low > 1e-6:
    ratio = (low + high) / 2
    if (1 - ratio**count) / (1 - ratio) > reach:
      high = ratio
    else:
      low = ratio
  positive = np.cumsum(ratio ** np.arange(count))
  return np.concatenate([-positive[::-1], [0.0], positive])
