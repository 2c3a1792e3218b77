"""The student's self-attention with learned relative position biases.

The tables of biases have (2r-1)(2c-1) + 3 rows for a grid of r x c patches. T = 1+N tokens are CLS and the
patches.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.nn.initializers import Initializer

from dtm_jax.arrays import Array, Float, Int
from dtm_jax.models import attention, attention_kernel
from dtm_jax.models.layers import merge_heads, split_heads


class Attention(nn.Module):
  """Compute softmax(q kᵀ / sqrt(d) + own bias + shared bias) v with heads of width d.

  The linear maps of queries and values have a bias, that of keys has none.

  Attributes:
    bias_grid: (rows, columns) of the patches for the block's own table of relative position biases; None for
      no own table.
    remat: whether the backward pass of "xla" computes logits and softmax again. The other implementations
      always do.
    implementation: see `models.attention`. All but "xla" round the bias to `dtype`.
  """

  num_heads: int
  bias_grid: tuple[int, int] | None
  remat: bool
  kernel_init: Initializer
  dtype: str
  implementation: attention.Implementation = "xla"

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], shared_bias: Array | None) -> Float[Array, "B T D"]:
    width = x.shape[-1]
    dense = partial(nn.Dense, kernel_init=self.kernel_init, dtype=self.dtype)
    fused = dense(3 * width, use_bias=False, name="qkv")(x)
    zeros = nn.initializers.zeros_init()
    q_bias, v_bias = (self.param(name, zeros, (width,)).astype(fused.dtype) for name in ("q_bias", "v_bias"))
    bias = shared_bias
    if self.bias_grid is not None:
      own_bias = RelativePositionBias(self.num_heads, self.bias_grid, name="rel_pos_bias")()
      bias = own_bias if bias is None else own_bias + bias
    qkv_shape = (*x.shape[:2], 3 * self.num_heads, width // self.num_heads)
    if self.implementation == "pallas" and attention_kernel.supports(qkv_shape, fused.dtype):
      mixed = self._attend_unsplit(fused, q_bias, v_bias, bias)
    else:
      mixed = self._attend(fused, q_bias, v_bias, bias)
    return dense(width, name="proj")(merge_heads(mixed))

  def _attend(
    self, fused: Float[Array, "B T _"], q_bias: Array, v_bias: Array, bias: Array | None
  ) -> Float[Array, "B T A d"]:
    query, key, value = jnp.split(fused, 3, axis=-1)
    query += q_bias[None, None, :]
    value += v_bias[None, None, :]
    query *= (query.shape[-1] // self.num_heads) ** -0.5
    query, key, value = (split_heads(each, self.num_heads) for each in (query, key, value))
    compute: Callable[..., Array] = partial(attention.attend, scale=1.0, implementation=self.implementation)
    if self.remat and self.implementation == "xla":
      compute = jax.checkpoint(compute, prevent_cse=False)
    return compute(query, key, value, bias)

  def _attend_unsplit(
    self, fused: Float[Array, "B T _"], q_bias: Array, v_bias: Array, bias: Array | None
  ) -> Float[Array, "B T A d"]:
    """Compute the same without splitting `fused`: the scale is a power of two, and the kernel applies it."""
    fused += jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])[None, None, :]
    qkv = split_heads(fused, 3 * self.num_heads)
    bias = None if bias is None else bias.astype(fused.dtype)
    return attention.fused_attention(qkv, bias, qkv.shape[-1] ** -0.5)


class RelativePositionBias(nn.Module):
  """A learned number for each head and each offset between two patches, and three numbers for CLS."""

  num_heads: int
  grid: tuple[int, int]

  @nn.compact
  def __call__(self) -> Float[Array, "1 A T T"]:
    """Return the bias of every head for every pair of query and key."""
    index = relative_position_index(*self.grid)
    table = self.param("table", nn.initializers.zeros_init(), (1 + index.max(), self.num_heads))
    return rearrange(jnp.take(table, index, axis=0), "q k a -> 1 a q k")


@lru_cache
def relative_position_index(rows: int, columns: int) -> Int[np.ndarray, "T T"]:
  """Return the row of the bias table [(2r-1)(2c-1) + 3, A] for each (query, key).

  Patches i and j have the offset (dy, dx) = place_i - place_j and the row (dy + r - 1)(2c - 1) + dx + c - 1.
  The last three rows are for CLS -> patch, patch -> CLS and CLS -> CLS.
  """
  y, x = np.divmod(np.arange(rows * columns), columns)
  dy, dx = (place[:, None] - place[None, :] for place in (y, x))
  num_offsets = (2 * rows - 1) * (2 * columns - 1)
  index = np.full((1 + y.size, 1 + y.size), num_offsets)
  index[1:, 0] += 1
  index[0, 0] += 2
  index[1:, 1:] = (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
  return index
