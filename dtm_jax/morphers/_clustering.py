"""What the clusterings in morphers/ share: distances, where to begin, and what to do about an empty group.

How many groups an image gets is a value, n̄ ≤ M, and M, the number of group slots, a shape: slots 0..n̄-1 are
live. All functions here are of one image, to be mapped over the batch.
"""

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, Int, RandomKey
from dtm_jax.errors import OptionError

INITS = ("k-means++", "random")
MAX_DISTANCE = 2.0
TINY = 1e-12


def cosine_similarity(tokens_NC: Float[Array, "N C"]) -> Float[Array, "N N"]:
  """The cosine of every pair of tokens, in float32 and without gradient.

  A token that is zero or not finite has no direction: its cosine with every token, itself too, is 0.
  """
  tokens_NC = jax.lax.stop_gradient(tokens_NC).astype(jnp.float32)
  tokens_NC = jnp.where(jnp.isfinite(tokens_NC).all(-1, keepdims=True), tokens_NC, 0.0)
  norm_N1 = jnp.linalg.norm(tokens_NC, axis=1, keepdims=True)
  unit_NC = tokens_NC / jnp.where(norm_N1 > 0, norm_N1, 1.0)
  return jnp.einsum("ic,jc->ij", unit_NC, unit_NC, precision=jax.lax.Precision.HIGHEST)


def seeds(key: RandomKey, sim_NN: Float[Array, "N N"], num_seeds: int, init: str) -> Int[Array, "M"]:
  """The tokens that the groups begin with, all different; the first n̄ of them begin n̄ groups.

  "random" takes them uniformly. "k-means++" takes the first uniformly, and each further one with a
  probability in proportion to its squared distance 1 - cos to the nearest seed so far (Arthur and
  Vassilvitskii 2007): the largest of log D² + Gumbel noise. Such a sequence does not depend on its length,
  so that one of M serves every n̄.

  Raises:
    OptionError: an unknown init.
  """
  num_tokens = sim_NN.shape[0]
  if init == "random":
    return jax.random.permutation(key, num_tokens)[:num_seeds]
  if init != "k-means++":
    raise OptionError(f"Unknown init {init!r}. Available: {', '.join(INITS)}.")

  def pick(nearest_N: Array, noise_N: Array) -> tuple[Array, Array]:
    """The squared distance to the nearest seed is -1 where a seed itself is, for no token seeds twice."""
    log_N = jnp.where(nearest_N < 0, -jnp.inf, jnp.log(jnp.maximum(nearest_N, TINY)))
    seed = jnp.argmax(log_N + noise_N)
    distance_N = jnp.maximum(1.0 - sim_NN[seed], 0.0)
    return jnp.minimum(nearest_N, distance_N).at[seed].set(-1.0), seed

  noise_MN = jax.random.gumbel(key, (num_seeds, num_tokens))
  return jax.lax.scan(pick, jnp.full(num_tokens, MAX_DISTANCE), noise_MN)[1]


def fill_empty(
  slot_N: Int[Array, "N"], distance_N: Float[Array, "N"], num_groups: Int[Array, ""], max_groups: int
) -> Int[Array, "N"]:
  """Gives every empty group a token, so that exactly n̄ = `num_groups` ≤ N groups have one.

  Each takes the token farthest from its centre, `distance_N`, except that no group gives away its nearest
  one. A token alone is its own centre, and what it leaves only draws closer: the sum of distances to the
  centres falls. Dropping empty groups would be simpler; but morphers are compared, and an n̄ drawn from a
  schedule means the same to all of them, only if they keep to it.
  """
  slot_M = jnp.arange(max_groups)
  member_MN = slot_N[None, :] == slot_M[:, None]
  empty_M = (slot_M < num_groups) & ~member_MN.any(axis=1)
  nearest_M = jnp.argmin(jnp.where(member_MN, distance_N[None, :], jnp.inf), axis=1)
  stays_N = nearest_M[slot_N] == jnp.arange(slot_N.size)
  rank_N = jnp.argsort(jnp.argsort(jnp.where(stays_N, jnp.inf, -distance_N)))
  empty_first_M = jnp.argsort(~empty_M)
  return jnp.where(rank_N < empty_M.sum(), empty_first_M[jnp.minimum(rank_N, max_groups - 1)], slot_N)
