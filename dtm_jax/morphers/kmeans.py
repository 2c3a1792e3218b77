"""Group the teacher's tokens by spherical k-means, which uses their content and ignores their places."""

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, Int
from dtm_jax.morphers import Assign, GroupCount
from dtm_jax.morphers._clustering import by_similarity, fill_empty


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
    init: how the initial centres are chosen, "k-means++" or "random".
    iterations: number of k-means updates. With 0, every token joins its nearest initial centre.

  Raises:
    OptionError: a choice is unknown, or a number is out of range.
  """
  return by_similarity(kmeans, GroupCount(groups, min_groups, max_groups, drawn_per), init, iterations)


def kmeans(
  sim_NN: Float[Array, "N N"],
  seed_M: Int[Array, " M"],
  num_groups: Int[Array, ""],
  *,
  iterations: int | Int[Array, ""],
) -> Int[Array, " N"]:
  """Return the slot of each token of one image in exactly n̄ groups, by Lloyd's algorithm on the unit sphere.

      slot_j = argmax_i cos(v_j, c_i),    c_i = Σ_{slot_j = i} v_j / |v_j|

  The objective Σ_j (1 - cos(v_j, c_{slot_j})) never rises. The centres are never formed. Their inner products
  with the tokens are sums of the tokens' own, so an iteration costs M N² multiplications in place of 2 M N C.
  Empty groups get a token, see `fill_empty`. Source: Dhillon and Modha 2001.

  Args:
    sim_NN: the cosine of every pair of tokens.
    seed_M: the initial centres, as indices of tokens. The first n̄ = `num_groups` are used.
    iterations: number of updates.
  """
  max_groups = seed_M.size
  live_M = jnp.arange(max_groups) < num_groups

  def nearest(sim_MN: Array) -> Array:
    sim_MN = jnp.where(live_M[:, None], sim_MN, -jnp.inf)
    slot_N = jnp.argmax(sim_MN, axis=0)
    return fill_empty(slot_N, 1.0 - jnp.max(sim_MN, axis=0), num_groups, max_groups)

  def centres(slot_N: Array) -> Array:
    # Returns cos(c_i, v_j).
    member_MN = jax.nn.one_hot(slot_N, max_groups, axis=0, dtype=jnp.float32)
    sum_MN = jnp.einsum("mi,ij->mj", member_MN, sim_NN, precision=jax.lax.Precision.HIGHEST)
    norm_M = jnp.sqrt(jnp.maximum(jnp.sum(sum_MN * member_MN, axis=1), 0.0))
    return sum_MN / jnp.where(norm_M > 0, norm_M, 1.0)[:, None]

  move = lambda _, slot_N: nearest(centres(slot_N))
  return jax.lax.fori_loop(0, iterations, move, nearest(sim_NN[seed_M]))
