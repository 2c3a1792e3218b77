"""Draw random groups, independent of content and place: the control that every other morpher must beat."""

import jax
import jax.numpy as jnp

from dtm_jax import partitions, rngs
from dtm_jax.arrays import Array, Float, Int, RandomKey
from dtm_jax.morphers import Assign, GroupCount


def build(
  *,
  groups: int | None = None,
  min_groups: int = 1,
  max_groups: int | None = None,
  drawn_per: str = "image",
) -> Assign:
  """Build the morpher. The defaults draw n̄ as the paper's schedule does; for the options see `GroupCount`."""
  count = GroupCount(groups, min_groups, max_groups, drawn_per)

  def assign(
    key: RandomKey, tokens_BNC: Float[Array, "B N C"], images_BHW3: Float[Array, "B H W 3"]
  ) -> Int[Array, "B N"]:
    batch_size, num_tokens, _ = tokens_BNC.shape
    count_key, group_key = jax.random.split(key)
    count_B = count.draw(count_key, batch_size, num_tokens)
    partition = lambda key, num_groups: random_partition(key, num_groups, num_tokens)
    return partitions.canonical_labels(jax.vmap(partition)(rngs.per_example(group_key, batch_size), count_B))

  return assign


def random_partition(key: RandomKey, num_groups: Int[Array, ""], num_tokens: int) -> Int[Array, " N"]:
  """Draw exactly n̄ = `num_groups` groups: n̄ random tokens begin one each, and every other token joins any
  of them.

  All pairs of tokens are equally likely to share a group, however near they are. Partitions are not equally
  likely: the sizes of the groups are more even than in a uniformly drawn partition.
  """
  order_key, join_key = jax.random.split(key)
  rank_N = jax.random.permutation(order_key, num_tokens)
  return jnp.where(rank_N < num_groups, rank_N, jax.random.randint(join_key, (num_tokens,), 0, num_groups))
