"""Spherical k-means on the teacher's tokens: groups by content alone, blind to place."""

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, Int
from dtm_jax.morphers import Assign, GroupCount, by_similarity
from dtm_jax.morphers import _clustering as clustering


def build(
  *,
  groups: int | None = None,
  min_groups: int = 1,
  max_groups: int | None = None,
  drawn_per: str = "image",
  init: str = "k-means++",
  iterations: int = 10,
) -> Assign:
  """The defaults draw n̄ as the paper's schedule does.

  Args:
    groups, min_groups, max_groups, drawn_per: of `GroupCount`.
    init: how the first centres are chosen, of `clustering.seeds`.
    iterations: how often the centres move; none moves none.

  Raises:
    ValueError: an unknown choice, or a senseless number.
  """
  count = GroupCount(groups, min_groups, max_groups, drawn_per)
  return by_similarity(kmeans, count, init, iterations)


def kmeans(
  sim_NN: Float[Array, "N N"],
  seed_M: Int[Array, "M"],
  num_groups: Int[Array, ""],
  *,
  iterations: int | Int[Array, ""],
) -> Int[Array, "N"]:
  """Lloyd's algorithm on the unit sphere: the slot of each token of one image, of exactly n̄ groups.

      slot_j = argmax_i cos(v_j, c_i),    c_i = Σ_{slot_j = i} v_j / |v_j|

  The objective Σ_j (1 - cos(v_j, c_{slot_j})) never rises. The centres are never formed: their products with
  the tokens are sums of the tokens' own, so that an iteration costs M N² and not 2 M N C multiplications.
  Source: Dhillon and Modha 2001; an empty group begins anew, see `clustering.fill_empty`.

  Args:
    sim_NN: the cosine of every pair of tokens.
    seed_M: the tokens that the groups begin with, of which the first n̄ = `num_groups` count.
  """
  max_groups = seed_M.size
  live_M = jnp.arange(max_groups) < num_groups

  def nearest(sim_MN: Array) -> Array:
    sim_MN = jnp.where(live_M[:, None], sim_MN, -jnp.inf)
    slot_N = jnp.argmax(sim_MN, axis=0)
    return clustering.fill_empty(slot_N, 1.0 - jnp.max(sim_MN, axis=0), num_groups, max_groups)

  def centres(slot_N: Array) -> Array:
    """cos(c_i, v_j)."""
    member_MN = jax.nn.one_hot(slot_N, max_groups, axis=0, dtype=jnp.float32)
    sum_MN = jnp.einsum("mi,ij->mj", member_MN, sim_NN, precision=jax.lax.Precision.HIGHEST)
    norm_M = jnp.sqrt(jnp.maximum(jnp.sum(sum_MN * member_MN, axis=1), 0.0))
    return sum_MN / jnp.where(norm_M > 0, norm_M, 1.0)[:, None]

  move = lambda _, slot_N: nearest(centres(slot_N))
  return jax.lax.fori_loop(0, iterations, move, nearest(sim_NN[seed_M]))
