"""The rounds of matching as one Pallas kernel for TPUs: an image's Gram matrix never leaves the chip.

The rounds compare tokens by their inner products alone, and those of merged tokens are sums of rows and
columns of those before. So one program an image reads G = V Vᵀ once, [M, M] with M = N padded to a whole
number of lanes (196 tokens: 256 KB of a core's 16 MB or more of VMEM), and writes one slot a token. Between
the rounds of `morphing.match_rounds`, features [N, C] and similarities go through the main memory.

There is no sort and no gather, which a TPU does badly: a rank is a count of comparisons, a move a product
with a one-hot matrix. Small whole numbers are kept as float32, which is exact and what Mosaic reduces best.
x_M1 is a column and x_1M a row of the same numbers.

A GPU has no kernel here: beside the two operands of a product, G and its successor ask for more than the
228 KB of shared memory that an H100 has. Where there is no TPU the plain rounds run.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dtm_jax import morphing
from dtm_jax.arrays import Array, Float, Int

LANES = 128
FAR = 1e9
"""A place, or an order, behind all others; -FAR, a similarity below all others."""
TINY = 1e-38


def match_rounds(
  target_BNC: Float[Array, "B N C"],
  merges_BK: Int[Array, "B K"],
  order_BKN: Float[Array, "B K N"] | None,
  *,
  protect_first: bool,
  merged_feature: str,
) -> Int[Array, "B N"]:
  """`morphing.match_rounds`: by the kernel where this is compiled for a TPU, else by the plain rounds.

  Rounding differs, and with it groups whose similarities differ by some 1e-7.
  """
  options = dict(protect_first=protect_first, merged_feature=merged_feature)
  return jax.lax.platform_dependent(
    target_BNC, merges_BK, order_BKN,
    tpu=functools.partial(kernel_rounds, **options),
    default=functools.partial(morphing.match_rounds, **options),
  )  # fmt: skip


def kernel_rounds(
  target_BNC: Float[Array, "B N C"],
  merges_BK: Int[Array, "B K"],
  order_BKN: Float[Array, "B K N"] | None,
  *,
  protect_first: bool,
  merged_feature: str,
  interpret: bool = False,
) -> Int[Array, "B N"]:
  """The kernel itself. `interpret` runs it without a TPU, slowly, to test it."""
  batch_size, num_tokens, _ = target_BNC.shape
  max_rounds = merges_BK.shape[1]
  padding = -num_tokens % LANES
  size = num_tokens + padding
  gram_BNN = jnp.einsum("bnc,bmc->bnm", target_BNC, target_BNC, precision=morphing.HIGHEST)
  gram_BMM = jnp.pad(gram_BNN, ((0, 0), (0, padding), (0, padding)))
  if order_BKN is None:  # then the live order stands as it is
    order_BKN = jnp.broadcast_to(
      jnp.arange(num_tokens, dtype=jnp.float32), (batch_size, max_rounds, num_tokens)
    )
  order_BKM = jnp.pad(order_BKN, ((0, 0), (0, 0), (0, padding)))

  one_image = lambda *shape: pl.BlockSpec((1, *shape), lambda b: (b, 0, 0))
  slot_B1M = pl.pallas_call(
    functools.partial(_rounds, num_tokens, protect_first, merged_feature),
    grid=(batch_size,),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), one_image(size, size), one_image(max_rounds, size)],
    out_specs=one_image(1, size),
    out_shape=jax.ShapeDtypeStruct((batch_size, 1, size), jnp.float32),
    scratch_shapes=[pltpu.VMEM((size, size), jnp.float32)],
    interpret=interpret,
  )(merges_BK.astype(jnp.int32), gram_BMM, order_BKM)
  return slot_B1M[:, 0, :num_tokens].astype(jnp.int32)


def _rounds(
  num_tokens: int,
  protect_first: bool,
  merged_feature: str,
  merges_ref,
  gram_ref,
  order_ref,
  slot_ref,
  live_ref,
) -> None:
  """One image: `live_ref` holds the Gram matrix of the live slots."""
  max_rounds, size = order_ref.shape[1:]
  slot_MM = _index((size, size), 0).astype(jnp.float32)
  image = pl.program_id(0)
  live_ref[:] = gram_ref[0]

  def round_(p: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    slot_1M, count = carry
    num_merges = jnp.minimum(merges_ref[image, p], (count - protect_first) >> 1)
    place_M1 = _places(_column(order_ref[0, pl.ds(p, 1), :]), count, protect_first)
    to_M1 = _pair(live_ref[:], place_M1, count, num_merges, protect_first)

    into_MM = _number(slot_MM == _row(to_M1))
    if merged_feature == "mean_of_means":
      into_MM /= jnp.maximum(into_MM.sum(axis=1, keepdims=True), 1.0)
    moved_MM = jnp.dot(into_MM, live_ref[:], precision=morphing.HIGHEST)
    live_ref[:] = jnp.dot(moved_MM, into_MM.T, precision=morphing.HIGHEST)
    slot_1M = jnp.sum(jnp.where(slot_MM == slot_1M, to_M1, 0.0), axis=0, keepdims=True)
    return slot_1M, count - num_merges

  slot_1M = _index((1, size), 1).astype(jnp.float32)
  slot_ref[0], _ = jax.lax.fori_loop(0, max_rounds, round_, (slot_1M, jnp.int32(num_tokens)))


def _places(order_M1: Array, count: Array, protect_first: bool) -> Array:
  """Each live slot's place in the order of this round; FAR for the others."""
  slot_M1 = _index(order_M1.shape, 0)
  if protect_first:
    order_M1 = jnp.where(slot_M1 == 0, -1.0, order_M1)
  order_M1 = jnp.where(slot_M1 < count, order_M1, FAR)
  return jnp.where(slot_M1 < count, _rank(order_M1, slot_M1.astype(jnp.float32)), FAR)


