"""The student: a vision transformer with relative position bias, layer scale and a mask token.

    model = build("B", out_dim=512)
    params = init(model, key, image_size=224)
    outputs = model.apply({"params": params}, image_BHW3, mask_BN, train=True, rngs={"drop_path": key})

The blocks run under `nn.scan`: their parameters are stacked [L, ...] below params["blocks"].
"""

from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dtm_jax.arrays import Array, Bool, Float, PyTree, RandomKey
from dtm_jax.errors import OptionError
from dtm_jax.models.layers import (
  FLOAT32_NORM,
  Initializer,
  Mlp,
  PatchEmbed,
  grid_of,
  merge_heads,
  split_heads,
)

VARIANTS = {
  "Ti": {"width": 192, "depth": 12, "num_heads": 3},
  "S": {"width": 384, "depth": 12, "num_heads": 6},
  "B": {"width": 768, "depth": 12, "num_heads": 12},
  "L": {"width": 1024, "depth": 24, "num_heads": 16},
}
REMATS = ("none", "attention", "elementwise", "block")
REMAT_POLICIES = {"elementwise": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "block": None}
EPS = 1e-6

# N(0, 0.02²) cut at one standard deviation: what remains has standard deviation 0.01079.
normal = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)
zeros = nn.initializers.zeros_init()


class Trunk(nn.Module):
  """Patches, class token, positions and blocks: what the student shares with the classifier made from it.

  Attributes:
    shared_rel_pos_bias: one table of relative position biases for all blocks.
    rel_pos_bias: a table for each block; with both, they add up.
    abs_pos_emb: a learned embedding of each place, added before the first block.
    layer_scale_init: initial factor of every residual branch; 0 or None for no factors.
    drop_path: rate of stochastic depth in the last block, growing linearly from 0 in the first.
    remat: what the backward pass computes again: "none", "attention" (logits and softmax), "elementwise"
      (also norms, activations and all else but the products with kernels) or "block" (everything).
    unroll: how many blocks one iteration of the scan holds: more take longer to compile, and spare copies of
      what the backward pass needs (a sixth of the quickstart's time on a CPU).
    dtype: of the matrix products; parameters, softmax and residual stream are float32.
  """

  patch_size: int = 16
  width: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_ratio: float = 4.0
  shared_rel_pos_bias: bool = True
  rel_pos_bias: bool = True
  abs_pos_emb: bool = False
  layer_scale_init: float | None = 0.1
  drop_path: float = 0.0
  remat: str = "elementwise"
  unroll: int = 1
  dtype: str = "float32"

  # Initial values of kernels and tokens, and of the patches' kernel and bias.
  kernel_init = patch_init = staticmethod(normal)
  patch_bias_init = staticmethod(zeros)

  def __post_init__(self):
    if self.remat not in REMATS:
      raise OptionError(f"Unknown remat {self.remat!r}. Available: {', '.join(REMATS)}.")
    if self.width % self.num_heads:
      raise OptionError(f"Width {self.width} is not divisible by {self.num_heads} heads.")
    super().__post_init__()

  def embed(self, image_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
    """One token for each patch."""
    return PatchEmbed(
      self.width, self.patch_size, True, self.patch_init, self.dtype, self.patch_bias_init, name="patch_embed"
    )(image_BHW3)

  def encode(
    self, patches: Float[Array, "B N D"], grid: tuple[int, int], train: bool, every_block: bool = False
  ) -> Float[Array, "*L B T D"]:
    """The residual stream after the last block, CLS first; after each with `every_block` [L, B, T, D]."""
    cls = self.param("cls_token", self.kernel_init, (self.width,))
    cls = jnp.broadcast_to(cls, (patches.shape[0], 1, self.width))
    tokens = jnp.concatenate([cls, patches], axis=1)
    if self.abs_pos_emb:
      tokens += self.param("pos_embed", self.kernel_init, tokens.shape[1:])[None]
    shared_bias = (
      RelativePositionBias(self.num_heads, grid, name="rel_pos_bias")() if self.shared_rel_pos_bias else None
    )
    rates = jnp.linspace(0.0, self.drop_path, self.depth)
    last, every = self._blocks(grid, train, every_block)(tokens, rates, shared_bias)
    return every if every_block else last

  def _blocks(self, grid: tuple[int, int], train: bool, every_block: bool) -> nn.Module:
    block = Block
    if self.remat in REMAT_POLICIES:
      block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
    scan = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "drop_path": True},
      in_axes=(0, nn.broadcast),
      length=self.depth,
      unroll=self.unroll,
    )
    return scan(
      num_heads=self.num_heads,
      mlp_hidden=round(self.mlp_ratio * self.width),
      bias_grid=grid if self.rel_pos_bias else None,
      layer_scale_init=self.layer_scale_init,
      drop_path=train and self.drop_path > 0,
      remat_attention=self.remat == "attention",
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      tap=every_block,
      name="blocks",
    )


