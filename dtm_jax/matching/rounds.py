"""Compute the rounds of bipartite matching in plain JAX, for any device. `gram.py` shares its parts.

The tokens that are alive in an image stand in the first `num_live` of N slots; this is the live order. Even
slots hold the first set of a round and odd slots the second. A round gives every slot its next slot, and
slots that get the same one merge. All shapes are static: `num_live` and the number of merges are traced
values.

Letters of this module: F tokens of the first set, X tokens of the second set.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dtm_jax import rngs
from dtm_jax.arrays import Array, Float, Int, RandomKey
from dtm_jax.partitions import group_sizes

HIGHEST = jax.lax.Precision.HIGHEST
NO_DIRECTION = -2.0
"""The similarity of a token without direction. It lies below every cosine, so such a token merges last."""


@dataclasses.dataclass(frozen=True)
class Rules:
  """Hold the rules of a round, which are options of `morphing.bipartite_match` and explained there.

  Attributes:
    protect_first: the first token stays alone.
    merged_feature: "size_weighted" or "mean_of_means".
  """

  protect_first: bool
  merged_feature: str


Rounds = Callable[[Array, Array, Array | None, Rules], Array]
"""(target_BNC, merges_BK, order_BKN, rules) -> slot_BN, as `match_rounds`."""


class Live(NamedTuple):
  """Hold the tokens that are alive in one image, in the live order."""

  feature_NC: Float[Array, "N C"]  # sum or mean of the tokens merged in each slot; 0 past num_live
  slot_N: Int[Array, " N"]  # the present slot of each original token
  num_live: Int[Array, ""]


def match_rounds(
  target_BNC: Float[Array, "B N C"],
  merges_BK: Int[Array, "B K"],
  order_BKN: Float[Array, "B K N"] | None,
  rules: Rules,
) -> Int[Array, "B N"]:
  """Return the slot of each token after all rounds.

  Args:
    target_BNC: finite tokens, float32.
    merges_BK: r_p, the number of tokens to merge in round p.
    order_BKN: sorts the live tokens of each round in rising order; None keeps the live order.
    rules: see `Rules`.
  """
  match = functools.partial(_match_image, rules=rules)
  return jax.vmap(match)(target_BNC, merges_BK, order_BKN)


def random_order(key: RandomKey, batch_size: int, max_rounds: int, num_tokens: int) -> Float[Array, "B K N"]:
  """Draw one uniform number for each image, round and slot. Its rising order is the random split."""
  keys_B = rngs.per_example(key, batch_size)
  return jax.vmap(lambda key: jax.random.uniform(key, (max_rounds, num_tokens)))(keys_B)


def rank(value_N: Array) -> Array:
  """Return the place of each value in rising order, from 0. Equal values keep their order.

  Comparing so few values with one another is faster than sorting them (docs/method.md).
  """
  place_N = jnp.arange(value_N.size)
  smaller_NN = value_N[None, :] < value_N[:, None]
  equal_before_NN = (value_N[None, :] == value_N[:, None]) & (place_N[None, :] < place_N[:, None])
  return jnp.sum(smaller_NN | equal_before_NN, axis=1)


def _match_image(target_NC: Array, merges_K: Array, order_KN: Array | None, *, rules: Rules) -> Array:
  num_tokens = target_NC.shape[0]

  def one_round(live: Live, this_round: tuple[Array, Array | None]) -> tuple[Live, None]:
    num_merges, order_N = this_round
    if order_N is not None:
      live = _shuffle(live, order_N, rules.protect_first)
    sim_FX = _similarity(live.feature_NC[0::2], live.feature_NC[1::2])
    to_N, num_live = pair(sim_FX, live.num_live, num_merges, rules.protect_first)
    return _merge(live, to_N, num_live, rules.merged_feature), None

  # All K rounds are computed. With one schedule per image, some image of the batch nearly always needs them.
  live = Live(target_NC, jnp.arange(num_tokens), jnp.array(num_tokens))
  live, _ = jax.lax.scan(one_round, live, (merges_K, order_KN))
  return live.slot_N


def places(order_N: Array, num_live: Array, protect_first: bool) -> Array:
  """Return the place of each slot when `order_N` sorts the live ones. A protected first token stays first."""
  if protect_first:
    order_N = order_N.at[0].set(-1.0)
  return rank(jnp.where(jnp.arange(order_N.size) < num_live, order_N, jnp.inf))


def _shuffle(live: Live, order_N: Array, protect_first: bool) -> Live:
  """Sort the live tokens by `order_N`. A protected first token stays first."""
  to_N = places(order_N, live.num_live, protect_first)
  from_N = jnp.zeros_like(to_N).at[to_N].set(jnp.arange(to_N.size))
  return Live(live.feature_NC[from_N], to_N[live.slot_N], live.num_live)


def _similarity(first_FC: Array, second_XC: Array) -> Array:
  """Return the cosine of every pair, or NO_DIRECTION if one of the two tokens is zero."""
  norm_F, norm_X = jnp.linalg.norm(first_FC, axis=1), jnp.linalg.norm(second_XC, axis=1)
  unit_FC = first_FC / jnp.where(norm_F, norm_F, 1.0)[:, None]
  unit_XC = second_XC / jnp.where(norm_X, norm_X, 1.0)[:, None]
  cosine_FX = jnp.einsum("fc,xc->fx", unit_FC, unit_XC, precision=HIGHEST)
  return jnp.where((norm_F[:, None] > 0) & (norm_X[None, :] > 0), cosine_FX, NO_DIRECTION)


def pair(sim_FX: Array, num_live: Array, num_merges: Array, protect_first: bool) -> tuple[Array, Array]:
  """Return the next slot of each slot (N for empty slots), and how many slots are alive then."""
  num_first, num_second = sim_FX.shape
  slot_N = jnp.arange(num_first + num_second)
  live_N = slot_N < num_live
  sim_FX = jnp.where(live_N[0::2, None] & live_N[None, 1::2], sim_FX, -jnp.inf)
  if protect_first:
    sim_FX = sim_FX.at[0].set(-jnp.inf)

  # The same as argmax, the first of the largest, but CPUs vectorise a maximum and a minimum.
  highest_F = jnp.max(sim_FX, axis=1)
  place_X = jnp.arange(num_second)
  best_F = jnp.min(jnp.where(sim_FX == highest_F[:, None], place_X[None, :], num_second - 1), axis=1)
  rank_F = rank(-highest_F)
  num_merges = jnp.minimum(num_merges, (num_live - protect_first) // 2)
  merges_F = rank_F < num_merges

  # The new live order: the tokens of the first set that did not merge, then the second set. With a protected
  # token the former keep their order, otherwise they stand by falling similarity. See docs/method.md.
  num_left = (num_live + 1) // 2 - num_merges
  left_F = jnp.cumsum(~merges_F) - 1 if protect_first else rank_F - num_merges
  to_F = jnp.where(merges_F, num_left + best_F, left_F)
  to_X = num_left + place_X
  to_N = jnp.where(num_merges > 0, slot_N.at[0::2].set(to_F).at[1::2].set(to_X), slot_N)
  return jnp.where(live_N, to_N, slot_N.size), num_live - num_merges


def _merge(live: Live, to_N: Array, num_live: Array, merged_feature: str) -> Live:
  """Move every slot to `to_N`. Slots that meet there merge."""
  # The size-weighted mean is stored as a sum, because the cosine does not depend on the factor 1/w.
  feature_NC = _sum_at(to_N, live.feature_NC)
  if merged_feature == "mean_of_means":
    feature_NC /= jnp.maximum(group_sizes(to_N[None])[0], 1)[:, None]
  return Live(feature_NC, to_N[live.slot_N], num_live)


def _sum_at(place_N: Array, x_NC: Array) -> Array:
  """Return in row i the sum of the rows of x whose place is i. Rows with place N are dropped.

  CPUs use a scatter, which takes two fifths of the time of a product (docs/method.md). Other devices use a
  product: on a GPU a scatter adds in any order, and on a TPU it is slow.
  """
  return jax.lax.platform_dependent(place_N, x_NC, cpu=_scatter_at, default=_product_at)


def _scatter_at(place_N: Array, x_NC: Array) -> Array:
  return jax.ops.segment_sum(x_NC, place_N, num_segments=place_N.size)


def _product_at(place_N: Array, x_NC: Array) -> Array:
  into_NN = jax.nn.one_hot(place_N, place_N.size, axis=0, dtype=jnp.float32)
  return jnp.einsum("ij,jc->ic", into_NN, x_NC, precision=HIGHEST)
