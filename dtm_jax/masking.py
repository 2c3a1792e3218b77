"""Which patches the student does not see: block-wise and random masks, on the device, from a key.

A mask is True where a patch is hidden. Every mask of a kind hides exactly `num_masked` patches.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dtm_jax.arrays import Array, Bool, Key, RandomKey
from dtm_jax.errors import OptionError

ATTEMPTS = 10
"""How many rectangles are tried for one block before the generator gives up."""


def block_mask(
  key: RandomKey,
  grid: tuple[int, int],
  num_masked: int,
  min_patches: int = 16,
  max_patches: int | None = None,
  min_aspect: float = 0.3,
) -> Bool[Array, "N"]:
  """Rectangles of random area and aspect, one upon another, until `num_masked` patches are hidden.

  A block has area ~ U(`min_patches`, cap) and log aspect ~ U(log `min_aspect`, -log `min_aspect`), where cap
  is what is still to be hidden, `max_patches` at most. It is placed uniformly, and accepted where it is lower
  and narrower than the grid and hides between 1 and cap new patches. When ten in a row are refused, patches
  drawn at random make up the number. Source: BEiT's block-wise masking, as in the reference behaviour.

  Raises:
    ValueError: `num_masked` is negative or exceeds the grid, or a limit of the blocks makes no sense.
  """
  _check_num_masked(grid, num_masked)
  max_patches = num_masked if max_patches is None else max_patches
  if min_patches < 1 or max_patches < 0 or not 0 < min_aspect <= 1:
    raise OptionError(
      f"Blocks need min_patches >= 1, max_patches >= 0 and 0 < min_aspect <= 1, not {min_patches=},"
      f" {max_patches=}, {min_aspect=}."
    )
  rows, columns = jnp.arange(grid[0])[None, :, None], jnp.arange(grid[1])[None, None, :]

  def propose(key: Array, cap: Array) -> Array:
    """ATTEMPTS rectangles, [attempt, H, W]; empty where one would span the grid."""
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

  def add_block(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    key, mask, _ = state
    key, block_key = jax.random.split(key)
    cap = jnp.minimum(num_masked - mask.sum(), max_patches)
    blocks = propose(block_key, cap)
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


def random_mask(key: RandomKey, grid: tuple[int, int], num_masked: int) -> Bool[Array, "N"]:
  """`num_masked` patches drawn uniformly, without replacement.

  Raises:
    ValueError: `num_masked` is negative or exceeds the grid.
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
  """The number of hidden patches and the least patches of a block, of a grid of N patches.

  `share` and `min_block` are shares of N, rounded; `num_masked` and `min_patches` win over them. So 75/196
  hides 75 patches of a 14x14 grid, and 6 of a 4x4 one. What is not given is left to the kind of mask.

  Raises:
    OptionError: neither `num_masked` nor `share` is given.
  """
  num_patches = grid[0] * grid[1]
  if num_masked is None:
    if share is None:
      raise OptionError("mask.share is missing: how much of an image is hidden? mask.num_masked is a number.")
    num_masked = round(share * num_patches)
  if min_patches is None and min_block is not None:
    min_patches = max(round(min_block * num_patches), 1)
  return {"num_masked": num_masked} | ({} if min_patches is None else {"min_patches": min_patches})


def masks(
  kind: str,
  keys_B: Key[Array, "B"],
  grid: tuple[int, int],
  num_masked: int | None = None,
  *,
  share: int | float | None = None,
  min_patches: int | None = None,
  min_block: int | float | None = None,
  **options,
) -> Bool[Array, "B N"]:
  """Draw one mask for each key.

  How many patches are hidden is a number or a share, see `counts`; `options` are the others of the function
  MASKS[kind], of which None leaves one to its default.

  Where a mesh is set, every device makes its own rows of the masks by itself, with no word to the others; one
  loop over all rows would ask them after every block whether anyone is unfinished.

  Raises:
    ValueError: an unknown kind, or what that function refuses.
  """
  if kind not in MASKS:
    raise OptionError(f"Unknown mask {kind!r}. Available: {', '.join(MASKS)}.")
  options = {name: value for name, value in options.items() if value is not None}
  options |= counts(grid, num_masked=num_masked, share=share, min_patches=min_patches, min_block=min_block)
  draw = jax.vmap(lambda key: MASKS[kind](key, grid, **options))
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return draw(keys_B)
  rows = P(mesh.axis_names)
  # Unchecked, since the check refuses a loop whose start is the same for every device.
  return jax.shard_map(draw, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(keys_B)


def _make_up(key: Array, mask_N: Array, num_masked: int) -> Array:
  """The mask with random patches added or, were it too full, removed, so that it hides `num_masked`."""
  priority_N = mask_N + jax.random.uniform(key, mask_N.shape)
  rank_N = jnp.argsort(jnp.argsort(-priority_N))
  return rank_N < num_masked


def _check_num_masked(grid: tuple[int, int], num_masked: int) -> None:
  if not 0 <= num_masked <= grid[0] * grid[1]:
    raise OptionError(f"Cannot hide {num_masked=} of the {grid[0] * grid[1]} patches of a {grid} grid.")