class VisionTransformer(Trunk):
  """The student of Dynamic Token Morphing (the transformer of BEiT v2, arXiv 2208.06366).

  Attributes:
    out_dim: width of the linear head on the patch tokens; None for no head.
  """

  out_dim: int | None = None

  @nn.compact
  def __call__(
    self,
    image_BHW3: Float[Array, "B H W 3"],
    mask_BN: Bool[Array, "B N"] | None = None,
    *,
    train: bool = False,
  ) -> dict[str, Array]:
    """Tokens of normalised images; patches with mask_BN True are hidden behind the mask token.

    Returns:
      tokens [B, 1+N, D]: the residual stream after the last block; cls [B, D] and patches [B, N, D]:
      its final LayerNorm; prediction [B, N, out_dim]: the head on the patches (if there is one).

    Raises:
      OptionError: the image is not a whole number of patches.
    """
    patches = self.embed(image_BHW3)
    mask_token = self.param("mask_token", normal, (self.width,))
    if mask_BN is not None:
      patches = jnp.where(mask_BN[:, :, None], mask_token[None, None, :], patches)
    tokens = self.encode(patches, grid_of(image_BHW3.shape, self.patch_size), train)
    normed = FLOAT32_NORM(epsilon=EPS, name="norm")(tokens)
    outputs = {"tokens": tokens, "cls": normed[:, 0], "patches": normed[:, 1:]}
    if self.out_dim is not None:
      head = nn.Dense(self.out_dim, kernel_init=normal, dtype=self.dtype, name="head")
      outputs["prediction"] = head(normed[:, 1:]).astype(jnp.float32)
    return outputs


class Block(nn.Module):
  """x += drop(layer_scale1 * attention(ln1(x))); x += drop(layer_scale2 * mlp(ln2(x)))."""

  num_heads: int
  mlp_hidden: int
  bias_grid: tuple[int, int] | None
  layer_scale_init: float | None
  drop_path: bool
  remat_attention: bool
  kernel_init: Initializer
  dtype: str
  tap: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], drop_rate: Float[Array, ""], shared_bias: Array | None):
    norm = partial(nn.LayerNorm, epsilon=EPS, use_fast_variance=False, dtype=self.dtype)
    init, gelu = self.kernel_init, partial(nn.gelu, approximate=False)
    attention = Attention(self.num_heads, self.bias_grid, self.remat_attention, init, self.dtype, name="attn")
    mlp = Mlp(self.mlp_hidden, gelu, init, init, self.dtype, name="mlp")
    x += self._branch("layer_scale1", attention(norm(name="ln1")(x), shared_bias), drop_rate)
    x += self._branch("layer_scale2", mlp(norm(name="ln2")(x)), drop_rate)
    return x, (x if self.tap else None)

  def _branch(self, name: str, branch: Float[Array, "B T D"], drop_rate: Float[Array, ""]):
    branch = branch.astype(jnp.float32)
    if self.layer_scale_init:
      scale = self.param(name, nn.initializers.constant(self.layer_scale_init), branch.shape[-1:])
      branch *= scale[None, None, :]
    if self.drop_path:
      survive = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_rate, (branch.shape[0], 1, 1))
      branch *= survive / (1 - drop_rate)
    return branch


