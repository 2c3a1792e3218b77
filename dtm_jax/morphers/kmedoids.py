"""Group the teacher's tokens by k-medoids, which is k-means with one of its tokens as a group's centre."""

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, Int
from dtm_jax.morphers import Assign, GroupCount
from dtm_jax.morphers._clustering import by_similarity


def build(
  *,
  groups: int | None = None,
  min_groups: int = 1,
  max_groups: int | None = None,
  drawn_per: str = "image",
  init: str = "k-means++",
  iterations: int = 10,
) -> Assign:
  """Build the morpher. The defaults draw n̄ as the paper's schedule does.

  Args:
    groups, min_groups, max_groups, drawn_per: see `GroupCount`.
    init: how the initial medoids are chosen, "k-means++" or "random".
    iterations: number of updates of the medoids. With 0, every token joins its nearest initial medoid.

  Raises:
    OptionError: a choice is unknown, or a number is out of range.
  """
  return by_similarity(kmedoids, GroupCount(groups, min_groups, max_groups, drawn_per), init, iterations)


def kmedoids(
  sim_NN: Float[Array, "N N"],
  seed_M: Int[Array, " M"],
  num_groups: Int[Array, ""],
  *,
  iterations: int | Int[Array, ""],
) -> Int[Array, " N"]:
  """Return the slot of each token of one image in exactly n̄ groups, by Voronoi iteration.

      slot_j = argmin_i d(j, m_i),    m_i = argmin_{j: slot_j = i} Σ_{l: slot_l = i} d(j, l),    d = 1 - cos

  The objective Σ_j d(j, m_{slot_j}) never rises. A medoid stays in its own group even if another medoid is as
  near, so no group is ever empty. Source: Park and Jun 2009.

  Args:
    sim_NN: the cosine of every pair of tokens.
    seed_M: the initial medoids, as indices of tokens. The first n̄ = `num_groups` are used.
    iterations: number of updates.
  """
  num_tokens, max_groups = sim_NN.shape[0], seed_M.size
  live_M = jnp.arange(max_groups) < num_groups
  token_N = jnp.arange(num_tokens)
  distance_NN = jnp.where(token_N[:, None] == token_N[None, :], 0.0, 1.0 - sim_NN)

  def nearest(medoid_M: Array) -> Array:
    distance_MN = jnp.where(live_M[:, None], distance_NN[medoid_M], jnp.inf)
    own_MN = live_M[:, None] & (medoid_M[:, None] == token_N[None, :])
    return jnp.argmin(jnp.where(own_MN, -jnp.inf, distance_MN), axis=0)

  def medoids(slot_N: Array) -> Array:
    same_NN = slot_N[:, None] == slot_N[None, :]
    total_N = jnp.sum(jnp.where(same_NN, distance_NN, 0.0), axis=1)
    member_MN = slot_N[None, :] == jnp.arange(max_groups)[:, None]
    return jnp.argmin(jnp.where(member_MN, total_N[None, :], jnp.inf), axis=1)

  move = lambda _, slot_N: nearest(medoids(slot_N))
  return jax.lax.fori_loop(0, iterations, move, nearest(seed_M))