def _pair(gram_MM: Array, place_M1: Array, count: Array, num_merges: Array, protect_first: bool) -> Array:
  """Where each slot goes in this round: `morphing._pair`, the two sets told apart by the parity of places."""
  live_M1 = place_M1 < FAR
  in_first_M1 = live_M1 & (place_M1 - 2.0 * jnp.floor(place_M1 / 2.0) == 0.0)
  seeks_M1 = in_first_M1 & (place_M1 > 0.0) if protect_first else in_first_M1
  place_1M, merges_all = _row(place_M1), num_merges.astype(jnp.float32)

  square_M1 = jnp.sum(jnp.where(_diagonal(gram_MM), gram_MM, 0.0), axis=1, keepdims=True)
  scale_M1 = jnp.where(square_M1 > 0.0, 1.0 / jnp.sqrt(jnp.maximum(square_M1, TINY)), 0.0)
  scale_MM = scale_M1 * _row(scale_M1)
  sim_MM = jnp.where(scale_MM > 0.0, gram_MM * scale_MM, morphing.NO_DIRECTION)
  pairs_MM = _number(seeks_M1) * _row(_number(live_M1 & ~in_first_M1))
  sim_MM = jnp.where(pairs_MM > 0.0, sim_MM, -FAR)

  value_M1 = jnp.max(sim_MM, axis=1, keepdims=True)
  best_M1 = jnp.min(jnp.where(sim_MM == value_M1, place_1M, FAR), axis=1, keepdims=True)
  rank_M1 = _rank(-value_M1, place_M1)
  merges_M1 = seeks_M1 & (rank_M1 < merges_all)

  num_left = (((count + 1) >> 1) - num_merges).astype(jnp.float32)
  left_M1 = rank_M1 - merges_all
  if protect_first:
    stays_1M = _row(_number(in_first_M1 & ~merges_M1))
    left_M1 = jnp.sum(jnp.where(place_1M < place_M1, stays_1M, 0.0), axis=1, keepdims=True)
  counterpart_M1 = jnp.where(merges_M1, best_M1, place_M1)
  to_M1 = jnp.where(in_first_M1 & ~merges_M1, left_M1, num_left + (counterpart_M1 - 1.0) / 2.0)
  return jnp.where(live_M1 & (num_merges > 0), to_M1, place_M1)


def _rank(x_M1: Array, tie_M1: Array) -> Array:
  """How many are smaller, or equal with a smaller tie."""
  x_1M, tie_1M = _row(x_M1), _row(tie_M1)
  ahead_MM = jnp.where(x_1M == x_M1, _number(tie_1M < tie_M1), _number(x_1M < x_M1))
  return jnp.sum(ahead_MM, axis=1, keepdims=True)


def _column(x_1M: Array) -> Array:
  x_MM = jnp.broadcast_to(x_1M, (x_1M.size, x_1M.size))
  return jnp.sum(jnp.where(_diagonal(x_MM), x_MM, 0.0), axis=1, keepdims=True)


def _row(x_M1: Array) -> Array:
  """A column as a row, to the bit: through a diagonal."""
  x_MM = jnp.broadcast_to(x_M1, (x_M1.size, x_M1.size))
  return jnp.sum(jnp.where(_diagonal(x_MM), x_MM, 0.0), axis=0, keepdims=True)


def _diagonal(x_MM: Array) -> Array:
  return _index(x_MM.shape, 0) == _index(x_MM.shape, 1)


def _index(shape: tuple[int, int], axis: int) -> Array:
  """The number of each row (axis 0) or column."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _number(condition: Array) -> Array:
  return jnp.where(condition, 1.0, 0.0)
