"""The student: a vision transformer with relative position biases, layer scale and a mask token.

    model = build("B", out_dim=512)
    params = init(model, key, image_size=224)
    outputs = model.apply({"params": params}, image_BHW3, mask_BN, train=True, rngs={"drop_path": key})

The blocks run under `nn.scan`, so their parameters are stacked [L, ...] below params["blocks"]. In this file,
T = 1+N tokens are CLS and the patches.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from dtm_jax.arrays import Array, Bool, Float, PyTree, RandomKey
from dtm_jax.devices import resolved
from dtm_jax.errors import OptionError, check_choice
from dtm_jax.models.attention import IMPLEMENTATIONS, Implementation
from dtm_jax.models.layers import (
  FLOAT32_NORM,
  Mlp,
  PatchEmbed,
  grid_of,
  image_shape,
  variable_shapes,
)
from dtm_jax.models.vit.attention import Attention, RelativePositionBias

VARIANTS = {
  "Ti": {"width": 192, "depth": 12, "num_heads": 3},
  "S": {"width": 384, "depth": 12, "num_heads": 6},
  "B": {"width": 768, "depth": 12, "num_heads": 12},
  "L": {"width": 1024, "depth": 24, "num_heads": 16},
}
REMATS = ("none", "attention", "activations", "elementwise", "block")
STREAM_DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = {"elementwise": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "block": None}
EPS = 1e-6

# N(0, 0.02²) truncated at one standard deviation has the standard deviation 0.01079.
normal = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)
zeros = nn.initializers.zeros_init()


class Trunk(nn.Module):
  """Patches, class token, positions and blocks, which the student, the classifier and the segmenter share.

  Attributes:
    patch_size: pixels of a side.
    width, depth, num_heads: D, L and A.
    mlp_ratio: width of the MLPs' hidden layer, divided by D.
    shared_rel_pos_bias: whether one table of relative position biases serves all blocks.
    rel_pos_bias: whether each block has its own table. Both tables add up.
    abs_pos_emb: whether a learned embedding of each position is added before the first block.
    layer_scale_init: initial factor of every residual branch; 0 or None for no factors.
    drop_path: rate of stochastic depth in the last block. It grows linearly from 0 in the first block.
    remat: what the backward pass computes again: "none", "attention" (logits and softmax), "activations"
      (those and the GELU), "elementwise" (everything but the products with kernels) or "block" (everything).
    unroll: number of blocks in one iteration of the scan. More blocks take longer to compile and save copies
      for the backward pass (a sixth of the quickstart's time on a CPU).
    dtype: type of the matrix products. Parameters, the statistics of LayerNorms, softmax and outputs are
      float32.
    stream_dtype: type of the residual stream between the blocks, one of STREAM_DTYPES.
    attention: implementation of attention, see `models.attention`.

  Raises:
    OptionError: a choice is unknown, or the heads do not divide the width.
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
  stream_dtype: str = "float32"
  attention: Implementation = "xla"

  # Initial values of kernels and tokens, and of the kernel and the bias of the patch embedding.
  kernel_init = patch_init = staticmethod(normal)
  patch_bias_init = staticmethod(zeros)

  def __post_init__(self):
    check_choice("remat", self.remat, REMATS)
    check_choice("stream_dtype", self.stream_dtype, STREAM_DTYPES)
    check_choice("attention", self.attention, IMPLEMENTATIONS)
    if self.width % self.num_heads:
      raise OptionError(f"Width {self.width} is not divisible by {self.num_heads} heads.")
    super().__post_init__()

  def embed(self, image_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
    """Return one token for each patch of a normalised image, before positions."""
    return PatchEmbed(
      self.width, self.patch_size, True, self.patch_init, self.dtype, self.patch_bias_init, name="patch_embed"
    )(image_BHW3)

  def encode(
    self, patches: Float[Array, "B N D"], grid: tuple[int, int], train: bool, every_block: bool = False
  ) -> Float[Array, "*L B T D"]:
    """Return the residual stream [B, T, D] after the last block, CLS first, as float32.

    With `every_block`, returns it after each block [L, B, T, D].
    """
    cls = self.param("cls_token", self.kernel_init, (self.width,))
    cls = jnp.broadcast_to(cls, (patches.shape[0], 1, self.width))
    tokens = jnp.concatenate([cls, patches], axis=1)
    if self.abs_pos_emb:
      tokens += self.param("pos_embed", self.kernel_init, tokens.shape[1:])[None]
    shared_bias = (
      RelativePositionBias(self.num_heads, grid, name="rel_pos_bias")() if self.shared_rel_pos_bias else None
    )
    rates = jnp.linspace(0.0, self.drop_path, self.depth)
    blocks = self._blocks(grid, train, every_block)
    last, every = blocks(tokens.astype(self.stream_dtype), rates, shared_bias)
    return (every if every_block else last).astype(jnp.float32)

  def _blocks(self, grid: tuple[int, int], train: bool, every_block: bool) -> nn.Module:
    """Return the blocks under `nn.scan`, rematerialised as `remat` says."""
    block, drops = Block, train and self.drop_path > 0
    if self.remat in REMAT_POLICIES:
      block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
    scan = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "drop_path": True},
      in_axes=(0, nn.broadcast),
      length=self.depth,
      # The check traces a block twice. Without it, a seed would give other numbers.
      check_constancy_invariants=self.is_initializing() or drops,
      unroll=self.unroll,
    )
    return scan(
      num_heads=self.num_heads,
      mlp_hidden=round(self.mlp_ratio * self.width),
      bias_grid=grid if self.rel_pos_bias else None,
      layer_scale_init=self.layer_scale_init,
      drop_path=drops,
      remat_attention=self.remat in ("attention", "activations"),
      remat_gelu=self.remat == "activations",
      implementation=self.attention,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      tap=every_block,
      name="blocks",
    )