class Attention(nn.Module):
  """softmax(q kᵀ / sqrt(d) + own bias + shared bias) v; queries and values have a bias, keys none."""

  num_heads: int
  bias_grid: tuple[int, int] | None
  remat: bool
  kernel_init: Initializer
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], shared_bias: Array | None) -> Float[Array, "B T D"]:
    width = x.shape[-1]
    dense = partial(nn.Dense, kernel_init=self.kernel_init, dtype=self.dtype)
    fused = dense(3 * width, use_bias=False, name="qkv")(x)
    query, key, value = jnp.split(fused, 3, axis=-1)
    query += self.param("q_bias", zeros, (width,)).astype(query.dtype)[None, None, :]
    value += self.param("v_bias", zeros, (width,)).astype(value.dtype)[None, None, :]
    query *= (width // self.num_heads) ** -0.5
    query, key, value = (split_heads(each, self.num_heads) for each in (query, key, value))

    bias = shared_bias
    if self.bias_grid is not None:
      own_bias = RelativePositionBias(self.num_heads, self.bias_grid, name="rel_pos_bias")()
      bias = own_bias if bias is None else own_bias + bias
    attend = partial(jax.nn.dot_product_attention, scale=1.0, implementation="xla")
    if self.remat:
      attend = jax.checkpoint(attend, prevent_cse=False)
    mixed = merge_heads(attend(query, key, value, bias))
    return dense(width, name="proj")(mixed)


class RelativePositionBias(nn.Module):
  """A learned number for each head and offset between two patches, and three for what involves CLS."""

  num_heads: int
  grid: tuple[int, int]

  @nn.compact
  def __call__(self) -> Float[Array, "1 A T T"]:
    index = relative_position_index(*self.grid)
    table = self.param("table", zeros, (1 + index.max(), self.num_heads))
    return rearrange(jnp.take(table, index, axis=0), "q k a -> 1 a q k")


@lru_cache
def relative_position_index(rows: int, columns: int) -> np.ndarray:
  """The row of the bias table [(2r-1)(2c-1) + 3, A] for each (query, key), int [1+N, 1+N].

  Patches i -> j at offset (dy, dx) = place_i - place_j: (dy + r - 1)(2c - 1) + dx + c - 1.
  The last three rows: CLS -> patch, patch -> CLS, CLS -> CLS.
  """
  y, x = np.divmod(np.arange(rows * columns), columns)
  dy, dx = (place[:, None] - place[None, :] for place in (y, x))
  num_offsets = (2 * rows - 1) * (2 * columns - 1)
  index = np.full((1 + y.size, 1 + y.size), num_offsets)
  index[1:, 0] += 1
  index[0, 0] += 2
  index[1:, 1:] = (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
  return index


def build(variant: str = "B", **overrides) -> VisionTransformer:
  """The student of a named size; `overrides` are the attributes of `VisionTransformer`.

  Raises:
    OptionError: there is no such variant.
  """
  return VisionTransformer(**{**sizes(variant), **overrides})


def sizes(variant: str) -> dict[str, int]:
  """Width, depth and heads of a named size.

  Raises:
    OptionError: there is no such variant.
  """
  if variant not in VARIANTS:
    raise OptionError(f"Unknown variant {variant!r}. Available: {', '.join(VARIANTS)}.")
  return VARIANTS[variant]


def init(model: Trunk, key: RandomKey, image_size: int) -> PyTree:
  """Initial parameters; what block l = 1..L adds to the residual stream is scaled by 1 / sqrt(2 l)."""
  params = model.init(key, jnp.zeros((1, image_size, image_size, 3)))["params"]
  scale = 1 / jnp.sqrt(2 * jnp.arange(1, model.depth + 1))[:, None, None]
  blocks = params["blocks"]
  for last in (blocks["attn"]["proj"], blocks["mlp"]["fc2"]):
    last["kernel"] *= scale
  return params
