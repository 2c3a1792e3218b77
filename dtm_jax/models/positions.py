"""Resize learned positions to another grid of patches: position embeddings and relative position biases.

Every resize is a product with two matrices, one for each axis of the grid.
"""

import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dtm_jax.arrays import Array, Float
from dtm_jax.errors import check_choice

BIAS_RESIZES = ("geometric", "bicubic")


def resize_positions(
  table: Float[Array, "rows D"], grid: tuple[int, int], *, slack: float = 0.1
) -> Float[Array, "new_rows D"]:
  """Resize a position table [1 + g², D] to a grid of h x w patches. The first row, of CLS, stays the same.

  Interpolates bicubically (Keys, a = -0.75, clamped at the border). Output o of h rows is sampled at
  (o + 0.5) g / (h + slack) - 0.5. With slack = 0 the borders of both grids coincide. CLIP's towers use 0.1,
  as the paper's released code does, so that a rounded scale factor never loses a patch (docs/method.md).
  """
  side = math.isqrt(table.shape[0] - 1)
  if grid == (side, side):
    return table
  rows, columns = (jnp.asarray(_bicubic(side, size, slack), table.dtype) for size in grid)
  square = rearrange(table[1:], "(y x) d -> y x d", y=side)
  resized = jnp.einsum("ry,cx,yxd->rcd", rows, columns, square)
  return jnp.concatenate([table[:1], rearrange(resized, "r c d -> (r c) d")])


def square_grid(*, table_rows: int | None = None, num_positions: int | None = None) -> tuple[int, int]:
  """Return the grid (g, g) of (2g-1)² + 3 relative position biases, or of 1 + g² position embeddings.

  Args:
    table_rows: number of rows of a table of relative position biases.
    num_positions: number of position embeddings, used if `table_rows` is None.

  Raises:
    ValueError: no square grid has this number.
  """
  if table_rows is not None:
    rows = table_rows
    side = (math.isqrt(rows - 3) + 1) // 2
    square = (2 * side - 1) ** 2 + 3 == rows
  elif num_positions is not None:
    rows = num_positions
    side = math.isqrt(rows - 1)
    square = side**2 + 1 == rows
  else:
    raise ValueError("Give table_rows or num_positions.")
  if not square:
    raise ValueError(f"{rows} rows are not of a square grid of patches: give the grid.")
  return side, side


def resize_bias_table(
  table: Float[np.ndarray, "*L rows A"],
  old_grid: tuple[int, int],
  grid: tuple[int, int],
  *,
  method: str = "geometric",
) -> Float[np.ndarray, "*L new_rows A"]:
  """Resize tables of relative position biases [(2r-1)(2c-1) + 3, A] to another grid, on the host.

  The last three rows, which involve CLS, stay the same.

  Args:
    old_grid, grid: (rows r, columns c) of patches before and after.
    method: "geometric" interpolates with a cubic spline between offsets that are denser near zero, so the
      biases of near neighbours keep their distance in patches. An old grid of g patches a side has offsets up
      to n = g-1. Its offset k is placed at 1 + q + ... + q^(k-1), with the q in (1.01, 1.5) that places
      offset n at g'-1 for the new g'. BEiT and the paper's released code use it. "bicubic" stretches the
      table evenly.

  Raises:
    OptionError: the method is unknown.
    ValueError: the table does not belong to the old grid.
  """
  check_choice("method", method, BIAS_RESIZES)
  old_rows, old_columns = (2 * size - 1 for size in old_grid)
  if table.shape[-2] != old_rows * old_columns + 3:
    raise ValueError(
      f"A table of {table.shape[-2]} rows does not fit grid {old_grid}: {old_rows * old_columns + 3} rows."
    )
  if grid == old_grid:
    return table
  resample = _geometric if method == "geometric" else _bicubic
  rows, columns = (resample(2 * old - 1, 2 * new - 1) for old, new in zip(old_grid, grid, strict=True))
  offsets = rearrange(table[..., :-3, :], "... (y x) a -> ... y x a", y=old_rows)
  resized = np.einsum("ry,cx,...yxa->...rca", rows, columns, offsets, optimize=True).astype(table.dtype)
  return np.concatenate([rearrange(resized, "... r c a -> ... (r c) a"), table[..., -3:, :]], axis=-2)


def _bicubic(old: int, new: int, slack: float = 0.0, a: float = -0.75) -> np.ndarray:
  """Return the [new, old] matrix that resamples one axis by Keys' bicubic kernel."""
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
  """Return the [new, old] matrix of a cubic spline through geometric offsets, sampled at whole offsets."""
  if old == new:
    return np.eye(old)
  from scipy.interpolate import make_interp_spline  # takes a third of a second, and only new grids need it

  places = geometric_offsets(old // 2, new // 2)
  spline = make_interp_spline(places, np.eye(old), k=3)
  return spline(np.clip(np.arange(new) - new // 2, places[0], places[-1]))


def geometric_offsets(count: int, reach: int) -> Float[np.ndarray, " offsets"]:
  """Return the offsets -d_n..0..d_n with d_k = 1 + q + ... + q^(k-1), where n is `count`.

  Chooses q in (1.01, 1.5) such that d_n = `reach`. If no such q exists, takes the nearer end of the range, so
  a smaller grid cuts the table off.
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