class VisionTransformer(Trunk):
  """The student of Dynamic Token Morphing, the transformer of BEiT v2 (arXiv 2208.06366).

  Attributes:
    out_dim: C, the width of the linear head on the patch tokens; None for no head.
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
    """Return the tokens of normalised images. The mask token replaces patches with mask_BN True.

    Returns:
      tokens [B, 1+N, D]: the residual stream after the last block.
      cls [B, D] and patches [B, N, D]: the final LayerNorm of `tokens`.
      prediction [B, N, C]: the head on `patches`, unless `out_dim` is None.

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
  """Compute x += drop(layer_scale1 * attention(ln1(x))), then x += drop(layer_scale2 * mlp(ln2(x))).

  `drop` is stochastic depth. The branches have the type of x. The block also returns x as the second output
  if `tap` is set.
  """

  num_heads: int
  mlp_hidden: int
  bias_grid: tuple[int, int] | None
  layer_scale_init: float | None
  drop_path: bool
  remat_attention: bool
  remat_gelu: bool
  kernel_init: Initializer
  dtype: str
  implementation: Implementation
  tap: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], drop_rate: Float[Array, ""], shared_bias: Array | None):
    norm = partial(nn.LayerNorm, epsilon=EPS, use_fast_variance=False, dtype=self.dtype)
    init = self.kernel_init
    gelu: Callable[..., Array] = partial(nn.gelu, approximate=False)
    if self.remat_gelu:
      gelu = jax.checkpoint(gelu)
    attention = Attention(
      self.num_heads, self.bias_grid, self.remat_attention, init, self.dtype, self.implementation, name="attn"
    )
    mlp = Mlp(self.mlp_hidden, gelu, init, init, self.dtype, name="mlp")
    x += self._branch("layer_scale1", attention(norm(name="ln1")(x), shared_bias), drop_rate, x.dtype)
    x += self._branch("layer_scale2", mlp(norm(name="ln2")(x)), drop_rate, x.dtype)
    return x, (x if self.tap else None)

  def _branch(
    self, name: str, branch: Float[Array, "B T D"], drop_rate: Float[Array, ""], dtype: DTypeLike
  ) -> Float[Array, "B T D"]:
    branch = branch.astype(dtype)
    if self.layer_scale_init:
      scale = self.param(name, nn.initializers.constant(self.layer_scale_init), branch.shape[-1:])
      branch *= scale.astype(dtype)[None, None, :]
    if self.drop_path:
      survive = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_rate, (branch.shape[0], 1, 1))
      branch *= (survive / (1 - drop_rate)).astype(dtype)
    return branch


def build(variant: str = "B", **overrides) -> VisionTransformer:
  """Return the student of a size in VARIANTS; `overrides` are attributes of `VisionTransformer`.

  An attribute that is "auto" gets the value that suits the device (see `devices`).

  Raises:
    OptionError: the variant is unknown.
  """
  return VisionTransformer(**resolved({**sizes(variant), **overrides}))


def sizes(variant: str) -> dict[str, int]:
  """Return width, depth and heads of a size in VARIANTS.

  Raises:
    OptionError: the variant is unknown.
  """
  check_choice("variant", variant, VARIANTS)
  return VARIANTS[variant]


def init(model: Trunk, key: RandomKey, image_size: int) -> PyTree:
  """Return initial parameters. Divides the kernels that end a branch of block l = 1..L by sqrt(2 l)."""
  params = model.init(key, jnp.zeros((1, image_size, image_size, 3)))["params"]
  scale = 1 / jnp.sqrt(2 * jnp.arange(1, model.depth + 1))[:, None, None]
  blocks = params["blocks"]
  for last in (blocks["attn"]["proj"], blocks["mlp"]["fc2"]):
    last["kernel"] *= scale
  return params


def init_shapes(model: Trunk, image_size: int) -> PyTree:
  """Return the shapes of the parameters that `init` makes."""
  return variable_shapes(model, image_shape(image_size, image_size))["params"]
