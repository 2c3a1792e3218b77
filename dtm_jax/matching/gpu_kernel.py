"""Compute the rounds of matching in one Pallas kernel for GPUs (Triton), on one Gram matrix per image.

The rounds compare tokens by their inner products only. One program per image and schedule copies the Gram
matrix G = V Vᵀ of its image and does all rounds on the copy. Nothing moves: a group keeps the row and the
column of one of its tokens. If row f joins row s, row f is added to row s and column f to column s. So a
merge touches 4 N numbers, and a round reads only the rows of its first set: at most N/2 rows of 4 N bytes.
The copy has 4 Z² bytes (256 KB at 196 tokens), which stay in the L2 cache while a program works on them.

Merges are added one after the other in a fixed order, so the result does not vary between runs. All numbers
are float32.

Z is N rounded up to a power of two, because Triton's arrays have such sizes; H = Z/2 is the size of a set. A
row is the index of the token that stands for a group, and a place is its position in the live order. Arrays
that lanes index freely live in memory and have 2Z entries: lanes without work write behind the first Z.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dtm_jax.arrays import Array, Float, Int
from dtm_jax.matching import gram
from dtm_jax.matching.kernels import FAR, TINY, Ref
from dtm_jax.matching.rounds import NO_DIRECTION, Rules, places

TILE = 16
"""Rows of the Gram matrix that a program compares at a time."""
LONGEST = 1024
"""The largest Z: one number of a row for each lane of a program. `gram.py` computes longer rows."""
WHOLE_NUMBERS = ("at", "second", "source", "target", "into", "best")
NUMBERS = ("scale", "value", "weight")


def match_rounds(
  target_BNC: Float[Array, "B N C"],
  merges_BK: Int[Array, "B K"],
  order_BKN: Float[Array, "B K N"] | None,
  rules: Rules,
  *,
  interpret: bool = False,
) -> Int[Array, "B N"]:
  """Compute `rounds.match_rounds` with the kernel. `interpret` runs it without a GPU: slowly, for tests.

  The two round differently, so groups can differ if similarities differ by about 1e-7.
  """
  batch_size, num_tokens, _ = target_BNC.shape
  padded = max(pl.next_power_of_2(num_tokens), 2 * TILE)
  if padded > LONGEST:
    return gram.match_rounds(target_BNC, merges_BK, order_BKN, rules)
  num_live_BK, merges_BK = jax.vmap(functools.partial(_live_counts, num_tokens, rules))(merges_BK)
  last_B1 = jnp.max(jnp.where(merges_BK > 0, jnp.arange(1, merges_BK.shape[1] + 1), 0), axis=1, keepdims=True)
  inputs = [last_B1, num_live_BK, merges_BK, gram.gram_matrix(target_BNC)]
  if order_BKN is not None:
    place = functools.partial(places, protect_first=rules.protect_first)
    to_BKN = jax.vmap(jax.vmap(place))(order_BKN, num_live_BK)
    rest = jnp.broadcast_to(jnp.arange(num_tokens, padded), (*to_BKN.shape[:2], padded - num_tokens))
    inputs.append(jnp.concatenate([to_BKN, rest], axis=2).astype(jnp.int32))

  one_image = lambda shape: pl.BlockSpec((None, *shape[1:]), lambda b: (b,) + (0,) * (len(shape) - 1))
  sizes = [((padded,), jnp.int32), ((padded, padded), jnp.float32)]
  sizes += [((2 * padded,), jnp.int32)] * len(WHOLE_NUMBERS) + [((2 * padded,), jnp.float32)] * len(NUMBERS)
  outputs = [jax.ShapeDtypeStruct((batch_size, *shape), dtype) for shape, dtype in sizes]
  row_BZ, *_ = pl.pallas_call(
    functools.partial(_match_image, rules, order_BKN is not None, interpret),
    grid=(batch_size,),
    in_specs=[one_image(x.shape) for x in inputs],
    out_specs=[one_image(x.shape) for x in outputs],
    out_shape=outputs,
    # One stage: Triton must not load before the stores of the previous iteration.
    compiler_params=plgpu.CompilerParams(num_warps=padded // 32, num_stages=1),
    interpret=interpret,
    name="match_rounds",
  )(*inputs)
  return row_BZ[:, :num_tokens]


def _live_counts(num_tokens: int, rules: Rules, merges_K: Array) -> tuple[Array, Array]:
  """Return the number of live tokens before each round, and what each round merges of them."""

  def one_round(count: Array, num_merges: Array) -> tuple[Array, tuple[Array, Array]]:
    num_merges = jnp.minimum(num_merges, (count - rules.protect_first) // 2)
    return count - num_merges, (count, num_merges)

  return jax.lax.scan(one_round, jnp.int32(num_tokens), merges_K.astype(jnp.int32))[1]


def _match_image(
  rules: Rules, shuffled: bool, interpret: bool,
  last_ref: Ref, num_live_ref: Ref, merges_ref: Ref, gram_ref: Ref, *refs: Ref,
) -> None:  # fmt: skip
  """Compute all rounds of one image. The first output has the row of the group of each token."""
  to_ref, (row_ref, work_ref, *scratch) = (refs[0], refs[1:]) if shuffled else (None, refs)
  memory = _Memory(work_ref, row_ref, *scratch, interpret=interpret)
  num_tokens, padded = gram_ref.shape[0], row_ref.shape[0]
  z_Z = jnp.arange(padded)

  def copy(row: Array, _: None) -> None:
    there = z_Z < num_tokens
    work_ref[row, :] = plgpu.load(gram_ref.at[row, jnp.where(there, z_Z, 0)], mask=there, other=0.0)

  def one_round(p: Array, _: None) -> None:
    if to_ref is not None:
      to_Z, at_Z = to_ref[p, :], memory.at[z_Z]
      memory.wait()
      memory.at[to_Z] = at_Z
      memory.wait()
    num_merges = merges_ref[p]
    pl.when(num_merges > 0)(lambda: _merge(memory, num_live_ref[p], num_merges, rules))

  jax.lax.fori_loop(0, num_tokens, copy, None)
  row_ref[:] = z_Z
  memory.at[z_Z], memory.into[z_Z], memory.weight[z_Z] = z_Z, z_Z, jnp.ones(padded)
  memory.wait()
  jax.lax.fori_loop(0, last_ref[0], one_round, None)


class _Memory:
  """Hold the arrays of one program. `wait` makes what all lanes have written visible to all of them.

  Attributes:
    work: the Gram matrix of the live rows [Z, Z].
    row: the row of the group of each token [Z].
    at: the row at each place.
    second: the number of each row in the second set, Z for rows that are not in it.
    source, target: rows that merge in this round, and the rows that they join, in the order of merging.
    into: the row that each row has joined.
    best, value: the counterpart of each token of the first set, and its similarity.
    scale: 1 / norm of each row, 0 for rows without direction.
    weight: the weight of each row in its group, for "mean_of_means".
  """

  def __init__(self, work: Ref, row: Ref, *scratch: Ref, interpret: bool):
    self.work, self.row = work, row
    self.at, self.second, self.source, self.target, self.into, self.best = scratch[: len(WHOLE_NUMBERS)]
    self.scale, self.value, self.weight = scratch[len(WHOLE_NUMBERS) :]
    self.wait = (lambda: None) if interpret else plgpu.debug_barrier


def _merge(memory: _Memory, num_live: Array, num_merges: Array, rules: Rules) -> None:
  """Compute one round that merges something."""
  padded = memory.row.shape[0]
  half = padded // 2
  z_Z, h_H = jnp.arange(padded), jnp.arange(half)
  in_first_H, in_second_H = 2 * h_H < num_live, 2 * h_H + 1 < num_live
  first_H, second_H = memory.at[2 * h_H], memory.at[2 * h_H + 1]
  num_tiles = (((num_live + 1) >> 1) + TILE - 1) // TILE

  _find_counterparts(memory, second_H, in_second_H, num_tiles)
  seeks_H = in_first_H & (h_H >= rules.protect_first)
  value_H = jnp.where(seeks_H, memory.value[h_H], -FAR)
  best_H = jnp.where(seeks_H, memory.best[h_H], 0)
  rank_H = _rank(memory, value_H, num_live, num_tiles, rules.protect_first)
  merges_H = seeks_H & (rank_H < num_merges)
  target_H = memory.at[2 * best_H + 1]
  memory.wait()

  # The new live order, as `rounds.pair`: what is left of the first set, then the second set.
  stays_H = in_first_H & ~merges_H
  num_left = ((num_live + 1) >> 1) - num_merges
  left_H = jnp.cumsum(stays_H.astype(jnp.int32)) - 1 if rules.protect_first else rank_H - num_merges
  idle_H = padded + h_H
  memory.at[jnp.where(stays_H, left_H, idle_H)] = first_H
  memory.at[jnp.where(in_second_H, num_left + h_H, half + idle_H)] = second_H
  turn_H = jnp.where(merges_H, rank_H, idle_H)
  memory.source[turn_H], memory.target[turn_H] = first_H, target_H
  memory.into[jnp.where(merges_H, first_H, idle_H)] = target_H
  memory.wait()
  memory.row[z_Z] = memory.into[memory.row[z_Z]]
  _add(memory, num_merges, weighted=rules.merged_feature == "mean_of_means")
  if rules.merged_feature == "mean_of_means":
    _divide_weights(memory, num_merges, second_H, in_second_H)


def _find_counterparts(memory: _Memory, second_H: Array, in_second_H: Array, num_tiles: Array) -> None:
  """Write `best` and `value` of the tokens of the first set, and use `scale` and `second` for it."""
  padded = memory.row.shape[0]
  z_Z, h_H = jnp.arange(padded), jnp.arange(padded // 2)
  square_Z = memory.work[z_Z, z_Z]
  scale_Z = jnp.where(square_Z > 0.0, 1.0 / jnp.sqrt(jnp.maximum(square_Z, TINY)), 0.0)
  memory.scale[z_Z], memory.second[z_Z] = scale_Z, jnp.full_like(z_Z, padded)
  memory.wait()
  memory.second[jnp.where(in_second_H, second_H, padded + h_H)] = h_H
  memory.wait()
  second_Z = memory.second[z_Z]

  def compare(tile: Array, _: None) -> None:
    f_T = tile * TILE + jnp.arange(TILE)
    first_T = memory.at[2 * f_T]
    inner_TZ = memory.work[first_T[:, None], z_Z[None, :]]
    scale_TZ = memory.scale[first_T][:, None] * scale_Z[None, :]
    sim_TZ = jnp.where(scale_TZ > 0.0, inner_TZ * scale_TZ, NO_DIRECTION)
    sim_TZ = jnp.where(second_Z[None, :] < padded, sim_TZ, -FAR)
    value_T = jnp.max(sim_TZ, axis=1)
    best_TZ = jnp.where(sim_TZ == value_T[:, None], second_Z[None, :], padded)
    memory.value[f_T], memory.best[f_T] = value_T, jnp.min(best_TZ, axis=1)

  jax.lax.fori_loop(0, num_tiles, compare, None)
  memory.wait()


def _rank(memory: _Memory, value_H: Array, num_live: Array, num_tiles: Array, protect_first: bool) -> Array:
  """Return how many tokens of the first set have a higher `value`, or the same and come earlier."""
  h_H = jnp.arange(value_H.size)

  def count(tile: Array, rank_H: Array) -> Array:
    f_T = tile * TILE + jnp.arange(TILE)
    seeks_T = (2 * f_T < num_live) & (f_T >= protect_first)
    value_T = jnp.where(seeks_T, memory.value[f_T], -FAR)
    equal_HT = (value_T[None, :] == value_H[:, None]) & (f_T[None, :] < h_H[:, None])
    ahead_HT = (value_T[None, :] > value_H[:, None]) | equal_HT
    return rank_H + jnp.sum(ahead_HT.astype(jnp.int32), axis=1)

  return jax.lax.fori_loop(0, num_tiles, count, jnp.zeros_like(h_H))


def _add(memory: _Memory, num_merges: Array, *, weighted: bool) -> None:
  """Add the rows and then the columns that merge to those that they join.

  A lane owns one column, and then one row, so no lane reads what another lane has written. That holds because
  a program has Z lanes.
  """
  z_Z = jnp.arange(memory.row.shape[0])

  def pair(k: Array) -> tuple[Array, Array, Array | float]:
    source, target = memory.source[k], memory.target[k]
    return source, target, memory.weight[source] / memory.weight[target] if weighted else 1.0

  def add_row(k: Array, _: None) -> None:
    source, target, weight = pair(k)
    memory.work[target, z_Z] = memory.work[target, z_Z] + weight * memory.work[source, z_Z]

  def add_column(k: Array, _: None) -> None:
    source, target, weight = pair(k)
    memory.work[z_Z, target] = memory.work[z_Z, target] + weight * memory.work[z_Z, source]

  jax.lax.fori_loop(0, num_merges, add_row, None)
  memory.wait()
  jax.lax.fori_loop(0, num_merges, add_column, None)
  memory.wait()


def _divide_weights(memory: _Memory, num_merges: Array, second_H: Array, in_second_H: Array) -> None:
  """Divide the weight of each row of the second set by the number of rows that it is now the mean of."""
  h_H = jnp.arange(second_H.size)
  join = lambda k, count_H: count_H + (memory.target[k] == second_H).astype(jnp.int32)
  count_H = jax.lax.fori_loop(0, num_merges, join, jnp.ones_like(h_H))
  weight_H = memory.weight[second_H] / count_H.astype(jnp.float32)
  memory.wait()
  memory.weight[jnp.where(in_second_H, second_H, 2 * second_H.size + h_H)] = weight_H
  memory.wait()
