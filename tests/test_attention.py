"""The implementations of attention against float64 NumPy, forward and backward, and their lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax.models import attention, attention_kernel
from dtm_jax.models.vit import model as vit

SCALE = 0.125
BOUNDS = {"float32": 2e-6, "bfloat16": 2e-2}


def inputs(num_tokens, batch_size=2, heads=2, dtype="float32", width=64):
  """Return qkv [B, T, 3A, d], a bias [1, A, T, T] and a cotangent [B, T, A, d]."""
  rng = np.random.default_rng(num_tokens)
  normal = lambda *shape: rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))
  qkv = normal(batch_size, num_tokens, 3 * heads, width)
  return qkv, normal(1, heads, num_tokens, num_tokens), normal(batch_size, num_tokens, heads, width)


def oracle(qkv, bias, grad):
  """Return the outputs and the gradients of qkv and of the bias in float64."""
  qkv, grad = np.asarray(qkv, np.float64), np.asarray(grad, np.float64)
  query, key, value = np.split(qkv, 3, axis=2)
  logits = SCALE * np.einsum("btad,bsad->bats", query, key)
  logits += 0.0 if bias is None else np.asarray(bias, np.float64)
  weight = np.exp(logits - logits.max(-1, keepdims=True))
  weight /= weight.sum(-1, keepdims=True)
  mixed = np.einsum("bats,bsad->btad", weight, value)
  grad_weight = np.einsum("btad,bsad->bats", grad, value)
  grad_logits = weight * (grad_weight - (weight * grad_weight).sum(-1, keepdims=True))
  grads = [
    SCALE * np.einsum("bats,bsad->btad", grad_logits, key),
    SCALE * np.einsum("bats,btad->bsad", grad_logits, query),
    np.einsum("bats,btad->bsad", weight, grad),
  ]
  return mixed, np.concatenate(grads, axis=2), grad_logits.sum(0, keepdims=True)


def outputs_and_gradients(attend, qkv, bias, grad):
  """Return what `attend(qkv, bias)` and its backward pass give."""

  @jax.jit
  def run(qkv, bias, grad):
    mixed, pull = jax.vjp(attend, qkv, bias)
    return mixed, *pull(grad)

  return run(qkv, bias, grad)


def assert_near(ours, exact, bound):
  for name, mine, right in zip(("mixed", "qkv", "bias"), ours, exact, strict=True):
    if mine is not None:
      error = np.abs(np.asarray(mine, np.float64) - right).max()
      assert error <= bound * max(np.abs(right).max(), 1e-2), (name, error)


interpreted = lambda qkv, bias: attention.fused_attention(qkv, bias, SCALE, True)


def padded(qkv, bias):
  """Compute the path of cuDNN in plain JAX."""
  query, key, value = jnp.split(qkv, 3, axis=2)
  return attention.padded_attention(query, key, value, bias, scale=SCALE, implementation="xla")


@pytest.mark.parametrize(
  ("num_tokens", "dtype", "with_bias"),
  [
    (1, "float32", True),
    (7, "float32", False),
    (64, "bfloat16", True),
    (65, "bfloat16", False),
    (257, "float32", True),
    # 1 and 257 tokens do not fill their last tile either, and 64 are as precise in bfloat16.
    pytest.param(50, "float32", True, marks=pytest.mark.long),
    pytest.param(65, "float32", True, marks=pytest.mark.long),
    pytest.param(197, "float32", True, marks=pytest.mark.long),
    pytest.param(197, "bfloat16", True, marks=pytest.mark.long),
  ],
)
def test_the_interpreted_kernels_equal_the_oracle(num_tokens, dtype, with_bias):
  qkv, bias, grad = inputs(num_tokens, dtype=dtype, heads=2 if num_tokens < 100 else 1)
  bias = bias if with_bias else None
  ours = outputs_and_gradients(interpreted, qkv, bias, grad)
  assert_near(ours, oracle(qkv, bias, grad), BOUNDS[dtype])
  assert ours[0].dtype == ours[1].dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradient_of_the_bias_is_the_sum_over_parts_and_images(parts, monkeypatch):
  monkeypatch.setattr(attention_kernel, "PARTS", parts)
  qkv, bias, grad = inputs(7, batch_size=4)
  assert_near(outputs_and_gradients(interpreted, qkv, bias, grad), oracle(qkv, bias, grad), BOUNDS["float32"])


# 7 and 257 tokens are padded too, and 64 are not.
@pytest.mark.parametrize(
  "num_tokens", [1, 7, 64, 257, *(pytest.param(n, marks=pytest.mark.long) for n in (50, 65, 197))]
)
def test_padding_for_cudnn_changes_nothing(num_tokens):
  for dtype, bound in BOUNDS.items():
    qkv, bias, grad = inputs(num_tokens, dtype=dtype)
    assert_near(outputs_and_gradients(padded, qkv, bias, grad), oracle(qkv, bias, grad), bound)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_gradient_of_the_padding_is_exactly_zero(dtype):
  qkv, bias, grad = inputs(7, dtype=dtype)

  @jax.jit
  def gradients_of_padded(qkv, bias, grad):
    padded = attention.pad(*jnp.split(qkv, 3, axis=2), bias, 1)
    return jax.vjp(lambda *args: attention.attend(*args, scale=SCALE)[:, :7], *padded)[1](grad)

  gradients = jax.tree.map(np.array, gradients_of_padded(qkv, bias, grad))
  for each in gradients[:3]:
    assert np.abs(each[:, :7]).max() > 0
    np.testing.assert_array_equal(each[:, 7:], 0)
  np.testing.assert_array_equal(gradients[3][:, :, 7:], 0)
  np.testing.assert_array_equal(gradients[3][:, :, :, 7:], 0)


def test_cudnn_gets_padded_tokens_only_with_a_bias(monkeypatch):
  seen = []

  def record(query, key, value, bias=None, *, implementation, **options):
    seen.append((implementation, query.shape[1], None if bias is None else (bias.shape[-1], bias.dtype)))
    return query

  monkeypatch.setattr(jax.nn, "dot_product_attention", record)
  qkv, bias, _ = inputs(197, dtype="bfloat16")
  cudnn = functools.partial(attention.attend, implementation="cudnn")
  attend = functools.partial(jax.eval_shape, cudnn, *np.split(qkv, 3, axis=2))
  assert attend(bias.astype(np.float32)).shape[1] == attend().shape[1] == 197
  assert seen == [("cudnn", 200, (200, jnp.bfloat16)), ("cudnn", 197, None)]


@pytest.mark.parametrize(("num_tokens", "dtype"), [(1, "float32"), (197, "bfloat16"), (512, "bfloat16")])
def test_the_kernels_lower_for_cuda_only(num_tokens, dtype):
  """Three kernels: forward, and backward by queries and by keys. Other platforms get plain JAX."""
  qkv = jax.ShapeDtypeStruct((8, num_tokens, 6, 64), dtype)
  bias = jax.ShapeDtypeStruct((1, 2, num_tokens, num_tokens), dtype)
  loss = lambda qkv, bias: attention.fused_attention(qkv, bias, SCALE).astype(jnp.float32).sum()
  traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(qkv, bias)
  kernels = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text().count("xla.gpu.triton")
  assert [kernels(platform) for platform in ("cuda", "cpu", "tpu")] == [3, 0, 0]


def test_what_the_kernels_do_not_support_is_computed_in_plain_jax():
  supports = attention_kernel.supports
  assert supports((256, 197, 36, 64), "bfloat16")
  assert not supports((256, 513, 36, 64), "bfloat16")
  assert not supports((256, 257, 36, 64), "float32")
  assert not supports((256, 197, 36, 32), "bfloat16")
  assert not supports((256, 197, 36, 64), "float16")
  assert not supports((2**13, 197, 36, 64), "bfloat16")
  qkv, bias, _ = inputs(9, width=8)
  attend = jax.jit(lambda *args, name: attention.attend(*args, implementation=name), static_argnames="name")
  pallas, xla = (attend(*np.split(qkv, 3, axis=2), bias, name=name) for name in ("pallas", "xla"))
  np.testing.assert_array_equal(pallas, xla)


def test_the_student_computes_the_same_with_and_without_splitting():
  sizes = {"patch_size": 4, "width": 128, "depth": 2, "num_heads": 2, "out_dim": 10}
  image = jnp.array(np.random.default_rng(1).standard_normal((2, 12, 8, 3), np.float32))
  shapes = jax.eval_shape(vit.VisionTransformer(**sizes).init, jax.random.key(0), image)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32), shapes)

  def gradient(name):
    model = vit.VisionTransformer(**sizes, attention=name)
    forward = lambda params: model.apply({"params": params}, image)["prediction"]
    return jax.jit(jax.grad(lambda params: jnp.mean(forward(params) ** 2)))(params)

  plain = gradient("xla")
  assert np.abs(plain["blocks"]["attn"]["q_bias"]).max() > 0
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), gradient("pallas"), plain)
