"""Compute the rounds of matching from one Gram matrix, in plain JAX, for GPUs.

The rounds compare groups by their inner products only. These are sums over the Gram matrix G = V Vᵀ of the
tokens: group a of the first set and group x of the second have Σ_i Σ_j A_ai G_ij A_xj. Row a of A has the
weights of the members of a: ones, or with "mean_of_means" their share of the mean. So a round changes the
slots and the weights of the tokens, and nothing of size N x C or N x N moves.

G does not depend on the schedule. If a step maps this function over several schedules, it computes G once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, Int
from dtm_jax.matching.rounds import HIGHEST, NO_DIRECTION, Rules, pair, places
from dtm_jax.partitions import group_sizes


class Live(NamedTuple):
  """Hold the groups that are alive in one image. The live order is that of their slots."""

  slot_N: Int[Array, " N"]  # the present slot of each original token
  weight_N: Float[Array, " N"]  # the weight of each original token in the feature of its group
  num_live: Int[Array, ""]


def match_rounds(
  target_BNC: Float[Array, "B N C"],
  merges_BK: Int[Array, "B K"],
  order_BKN: Float[Array, "B K N"] | None,
  rules: Rules,
) -> Int[Array, "B N"]:
  """Compute `rounds.match_rounds`.

  The two round differently, so groups can differ if similarities differ by about 1e-7.
  """
  match = functools.partial(_match_image, rules=rules)
  return jax.vmap(match)(gram_matrix(target_BNC), merges_BK, order_BKN)


def gram_matrix(target_BNC: Float[Array, "B N C"]) -> Float[Array, "B N N"]:
  """Return the inner products of all pairs of tokens of each image."""
  return jnp.einsum("bnc,bmc->bnm", target_BNC, target_BNC, precision=HIGHEST)


def _match_image(gram_NN: Array, merges_K: Array, order_KN: Array | None, *, rules: Rules) -> Array:
  num_tokens = gram_NN.shape[0]

  def one_round(live: Live, this_round: tuple[Array, Array | None]) -> tuple[Live, None]:
    num_merges, order_N = this_round
    slot_N = live.slot_N
    if order_N is not None:
      slot_N = places(order_N, live.num_live, rules.protect_first)[slot_N]
    sim_FX = _similarity(gram_NN, slot_N, live.weight_N)
    to_N, num_live = pair(sim_FX, live.num_live, num_merges, rules.protect_first)
    slot_N, weight_N = to_N[slot_N], live.weight_N
    if rules.merged_feature == "mean_of_means":
      weight_N = weight_N / group_sizes(to_N[None])[0][slot_N]
    return Live(slot_N, weight_N, num_live), None

  live = Live(jnp.arange(num_tokens), jnp.ones(num_tokens), jnp.array(num_tokens))
  live, _ = jax.lax.scan(one_round, live, (merges_K, order_KN))
  return live.slot_N


def _similarity(gram_NN: Array, slot_N: Array, weight_N: Array) -> Array:
  """Return the cosine of every first and second group, or NO_DIRECTION if one of the two is zero."""
  into_NN = jnp.where(slot_N[None, :] == jnp.arange(slot_N.size)[:, None], weight_N[None, :], 0.0)
  rows_FN = jnp.einsum("fi,ij->fj", into_NN[0::2], gram_NN, precision=HIGHEST)
  inner_FX = jnp.einsum("fj,xj->fx", rows_FN, into_NN[1::2], precision=HIGHEST)
  # The square of a group's norm, without the products of different groups.
  same_NN = slot_N[:, None] == slot_N[None, :]
  own_N = jnp.sum(jnp.where(same_NN, gram_NN * weight_N[None, :], 0.0), axis=1)
  square_N = jnp.sum(into_NN * own_N[None, :], axis=1)
  scale_N = jnp.where(square_N > 0, 1.0 / jnp.sqrt(jnp.where(square_N > 0, square_N, 1.0)), 0.0)
  scale_FX = scale_N[0::2, None] * scale_N[None, 1::2]
  return jnp.where(scale_FX > 0, inner_FX * scale_FX, NO_DIRECTION)
