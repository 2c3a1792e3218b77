"""Self-attention with a bias that all images share, by several implementations that compute the same.

    mixed_BTAd = attend(query_BTAd, key_BTAd, value_BTAd, bias_1ATT, implementation="cudnn")

| implementation | what it is | where |
|---|---|---|
| xla | plain JAX, `jax.nn.dot_product_attention`; the reference | everywhere |
| cudnn | cuDNN's kernels, with the tokens padded if cuDNN asks for it | NVIDIA GPUs, half precision |
| pallas | our kernels, which hold all keys of a head in one tile (attention_kernel.py) | one NVIDIA GPU |

"pallas" is "xla" on other devices, and for heads or lengths that its kernels do not support. In this file, T
is the number of tokens of any kind, d the width of a head, and H = 3A: the heads of queries, keys and values.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float
from dtm_jax.models import attention_kernel

Implementation = Literal["xla", "cudnn", "pallas"]
IMPLEMENTATIONS = get_args(Implementation)

MULTIPLE = 8
"""cuDNN has no gradient of a bias for an odd number of tokens. It gets a multiple of this number."""
HIDDEN = -1e9
"""The bias of a padded key: its probability is exactly 0, also in bfloat16."""


def attend(
  query: Float[Array, "B T A d"],
  key: Float[Array, "B T A d"],
  value: Float[Array, "B T A d"],
  bias: Float[Array, "1 A T T"] | None = None,
  *,
  scale: float | None = None,
  causal: bool = False,
  implementation: Implementation = "xla",
) -> Float[Array, "B T A d"]:
  """Return softmax(scale q kᵀ + bias) v. The softmax is float32.

  Args:
    bias: added to the logits of every image. "cudnn" rounds it to the type of the queries.
    scale: factor of the logits, by default d^-1/2.
    causal: whether a token sees only itself and the tokens before it.
  """
  if implementation == "pallas" and not causal:
    qkv = jnp.concatenate([query, key, value], axis=2)
    if attention_kernel.supports(qkv.shape, qkv.dtype):
      return fused_attention(qkv, bias, query.shape[-1] ** -0.5 if scale is None else scale)
  if implementation == "cudnn":
    return padded_attention(query, key, value, bias, scale=scale, causal=causal)
  return jax.nn.dot_product_attention(
    query, key, value, bias, scale=scale, is_causal=causal, implementation="xla"
  )


# cuDNN -------------------------------------------------------------------------------------------------


def padded_attention(
  query: Float[Array, "B T A d"],
  key: Float[Array, "B T A d"],
  value: Float[Array, "B T A d"],
  bias: Float[Array, "1 A T T"] | None = None,
  *,
  scale: float | None = None,
  causal: bool = False,
  implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "B T A d"]:
  """Compute `attend` with cuDNN. With a bias, the tokens are padded to a multiple of MULTIPLE.

  Padded keys get the bias HIDDEN, so they change nothing and their gradient is exactly zero. The outputs of
  padded queries are dropped. A float32 bias gave NaN gradients in older releases of cuDNN, so the bias has
  the type of the queries.
  """
  compute = functools.partial(
    jax.nn.dot_product_attention, scale=scale, is_causal=causal, implementation=implementation
  )
  if bias is None:
    return compute(query, key, value)
  num_tokens = query.shape[1]
  inputs = pad(query, key, value, bias.astype(query.dtype), -num_tokens % MULTIPLE)
  return compute(*inputs)[:, :num_tokens]


def pad(
  query: Array, key: Array, value: Array, bias: Array, padding: int
) -> tuple[Array, Array, Array, Array]:
  """Return queries, keys and values with `padding` more tokens of zeros, and the bias that hides them."""
  tokens = ((0, 0), (0, padding), (0, 0), (0, 0))
  bias = jnp.pad(bias, ((0, 0), (0, 0), (0, padding), (0, 0)))
  bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (0, padding)), constant_values=HIDDEN)
  return jnp.pad(query, tokens), jnp.pad(key, tokens), jnp.pad(value, tokens), bias


# Our kernels -------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fused_attention(
  qkv_BTHd: Float[Array, "B T H d"],
  bias_1ATT: Float[Array, "1 A T T"] | None,
  scale: float,
  interpret: bool = False,
) -> Float[Array, "B T A d"]:
  """Compute `attend` with our kernels on CUDA, and in plain JAX on other platforms.

  Args:
    qkv_BTHd: the heads of the queries, then of the keys, then of the values. `attention_kernel.supports`
      says which shapes and types are possible.
    interpret: run the kernels without a GPU: slowly, for tests.
  """
  return _forward(qkv_BTHd, bias_1ATT, scale, interpret)[0]


def _forward(qkv: Array, bias: Array | None, scale: float, interpret: bool) -> tuple[Array, tuple]:
  mixed, lse = _on_cuda(attention_kernel.forward, _plain_forward, scale, interpret)(qkv, bias)
  return mixed, (qkv, bias, lse)


def _backward(scale: float, interpret: bool, kept: tuple, grad: Array) -> tuple[Array, Array | None]:
  return _on_cuda(attention_kernel.backward, _plain_backward, scale, interpret)(*kept, grad)


fused_attention.defvjp(_forward, _backward)


def _on_cuda(kernel: Callable, plain: Callable, scale: float, interpret: bool) -> Callable[..., Any]:
  """Return the function that runs `kernel` on CUDA, or where it is interpreted, and else `plain`."""
  if interpret:
    return functools.partial(kernel, scale=scale, interpret=True)
  return functools.partial(
    jax.lax.platform_dependent,
    cuda=functools.partial(kernel, scale=scale),
    default=functools.partial(plain, scale=scale),
  )


def _plain_forward(qkv: Array, bias: Array | None, *, scale: float) -> tuple[Array, Array]:
  """Return the mixed values, and zeros in place of the denominators that only the kernels keep."""
  batch_size, num_tokens, heads, _ = qkv.shape
  return _plain(qkv, bias, scale), jnp.zeros((batch_size, heads // 3, num_tokens), jnp.float32)


def _plain_backward(
  qkv: Array, bias: Array | None, lse: Array, grad: Array, *, scale: float
) -> tuple[Array, Array | None]:
  return jax.vjp(functools.partial(_plain, scale=scale), qkv, bias)[1](grad)


def _plain(qkv: Array, bias: Array | None, scale: float) -> Array:
  query, key, value = jnp.split(qkv, 3, axis=2)
  return attend(query, key, value, bias, scale=scale)
