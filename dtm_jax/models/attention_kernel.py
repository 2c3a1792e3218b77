"""Attention of short sequences in Pallas kernels for NVIDIA GPUs (Triton). `models.attention` calls them.

One program holds all keys of a head in one tile, so logits and probabilities never leave the chip and no
running maximum is needed. Queries, keys and values are read from the output of one linear map, and their
gradients are written to one array of the same layout, so nothing is split or joined.

The forward pass keeps the logarithm of each softmax denominator (lse). The backward pass computes the
probabilities again in two kernels, one by queries and one by keys. The bias is shared by all images. Each
program of the kernel by queries adds up the gradient of a tile of the bias over a part of the batch, and one
reduction adds the parts. So the result is the same in every run.

Letters of this file: T tokens, A heads, H = 3A (heads of queries, then keys, then values), d channels of a
head, P parts of the batch, R rows of a tile, Z columns: T padded to a power of two. What is padded is masked.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dtm_jax.arrays import Array, Float

HEAD_WIDTH = 64
MAX_TOKENS = {"bfloat16": 512, "float32": 256}
"""The largest T of each type. More float32 keys do not fit the shared memory of an H100."""
PARTS = 8
"""The largest number of parts of the batch over which the gradient of the bias is added up separately."""

_LOWEST = -1e30
_MAX_ELEMENTS = 2**31 - 1  # the kernels index with 32 bits

Ref = Any
"""A reference to memory of the device, as Pallas passes it to a kernel."""


def supports(shape_BTHd: tuple[int, ...], dtype: Any) -> bool:
  """Return whether the kernels can compute the attention of such queries, keys and values."""
  batch_size, num_tokens, heads, width = shape_BTHd
  small = batch_size * num_tokens * heads * width <= _MAX_ELEMENTS
  return small and width == HEAD_WIDTH and num_tokens <= MAX_TOKENS.get(jnp.dtype(dtype).name, 0)


@dataclasses.dataclass(frozen=True)
class _Tile:
  """The logits that one program holds: R rows by Z columns, both powers of two.

  Attributes:
    most_rows: the largest R for half precision and up to 256 columns.
    scale: factor of the logits.
    interpret: whether the program runs without a GPU.
  """

  num_tokens: int
  dtype: str
  most_rows: int
  scale: float
  interpret: bool

  @property
  def columns(self) -> int:
    return max(16, pl.next_power_of_2(self.num_tokens))

  @property
  def rows(self) -> int:
    halvings = (self.columns > 256) + (self.dtype == "float32")  # or registers and shared memory overflow
    return max(16, min(self.columns, self.most_rows >> halvings))

  def dot(self, left: Array, right: Array, transposed: bool = False) -> Array:
    """Return the float32 product of two matrices, the second of which may be `transposed`.

    Tensor cores have no float32. Three products of TensorFloat-32 have nearly its precision.
    """
    precision: Any = None
    if self.dtype == "float32":
      precision = jax.lax.Precision.HIGHEST
      if not self.interpret:
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return plgpu.dot(left, right, trans_b=transposed, precision=precision)

  def call(self, kernel: Any, batch_size: int, heads: int, **options: Any) -> Any:
    """Return the function that runs `kernel` for every image (or part), head and tile of rows."""
    return pl.pallas_call(
      functools.partial(kernel, tile=self),
      grid=(batch_size, heads, pl.cdiv(self.num_tokens, self.rows)),
      compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
      interpret=self.interpret,
      **options,
    )


def forward(
  qkv_BTHd: Float[Array, "B T H d"],
  bias_1ATT: Float[Array, "1 A T T"] | None,
  *,
  scale: float,
  interpret: bool = False,
) -> tuple[Float[Array, "B T A d"], Float[Array, "B A T"]]:
  """Return softmax(scale q kᵀ + bias) v, and the logarithm of the denominator of each softmax (lse).

  `interpret` runs the kernel without a GPU: slowly, for tests.
  """
  batch_size, num_tokens, heads, width = qkv_BTHd.shape
  heads //= 3
  mixed = jax.ShapeDtypeStruct((batch_size, num_tokens, heads, width), qkv_BTHd.dtype)
  lse = jax.ShapeDtypeStruct((batch_size, heads, num_tokens), jnp.float32)
  tile = _Tile(num_tokens, qkv_BTHd.dtype.name, 64, scale, interpret)
  return tile.call(_mix, batch_size, heads, out_shape=(mixed, lse))(qkv_BTHd, *_given(bias_1ATT))


def backward(
  qkv_BTHd: Float[Array, "B T H d"],
  bias_1ATT: Float[Array, "1 A T T"] | None,
  lse_BAT: Float[Array, "B A T"],
  grad_BTAd: Float[Array, "B T A d"],
  *,
  scale: float,
  interpret: bool = False,
) -> tuple[Float[Array, "B T H d"], Float[Array, "1 A T T"] | None]:
  """Return the gradients of `qkv_BTHd` and of the bias, summed over the images."""
  batch_size, num_tokens, heads, _ = qkv_BTHd.shape
  heads //= 3
  parts = batch_size
  if bias_1ATT is not None:
    parts = next(p for p in range(min(PARTS, batch_size), 0, -1) if batch_size % p == 0)
  like_qkv = jax.ShapeDtypeStruct(qkv_BTHd.shape, qkv_BTHd.dtype)
  delta = jax.ShapeDtypeStruct(lse_BAT.shape, jnp.float32)
  sums = jax.ShapeDtypeStruct((parts, heads, num_tokens, num_tokens), jnp.float32)
  tile = _Tile(num_tokens, qkv_BTHd.dtype.name, 32, scale, interpret)
  grads, delta_BAT, *sum_PATT = tile.call(
    functools.partial(_grads_by_query, images=batch_size // parts), parts, heads,
    out_shape=(like_qkv, delta, *([] if bias_1ATT is None else [sums])),
  )(qkv_BTHd, lse_BAT, grad_BTAd, *_given(bias_1ATT))  # fmt: skip

  # The kernel by keys completes the same array.
  tile = dataclasses.replace(tile, most_rows=64)
  grads = tile.call(_grads_by_key, batch_size, heads, out_shape=like_qkv, input_output_aliases={0: 0})(
    grads, qkv_BTHd, lse_BAT, delta_BAT, grad_BTAd, *_given(bias_1ATT, transposed=True)
  )
  if bias_1ATT is None:
    return grads, None
  return grads, sum_PATT[0].sum(axis=0, keepdims=True).astype(bias_1ATT.dtype)


def _mix(qkv_ref: Ref, *refs: Ref, tile: _Tile) -> None:
  """Compute a tile of queries of one head of one image."""
  *bias_ref, mixed_ref, lse_ref = refs
  image, head, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * tile.rows
  rows, columns = tile.rows, tile.columns
  heads = mixed_ref.shape[2]
  query_Rd = _tokens(qkv_ref, image, head, first, rows)
  key_Zd = _tokens(qkv_ref, image, heads + head, 0, columns)
  logit_RZ = _logits(query_Rd, key_Zd, bias_ref, head, first, tile)
  logit_RZ = jnp.where(_inside(0, columns, qkv_ref)[None, :], logit_RZ, _LOWEST)
  highest_R = jnp.max(logit_RZ, axis=1)
  weight_RZ = jnp.exp(logit_RZ - highest_R[:, None])
  total_R = jnp.sum(weight_RZ, axis=1)
  value_Zd = _tokens(qkv_ref, image, 2 * heads + head, 0, columns)
  mixed_Rd = tile.dot(weight_RZ.astype(value_Zd.dtype), value_Zd) / total_R[:, None]
  inside_R = _inside(first, rows, qkv_ref)
  _store(mixed_ref.at[image, pl.ds(first, rows), head, :], mixed_Rd, inside_R[:, None])
  _store(lse_ref.at[image, head, pl.ds(first, rows)], highest_R + jnp.log(total_R), inside_R)


def _grads_by_query(qkv_ref: Ref, lse_ref: Ref, grad_ref: Ref, *refs: Ref, images: int, tile: _Tile) -> None:
  """Compute the gradients of a tile of queries in one part of the batch, and of that tile of the bias."""
  bias_ref, (grads_ref, delta_ref, *sum_ref) = (refs[:1], refs[1:]) if len(refs) == 4 else ((), refs)
  part, head, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * tile.rows
  rows, columns = tile.rows, tile.columns
  heads = grad_ref.shape[2]
  inside_R, inside_Z = _inside(first, rows, qkv_ref), _inside(0, columns, qkv_ref)
  inside_RZ = inside_R[:, None] & inside_Z[None, :]

  def one_image(i: Array, sum_RZ: Array) -> Array:
    image = part * images + i
    query_Rd = _tokens(qkv_ref, image, head, first, rows)
    key_Zd = _tokens(qkv_ref, image, heads + head, 0, columns)
    value_Zd = _tokens(qkv_ref, image, 2 * heads + head, 0, columns)
    grad_Rd = _tokens(grad_ref, image, head, first, rows)
    lse_R = plgpu.load(lse_ref.at[image, head, pl.ds(first, rows)], mask=inside_R, other=0.0)
    logit_RZ = _logits(query_Rd, key_Zd, bias_ref, head, first, tile)
    weight_RZ = jnp.where(inside_RZ, jnp.exp(logit_RZ - lse_R[:, None]), 0.0)
    grad_RZ = tile.dot(grad_Rd, value_Zd, transposed=True)
    delta_R = jnp.sum(weight_RZ * grad_RZ, axis=1)
    grad_RZ = weight_RZ * (grad_RZ - delta_R[:, None])
    grad_query_Rd = tile.scale * tile.dot(grad_RZ.astype(key_Zd.dtype), key_Zd)
    _store(grads_ref.at[image, pl.ds(first, rows), head, :], grad_query_Rd, inside_R[:, None])
    _store(delta_ref.at[image, head, pl.ds(first, rows)], delta_R, inside_R)
    return sum_RZ + grad_RZ if sum_ref else sum_RZ

  nothing = jnp.zeros((rows, columns) if sum_ref else (1, 1), jnp.float32)
  sum_RZ = jax.lax.fori_loop(0, images, one_image, nothing)
  if sum_ref:
    _store(sum_ref[0].at[part, head, pl.ds(first, rows), pl.ds(0, columns)], sum_RZ, inside_RZ)


def _grads_by_key(
  _: Ref, qkv_ref: Ref, lse_ref: Ref, delta_ref: Ref, grad_ref: Ref, *refs: Ref, tile: _Tile
) -> None:
  """Compute the gradients of a tile of keys and values of one head of one image; all queries are columns."""
  *bias_ref, grads_ref = refs
  image, head, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * tile.rows
  rows, columns = tile.rows, tile.columns
  heads = grad_ref.shape[2]
  key_Rd = _tokens(qkv_ref, image, heads + head, first, rows)
  value_Rd = _tokens(qkv_ref, image, 2 * heads + head, first, rows)
  query_Zd = _tokens(qkv_ref, image, head, 0, columns)
  grad_Zd = _tokens(grad_ref, image, head, 0, columns)
  inside_R, inside_Z = _inside(first, rows, qkv_ref), _inside(0, columns, qkv_ref)
  lse_Z = plgpu.load(lse_ref.at[image, head, pl.ds(0, columns)], mask=inside_Z, other=0.0)
  delta_Z = plgpu.load(delta_ref.at[image, head, pl.ds(0, columns)], mask=inside_Z, other=0.0)
  logit_RZ = _logits(key_Rd, query_Zd, bias_ref, head, first, tile)
  inside_RZ = inside_R[:, None] & inside_Z[None, :]
  weight_RZ = jnp.where(inside_RZ, jnp.exp(logit_RZ - lse_Z[None, :]), 0.0)
  grad_value_Rd = tile.dot(weight_RZ.astype(grad_Zd.dtype), grad_Zd)
  grad_RZ = weight_RZ * (tile.dot(value_Rd, grad_Zd, transposed=True) - delta_Z[None, :])
  grad_key_Rd = tile.scale * tile.dot(grad_RZ.astype(query_Zd.dtype), query_Zd)
  span = pl.ds(first, rows)
  _store(grads_ref.at[image, span, heads + head, :], grad_key_Rd, inside_R[:, None])
  _store(grads_ref.at[image, span, 2 * heads + head, :], grad_value_Rd, inside_R[:, None])


def _given(bias_1ATT: Array | None, transposed: bool = False) -> list[Array]:
  """Return the bias as a list of arguments, with queries and keys exchanged if `transposed`."""
  if bias_1ATT is None:
    return []
  bias_ATT = bias_1ATT[0]
  return [bias_ATT.swapaxes(1, 2) if transposed else bias_ATT]


def _tokens(ref: Ref, image: Array, head: Array, first: Array | int, count: int) -> Array:
  """Load tokens [count, d] of one head from [B, T, _, d]. Tokens past the last one are 0."""
  inside = _inside(first, count, ref)[:, None]
  return plgpu.load(ref.at[image, pl.ds(first, count), head, :], mask=inside, other=0.0)


def _inside(first: Array | int, count: int, ref: Ref) -> Array:
  """Return which of `count` tokens from `first` on exist in [B, T, _, d]."""
  return first + jnp.arange(count) < ref.shape[1]


def _logits(left_Rd: Array, right_Zd: Array, bias_ref: Any, head: Array, first: Array, tile: _Tile) -> Array:
  """Return the float32 logits of a tile. Those of padded rows and columns mean nothing."""
  logit_RZ = tile.scale * tile.dot(left_Rd, right_Zd, transposed=True)
  for ref in bias_ref:
    inside_R = first + jnp.arange(tile.rows) < tile.num_tokens
    inside_Z = jnp.arange(tile.columns) < tile.num_tokens
    part = ref.at[head, pl.ds(first, tile.rows), pl.ds(0, tile.columns)]
    logit_RZ += plgpu.load(part, mask=inside_R[:, None] & inside_Z[None, :], other=0.0).astype(jnp.float32)
  return logit_RZ


def _store(ref: Ref, value: Array, mask: Array) -> None:
  plgpu.store(ref, value.astype(ref.dtype), mask=jnp.broadcast_to(mask, value.shape))
