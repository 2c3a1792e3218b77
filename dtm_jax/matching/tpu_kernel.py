"""Compute the rounds of matching in one Pallas kernel for TPUs, with the Gram matrix kept on the chip.

The rounds compare tokens by their inner products only. The inner products of merged tokens are sums of rows
and columns of the previous ones. So one program per image reads G = V Vᵀ once and writes one slot per token.
G is [Z, Z], where Z is N padded to whole lanes: 196 tokens take 256 KB of a core's 16 MB or more of VMEM. In
the plain rounds, features [N, C] and similarities pass through the main memory between two rounds.

The kernel has no sort and no gather, because a TPU is slow at both. A rank is a count of comparisons, and a
move is a product with a one-hot matrix. Small whole numbers are stored as float32, which is exact and which
Mosaic reduces best. x_Z1 is a column and x_1Z a row of the same numbers.

`gpu_kernel.py` is the kernel for GPUs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dtm_jax.arrays import Array, Float, Int
from dtm_jax.matching import gram
from dtm_jax.matching.kernels import FAR, TINY, Ref
from dtm_jax.matching.rounds import HIGHEST, NO_DIRECTION, Rules

LANES = 128


def match_rounds(
  target_BNC: Float[Array, "B N C"],
  merges_BK: Int[Array, "B K"],
  order_BKN: Float[Array, "B K N"] | None,
  rules: Rules,
  *,
  interpret: bool = False,
) -> Int[Array, "B N"]:
  """Compute `rounds.match_rounds` with the kernel. `interpret` runs it without a TPU: slowly, for tests."""
  batch_size, num_tokens, _ = target_BNC.shape
  max_rounds = merges_BK.shape[1]
  padding = -num_tokens % LANES
  padded = num_tokens + padding
  gram_BZZ = jnp.pad(gram.gram_matrix(target_BNC), ((0, 0), (0, padding), (0, padding)))
  if order_BKN is None:  # keep the live order
    order_BKN = jnp.broadcast_to(
      jnp.arange(num_tokens, dtype=jnp.float32), (batch_size, max_rounds, num_tokens)
    )
  order_BKZ = jnp.pad(order_BKN, ((0, 0), (0, 0), (0, padding)))

  one_image = lambda *shape: pl.BlockSpec((1, *shape), lambda b: (b, 0, 0))
  slot_B1Z = pl.pallas_call(
    functools.partial(_match_image, num_tokens, rules),
    grid=(batch_size,),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      one_image(padded, padded),
      one_image(max_rounds, padded),
    ],
    out_specs=one_image(1, padded),
    out_shape=jax.ShapeDtypeStruct((batch_size, 1, padded), jnp.float32),
    scratch_shapes=[pltpu.VMEM((padded, padded), jnp.float32)],
    interpret=interpret,
  )(merges_BK.astype(jnp.int32), gram_BZZ, order_BKZ)
  return slot_B1Z[:, 0, :num_tokens].astype(jnp.int32)


def _match_image(
  num_tokens: int, rules: Rules, merges_ref: Ref, gram_ref: Ref, order_ref: Ref, slot_ref: Ref, live_ref: Ref
) -> None:
  """Compute all rounds of one image. `live_ref` holds the Gram matrix of the live slots."""
  max_rounds, padded = order_ref.shape[1:]
  slot_ZZ = _index((padded, padded), 0).astype(jnp.float32)
  image = pl.program_id(0)
  live_ref[:] = gram_ref[0]

  def one_round(p: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    slot_1Z, count = carry
    num_merges = jnp.minimum(merges_ref[image, p], (count - rules.protect_first) >> 1)
    place_Z1 = _places(_column(order_ref[0, pl.ds(p, 1), :]), count, rules.protect_first)
    to_Z1 = _pair(live_ref[:], place_Z1, count, num_merges, rules.protect_first)

    into_ZZ = _number(slot_ZZ == _row(to_Z1))
    if rules.merged_feature == "mean_of_means":
      into_ZZ /= jnp.maximum(into_ZZ.sum(axis=1, keepdims=True), 1.0)
    moved_ZZ = jnp.dot(into_ZZ, live_ref[:], precision=HIGHEST)
    live_ref[:] = jnp.dot(moved_ZZ, into_ZZ.T, precision=HIGHEST)
    slot_1Z = jnp.sum(jnp.where(slot_ZZ == slot_1Z, to_Z1, 0.0), axis=0, keepdims=True)
    return slot_1Z, count - num_merges

  slot_1Z = _index((1, padded), 1).astype(jnp.float32)
  slot_ref[0], _ = jax.lax.fori_loop(0, max_rounds, one_round, (slot_1Z, jnp.int32(num_tokens)))


def _places(order_Z1: Array, count: Array, protect_first: bool) -> Array:
  """Return the place of each live slot in the order of this round, and FAR for the other slots."""
  slot_Z1 = _index(order_Z1.shape, 0)
  if protect_first:
    order_Z1 = jnp.where(slot_Z1 == 0, -1.0, order_Z1)
  order_Z1 = jnp.where(slot_Z1 < count, order_Z1, FAR)
  return jnp.where(slot_Z1 < count, _rank(order_Z1, slot_Z1.astype(jnp.float32)), FAR)


def _pair(gram_ZZ: Array, place_Z1: Array, count: Array, num_merges: Array, protect_first: bool) -> Array:
  """Return the next slot of each slot, as `rounds.pair`. The parity of its place puts a slot in its set."""
  live_Z1 = place_Z1 < FAR
  in_first_Z1 = live_Z1 & (place_Z1 - 2.0 * jnp.floor(place_Z1 / 2.0) == 0.0)
  seeks_Z1 = in_first_Z1 & (place_Z1 > 0.0) if protect_first else in_first_Z1
  place_1Z, merges_all = _row(place_Z1), num_merges.astype(jnp.float32)

  square_Z1 = jnp.sum(jnp.where(_diagonal(gram_ZZ), gram_ZZ, 0.0), axis=1, keepdims=True)
  scale_Z1 = jnp.where(square_Z1 > 0.0, 1.0 / jnp.sqrt(jnp.maximum(square_Z1, TINY)), 0.0)
  scale_ZZ = scale_Z1 * _row(scale_Z1)
  sim_ZZ = jnp.where(scale_ZZ > 0.0, gram_ZZ * scale_ZZ, NO_DIRECTION)
  pairs_ZZ = _number(seeks_Z1) * _row(_number(live_Z1 & ~in_first_Z1))
  sim_ZZ = jnp.where(pairs_ZZ > 0.0, sim_ZZ, -FAR)

  value_Z1 = jnp.max(sim_ZZ, axis=1, keepdims=True)
  best_Z1 = jnp.min(jnp.where(sim_ZZ == value_Z1, place_1Z, FAR), axis=1, keepdims=True)
  rank_Z1 = _rank(-value_Z1, place_Z1)
  merges_Z1 = seeks_Z1 & (rank_Z1 < merges_all)

  num_left = (((count + 1) >> 1) - num_merges).astype(jnp.float32)
  left_Z1 = rank_Z1 - merges_all
  if protect_first:
    stays_1Z = _row(_number(in_first_Z1 & ~merges_Z1))
    left_Z1 = jnp.sum(jnp.where(place_1Z < place_Z1, stays_1Z, 0.0), axis=1, keepdims=True)
  counterpart_Z1 = jnp.where(merges_Z1, best_Z1, place_Z1)
  to_Z1 = jnp.where(in_first_Z1 & ~merges_Z1, left_Z1, num_left + (counterpart_Z1 - 1.0) / 2.0)
  return jnp.where(live_Z1 & (num_merges > 0), to_Z1, place_Z1)


def _rank(x_Z1: Array, tie_Z1: Array) -> Array:
  """Return how many values are smaller, or equal with a smaller tie."""
  x_1Z, tie_1Z = _row(x_Z1), _row(tie_Z1)
  ahead_ZZ = jnp.where(x_1Z == x_Z1, _number(tie_1Z < tie_Z1), _number(x_1Z < x_Z1))
  return jnp.sum(ahead_ZZ, axis=1, keepdims=True)


def _column(x_1Z: Array) -> Array:
  """Return a row as a column, exactly, through a diagonal."""
  x_ZZ = jnp.broadcast_to(x_1Z, (x_1Z.size, x_1Z.size))
  return jnp.sum(jnp.where(_diagonal(x_ZZ), x_ZZ, 0.0), axis=1, keepdims=True)


def _row(x_Z1: Array) -> Array:
  """Return a column as a row, exactly, through a diagonal."""
  x_ZZ = jnp.broadcast_to(x_Z1, (x_Z1.size, x_Z1.size))
  return jnp.sum(jnp.where(_diagonal(x_ZZ), x_ZZ, 0.0), axis=0, keepdims=True)


def _diagonal(x_ZZ: Array) -> Array:
  return _index(x_ZZ.shape, 0) == _index(x_ZZ.shape, 1)


def _index(shape: tuple[int, ...], axis: int) -> Array:
  """Return the index of each row (axis 0) or column (axis 1)."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _number(condition: Array) -> Array:
  return jnp.where(condition, 1.0, 0.0)
