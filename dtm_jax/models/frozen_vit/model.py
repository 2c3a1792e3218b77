"""The image towers of SigLIP, DINOv2, MAE and the plain vision transformer, as one model with options.

    tower = FrozenViT(config)
    outputs = tower.apply({"params": params}, image_BHW3)     # outputs["patch_tokens"]

They serve as teachers and are never trained here. `frozen_vit.weights` loads their weights, and
`frozen_vit.config` sets the options of each. CLIP has another tower (`clip.ImageTower`): it has a LayerNorm
before its blocks, a projection after them, and no bias in its patch embedding.

Every block sows its output as "output", so `apply(..., mutable="intermediates")` returns the outputs of all
blocks. In this file, D is the tower's width and T is the number of all tokens.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from dtm_jax.arrays import Array, Float, PyTree
from dtm_jax.errors import check_choice
from dtm_jax.models.attention import Implementation
from dtm_jax.models.layers import (
  ACTIVATIONS,
  FLOAT32_NORM,
  Attention,
  Mlp,
  PatchEmbed,
  Tower,
  grid_of,
  image_shape,
  variable_shapes,
)
from dtm_jax.models.positions import resize_positions

RESIZES = ("bicubic", "bicubic_antialias", "bilinear_antialias")

normal = nn.initializers.normal(0.02)


@dataclass(frozen=True)
class FrozenViTConfig:
  """The options of a frozen tower.

  Attributes:
    tower: the sizes of the transformer. With `swiglu`, `mlp_width` is the width of each of the two halves.
    image_size, patch_size: pixels of a side. They fix the stored position table, which is square; it is
      resized for other images. `image_size` may end with a part of a patch (see `grid`).
    resize: how the position table is resized. "bicubic" is Keys' kernel with a = -0.75. "bicubic_antialias"
      (a = -0.5) and "bilinear_antialias" widen the kernel for a smaller grid.
    class_token: whether a class token with its own position precedes the patches.
    num_registers: number of learned tokens between CLS and the patches, without positions (arXiv 2309.16588).
    layer_scale: whether a learned factor scales each channel of every residual branch.
    swiglu: whether the MLP is fc2(silu(a) * b) with (a, b) = fc1(x) (arXiv 2002.05202).

  Raises:
    OptionError: `resize` is unknown.
  """

  tower: Tower
  image_size: int
  patch_size: int
  resize: str = "bicubic"
  class_token: bool = True
  num_registers: int = 0
  layer_scale: bool = False
  swiglu: bool = False

  def __post_init__(self):
    check_choice("resize", self.resize, RESIZES)

  def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the (rows, columns) of patches in an image [..., H, W, 3].

    At the tower's own `image_size`, a remainder of pixels at the right and bottom borders counts for nothing,
    as in a convolution without padding. SigLIP so400m has 27 patches of 14 pixels in 384 pixels.

    Raises:
      OptionError: the patch size does not divide another image size.
    """
    if tuple(shape[-3:-1]) == (self.image_size, self.image_size):
      side = self.image_size // self.patch_size
      return side, side
    return grid_of(shape, self.patch_size)


