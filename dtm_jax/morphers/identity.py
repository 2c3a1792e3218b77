"""Every token is a group, so the loss is the token-wise loss."""

import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, Int, RandomKey
from dtm_jax.morphers import Assign


def build() -> Assign:
  """Build the morpher. It has no options."""

  def assign(
    key: RandomKey, tokens_BNC: Float[Array, "B N C"], images_BHW3: Float[Array, "B H W 3"]
  ) -> Int[Array, "B N"]:
    batch_size, num_tokens, _ = tokens_BNC.shape
    return jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), (batch_size, num_tokens))

  return assign
