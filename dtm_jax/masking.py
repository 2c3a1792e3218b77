"""Draw the masks that hide patches from the student: block-wise or random, on the device, from keys.

A mask is True where a patch is hidden. Every mask hides exactly `num_masked` patches.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dtm_jax.arrays import Array, Bool, Int, Key, RandomKey
from dtm_jax.errors import OptionError, check_choice

ATTEMPTS = 10
"""Rectangles that are tried for one block before the generator gives up."""


def block_mask(
  key: RandomKey,
  grid: tuple[int, int],
  num_masked: int,
  min_patches: int = 16,
  max_patches: int | None = None,
  min_aspect: float = 0.3,
) -> Bool[Array, " N"]:
  """Hide `num_masked` patches with random rectangles, which may overlap.

  A block has area ~ U(`min_patches`, cap) and log aspect ~ U(log `min_aspect`, -log `min_aspect`). The cap is
  the number of patches that are still to be hidden, at most `max_patches`. A block is placed uniformly. It is
  accepted if it is lower and narrower than the grid and hides between 1 and cap new patches. After ten
  refusals in a row, random patches make up the number. Source: BEiT's block-wise masking, see docs/method.md.

  Args:
    grid: (rows, columns) of patches.
    max_patches: default num_masked.

  Raises:
    OptionError: `num_masked` is negative or exceeds the grid, or a limit of the blocks is out of range.
  """
  _check_num_masked(grid, num_masked)
  max_patches = num_masked if max_patches is None else max_patches
  if min_patches < 1 or max_patches < 0 or not 0 < min_aspect <= 1:
    raise OptionError(
      f"Blocks need min_patches >= 1, max_patches >= 0 and 0 < min_aspect <= 1, not {min_patches=},"
      f" {max_patches=}, {min_aspect=}."
    )

  def add_block(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    key, mask, _ = state
    key, block_key = jax.random.split(key)
    cap = jnp.minimum(num_masked - mask.sum(), max_patches)
    blocks = _propose_blocks(block_key, grid, cap, min_patches, min_aspect)
    new = (blocks & ~mask[None]).sum(axis=(1, 2))
    accepted = (new > 0) & (new <= cap)
    block = blocks[jnp.argmax(accepted)] & accepted.any()
    return key, mask | block, accepted.any()

  def unfinished(state: tuple[Array, Array, Array]) -> Array:
    _, mask, progress = state
    return progress & (mask.sum() < num_masked)

  blocks_key, rest_key = jax.random.split(key)
  start = blocks_key, jnp.zeros(grid, bool), jnp.bool_(True)
  _, mask, _ = jax.lax.while_loop(unfinished, add_block, start)
  return _make_up(rest_key, mask.reshape(-1), num_masked)


def _propose_blocks(
  key: RandomKey, grid: tuple[int, int], cap: Int[Array, ""], min_patches: int, min_aspect: float
) -> Bool[Array, "_ H W"]:
  """Draw ATTEMPTS rectangles. One that would be as high or as wide as the grid is empty."""
  rows, columns = jnp.arange(grid[0])[None, :, None], jnp.arange(grid[1])[None, None, :]
  keys = jax.random.split(key, 4)
  area = min_patches + (cap - min_patches) * jax.random.uniform(keys[0], (ATTEMPTS,))
  log_aspect = jnp.log(min_aspect) * jax.random.uniform(keys[1], (ATTEMPTS,), minval=-1.0)
  height = jnp.round(jnp.sqrt(area * jnp.exp(log_aspect))).astype(jnp.int32)
  width = jnp.round(jnp.sqrt(area / jnp.exp(log_aspect))).astype(jnp.int32)
  fits = (height < grid[0]) & (width < grid[1])
  top = jax.random.randint(keys[2], (ATTEMPTS,), 0, jnp.maximum(grid[0] - height + 1, 1))
  left = jax.random.randint(keys[3], (ATTEMPTS,), 0, jnp.maximum(grid[1] - width + 1, 1))
  top, left, height, width, fits = (x[:, None, None] for x in (top, left, height, width, fits))
  return fits & (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)


def random_mask(key: RandomKey, grid: tuple[int, int], num_masked: int) -> Bool[Array, " N"]:
  """Hide `num_masked` patches, which are drawn uniformly without replacement.

  Raises:
    OptionError: `num_masked` is negative or exceeds the grid.
  """
  _check_num_masked(grid, num_masked)
  return _make_up(key, jnp.zeros(grid[0] * grid[1], bool), num_masked)


MASKS = {"block": block_mask, "random": random_mask}


def counts(
  grid: tuple[int, int],
  *,
  num_masked: int | None = None,
  share: int | float | None = None,
  min_patches: int | None = None,
  min_block: int | float | None = None,
) -> dict[str, int]:
  """Return "num_masked" and, if it is given, "min_patches" for a grid of N patches.

  For example, a `share` of 75/196 hides 75 patches of a 14x14 grid and 6 patches of a 4x4 grid.

  Args:
    grid: (rows, columns) of patches.
    num_masked: number of hidden patches; it wins over `share`.
    share: hidden share of the N patches, rounded to a number.
    min_patches: smallest area of a block, in patches; it wins over `min_block`.
    min_block: smallest area of a block as a share of N, rounded, at least one patch.

  Raises:
    OptionError: neither `num_masked` nor `share` is given.
  """
  num_patches = grid[0] * grid[1]
  if num_masked is None:
    if share is None:
      raise OptionError(
        "mask.share is missing. Set it to the hidden share of an image, or set mask.num_masked to a number."
      )
    num_masked = round(share * num_patches)
  if min_patches is None and min_block is not None:
    min_patches = max(round(min_block * num_patches), 1)
  return {"num_masked": num_masked} | ({} if min_patches is None else {"min_patches": min_patches})


def masks(
  kind: str,
  keys_B: Key[Array, " B"],
  grid: tuple[int, int],
  num_masked: int | None = None,
  *,
  share: int | float | None = None,
  min_patches: int | None = None,
  min_block: int | float | None = None,
  **options,
) -> Bool[Array, "B N"]:
  """Draw one mask for each key.

  If a mesh is set, every device draws the masks of its own images without communication. One loop over all
  images would synchronise the devices after every block, to ask whether any image is unfinished.

  Args:
    kind: a key of MASKS.
    grid: (rows, columns) of patches.
    num_masked, share, min_patches, min_block: see `counts`.
    options: the other arguments of MASKS[kind]; None means its default.

  Raises:
    OptionError: the kind is unknown, or MASKS[kind] refuses an argument.
  """
  check_choice("mask", kind, MASKS)
  options = {name: value for name, value in options.items() if value is not None}
  options |= counts(grid, num_masked=num_masked, share=share, min_patches=min_patches, min_block=min_block)
  draw = jax.vmap(lambda key: MASKS[kind](key, grid, **options))
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return draw(keys_B)
  rows = P(mesh.axis_names)
  # check_vma would refuse the while loop, because its start is the same on every device.
  return jax.shard_map(draw, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(keys_B)


def _make_up(key: RandomKey, mask_N: Bool[Array, " N"], num_masked: int) -> Bool[Array, " N"]:
  """Add random patches to the mask, or remove some, until it hides `num_masked` patches."""
  priority_N = mask_N + jax.random.uniform(key, mask_N.shape)
  rank_N = jnp.argsort(jnp.argsort(-priority_N))
  return rank_N < num_masked


def _check_num_masked(grid: tuple[int, int], num_masked: int) -> None:
  if not 0 <= num_masked <= grid[0] * grid[1]:
    raise OptionError(f"Cannot hide {num_masked=} of the {grid[0] * grid[1]} patches of a {grid} grid.")
