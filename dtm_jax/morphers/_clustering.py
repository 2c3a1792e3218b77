"""Provide what the clusterings share: similarities, initial centres, and a rule for empty groups.

The number of groups n̄ ≤ M of an image is a traced value, and the number of group slots M is a shape. Slots
0..n̄-1 are live. All functions but `by_similarity` work on one image and are mapped over the batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dtm_jax import partitions, rngs
from dtm_jax.arrays import Array, Float, Int, RandomKey
from dtm_jax.errors import OptionError, check_choice
from dtm_jax.matching.rounds import rank
from dtm_jax.morphers import Assign, GroupCount

INITS = ("k-means++", "random")
MAX_DISTANCE = 2.0
TINY = 1e-12


def by_similarity(algorithm: Callable[..., Array], count: GroupCount, init: str, iterations: int) -> Assign:
  """Return the morpher of a clustering that needs only the cosines of the tokens and its first centres.

  Args:
    algorithm: a function (sim_NN, seed_M, num_groups, iterations=) -> slot_N for one image.
    count: the number of groups.
    init: how to choose the tokens that the groups begin with, see `seeds`.
    iterations: number of updates of the algorithm.

  Raises:
    OptionError: the init is unknown, or the iterations are negative.
  """
  check_choice("init", init, INITS)
  if iterations < 0:
    raise OptionError(f"iterations={iterations} must be at least 0.")

  def assign(
    key: RandomKey, tokens_BNC: Float[Array, "B N C"], images_BHW3: Float[Array, "B H W 3"]
  ) -> Int[Array, "B N"]:
    batch_size, num_tokens, _ = tokens_BNC.shape
    count_key, seed_key = jax.random.split(key)
    count_B = count.draw(count_key, batch_size, num_tokens)
    sim_BNN = jax.vmap(cosine_similarity)(tokens_BNC)
    choose = functools.partial(seeds, num_seeds=count.bounds(num_tokens)[1], init=init)
    seed_BM = jax.vmap(choose)(rngs.per_example(seed_key, batch_size), sim_BNN)
    slot_BN = jax.vmap(functools.partial(algorithm, iterations=iterations))(sim_BNN, seed_BM, count_B)
    return partitions.canonical_labels(slot_BN)

  return assign


def cosine_similarity(tokens_NC: Float[Array, "N C"]) -> Float[Array, "N N"]:
  """Return the cosine of every pair of tokens, in float32 and without gradient.

  A token that is zero or not finite has no direction. Its cosine with every token, itself included, is 0.
  """
  tokens_NC = jax.lax.stop_gradient(tokens_NC).astype(jnp.float32)
  tokens_NC = jnp.where(jnp.isfinite(tokens_NC).all(-1, keepdims=True), tokens_NC, 0.0)
  norm_N1 = jnp.linalg.norm(tokens_NC, axis=1, keepdims=True)
  unit_NC = tokens_NC / jnp.where(norm_N1 > 0, norm_N1, 1.0)
  return jnp.einsum("ic,jc->ij", unit_NC, unit_NC, precision=jax.lax.Precision.HIGHEST)


def seeds(key: RandomKey, sim_NN: Float[Array, "N N"], num_seeds: int, init: str) -> Int[Array, " M"]:
  """Choose M = `num_seeds` different tokens that the groups begin with. The first n̄ serve n̄ groups.

  "random" chooses them uniformly. "k-means++" chooses the first uniformly and each further one with a
  probability proportional to D² = 1 - cos, its squared distance to the nearest seed so far (Arthur and
  Vassilvitskii 2007). It takes the largest of log D² + Gumbel noise. The first seeds do not depend on M, so
  one sequence serves every n̄.

  Raises:
    OptionError: the init is unknown.
  """
  check_choice("init", init, INITS)
  num_tokens = sim_NN.shape[0]
  if init == "random":
    return jax.random.permutation(key, num_tokens)[:num_seeds]

  def pick(nearest_N: Array, noise_N: Array) -> tuple[Array, Array]:
    # Seeds get the squared distance -1, so no token is chosen twice.
    log_N = jnp.where(nearest_N < 0, -jnp.inf, jnp.log(jnp.maximum(nearest_N, TINY)))
    seed = jnp.argmax(log_N + noise_N)
    distance_N = jnp.maximum(1.0 - sim_NN[seed], 0.0)
    return jnp.minimum(nearest_N, distance_N).at[seed].set(-1.0), seed

  noise_MN = jax.random.gumbel(key, (num_seeds, num_tokens))
  return jax.lax.scan(pick, jnp.full(num_tokens, MAX_DISTANCE), noise_MN)[1]


def fill_empty(
  slot_N: Int[Array, " N"], distance_N: Float[Array, " N"], num_groups: Int[Array, ""], max_groups: int
) -> Int[Array, " N"]:
  """Give every empty group a token, so that exactly n̄ = `num_groups` ≤ N groups are not empty.

  Empty groups take the tokens with the largest `distance_N` to their centre. No group gives away its nearest
  token. The sum of distances to the centres falls: the moved token becomes a centre, and the centre of its
  old group moves closer to the remaining tokens. Dropping empty groups would be simpler, but morphers can
  only be compared if the same n̄ means the same number of groups.
  """
  slot_M = jnp.arange(max_groups)
  member_MN = slot_N[None, :] == slot_M[:, None]
  empty_M = (slot_M < num_groups) & ~member_MN.any(axis=1)
  nearest_M = jnp.argmin(jnp.where(member_MN, distance_N[None, :], jnp.inf), axis=1)
  stays_N = nearest_M[slot_N] == jnp.arange(slot_N.size)
  rank_N = rank(jnp.where(stays_N, jnp.inf, -distance_N))
  empty_first_M = jnp.argsort(~empty_M)
  return jnp.where(rank_N < empty_M.sum(), empty_first_M[jnp.minimum(rank_N, max_groups - 1)], slot_N)