class FrozenViT(nn.Module):
  """A pre-norm vision transformer with learned positions and a final LayerNorm.

  Attributes:
    dtype: type of the matrix products.
    attention: implementation, see `models.attention`.
    stream_dtype: type of the residual stream between the blocks.
  """

  config: FrozenViTConfig
  dtype: str = "float32"
  attention: Implementation = "xla"
  stream_dtype: str = "float32"

  @nn.compact
  def __call__(self, image_BHW3: Float[Array, "B H W 3"]) -> dict[str, Array]:
    """Return the tokens of normalised images.

    Returns:
      pre [B, T, D]: the input of the first block: CLS, the registers and the patches.
      patch_tokens [B, N, D]: the final LayerNorm of the patches.
      cls [B, D]: the final LayerNorm of CLS, if there is a class token.

    Raises:
      OptionError: the image is not a whole number of patches (see `FrozenViTConfig.grid`), or the heads are
        unknown.
    """
    config, width = self.config, self.config.tower.width
    rows, columns = grid = config.grid(image_BHW3.shape)
    image_BHW3 = image_BHW3[:, : rows * config.patch_size, : columns * config.patch_size]
    num_positions = (config.image_size // config.patch_size) ** 2 + config.class_token
    table = self.param("position_embedding", normal, (num_positions, width))
    positions = resize_table(jnp.asarray(table), grid, config.class_token, config.resize)

    patches = PatchEmbed(width, config.patch_size, True, normal, self.dtype, name="patch_embed")(image_BHW3)
    tokens = [patches + positions[None, int(config.class_token) :]]
    if config.num_registers:
      tokens.insert(0, self.param("register_tokens", normal, (config.num_registers, width))[None])
    if config.class_token:
      tokens.insert(0, self.param("cls_token", normal, (1, width))[None] + positions[None, :1])
    batch_size = patches.shape[0]
    pre = jnp.concatenate([jnp.broadcast_to(each, (batch_size, *each.shape[1:])) for each in tokens], axis=1)

    scan = nn.scan(
      Block,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      length=config.tower.depth,
      check_constancy_invariants=False,  # which would trace the block twice
    )
    stream, _ = scan(config, self.attention, self.dtype, name="blocks")(pre.astype(self.stream_dtype), None)
    normed = FLOAT32_NORM(epsilon=config.tower.eps, name="norm")(stream)
    outputs = {"pre": pre, "patch_tokens": normed[:, config.class_token + config.num_registers :]}
    return outputs | ({"cls": normed[:, 0]} if config.class_token else {})


class Block(nn.Module):
  """Compute x += layer_scale1 * attention(ln1(x)), then x += layer_scale2 * mlp(ln2(x))."""

  config: FrozenViTConfig
  implementation: Implementation
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], _: None):
    tower = self.config.tower
    activation = tower.known()[1]
    norm = partial(nn.LayerNorm, epsilon=tower.eps, use_fast_variance=False, dtype=self.dtype)
    attention = Attention(tower, False, self.implementation, self.dtype, name="attn")
    if self.config.swiglu:
      mlp = SwiGLU(tower.mlp_width, self.dtype, name="mlp")
    else:
      mlp = Mlp(tower.mlp_width, ACTIVATIONS[activation], normal, normal, self.dtype, name="mlp")
    x += self._scaled("layer_scale1", attention(norm(name="ln1")(x)), x.dtype)
    x += self._scaled("layer_scale2", mlp(norm(name="ln2")(x)), x.dtype)
    self.sow("intermediates", "output", x)
    return x, None

  def _scaled(self, name: str, branch: Float[Array, "B T D"], dtype: DTypeLike) -> Float[Array, "B T D"]:
    branch = branch.astype(dtype)
    if not self.config.layer_scale:
      return branch
    return branch * self.param(name, nn.initializers.ones, branch.shape[-1:]).astype(dtype)[None, None, :]


class SwiGLU(nn.Module):
  """Compute fc2(silu(a) * b), where (a, b) are the halves of fc1(x), for every token."""

  hidden: int
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    gate, value = jnp.split(nn.Dense(2 * self.hidden, dtype=self.dtype, name="fc1")(x), 2, axis=-1)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(nn.silu(gate) * value)


def resize_table(
  table: Float[Array, "rows D"], grid: tuple[int, int], class_token: bool, method: str
) -> Float[Array, "new_rows D"]:
  """Resize positions [g², D], or [1 + g², D] with a class token's, to another grid by a method of RESIZES."""
  first, patches = table[: int(class_token)], table[int(class_token) :]
  side = round(patches.shape[0] ** 0.5)
  if grid == (side, side):
    return table
  if method == "bicubic":
    padded = jnp.concatenate([jnp.zeros_like(table[:1]), patches])
    resized = resize_positions(padded, grid, slack=0.0)[1:]
  else:
    square = rearrange(patches, "(y x) d -> y x d", y=side)
    kind = "cubic" if method == "bicubic_antialias" else "linear"
    square = jax.image.resize(
      square, (*grid, square.shape[-1]), kind, antialias=True, precision=jax.lax.Precision.HIGHEST
    )
    resized = rearrange(square, "r c d -> (r c) d")
  return jnp.concatenate([first, resized])


def param_shapes(config: FrozenViTConfig) -> PyTree:
  """Return the shapes of the tower's parameters."""
  return variable_shapes(FrozenViT(config), image_shape(config.image_size, config.image_size))["params"]
