"""The image towers of SigLIP, DINOv2, MAE and the plain vision transformer: one family with a few switches.

    tower = FrozenViT(config)
    outputs = tower.apply({"params": params}, image_BHW3)     # outputs["patch_tokens"]

They serve as teachers and are never trained here; `frozen_vit_weights` reads their weights and says what
each of them has. CLIP's tower (`clip.ImageTower`) is not one of them: it has a LayerNorm before its blocks,
a projection after them, and patches without a bias. The attention is the same.
Every block sows its output as "output": `apply(..., mutable="intermediates")` gives them all.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dtm_jax.arrays import Array, Float
from dtm_jax.models.layers import ACTIVATIONS, FLOAT32_NORM, Attention, Mlp, PatchEmbed, Tower, grid_of
from dtm_jax.models.positions import resize_positions

RESIZES = ("bicubic", "bicubic_antialias", "bilinear_antialias")

normal = nn.initializers.normal(0.02)


@dataclass(frozen=True)
class FrozenViTConfig:
  """What the towers differ in.

  Attributes:
    tower: the sizes of the transformer; with `swiglu`, `mlp_width` is that of each of the two halves.
    image_size, patch_size: of the stored, square table of positions; for other images it is resized.
    resize: how; "bicubic" is Keys' with a = -0.75, "bicubic_antialias" with a = -0.5 and a support that
      grows where the grid shrinks, "bilinear_antialias" the like.
    class_token: a token before the patches, with a position of its own.
    num_registers: learned tokens between CLS and the patches, without positions (arXiv 2309.16588).
    layer_scale: a learned factor for each channel of every residual branch.
    swiglu: the MLP is fc2(silu(a) * b) with (a, b) = fc1(x) (arXiv 2002.05202).
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
    if self.resize not in RESIZES:
      raise ValueError(f"Unknown resize {self.resize!r}. Available: {', '.join(RESIZES)}.")


class FrozenViT(nn.Module):
  """A pre-norm vision transformer with learned positions and a final LayerNorm.

  `attention` is the implementation of `jax.nn.dot_product_attention`, `dtype` that of the matrix products.
  """

  config: FrozenViTConfig
  dtype: str = "float32"
  attention: str = "xla"

  @nn.compact
  def __call__(self, image_BHW3: Float[Array, "B H W 3"]) -> dict[str, Array]:
    """Tokens of normalised images.

    Returns:
      pre [B, T, D]: what enters the first block, CLS and the registers first; patch_tokens [B, N, D]: the
      final LayerNorm of the patches; cls [B, D]: that of CLS, if there is one.

    Raises:
      ValueError: the image is not a whole number of patches.
    """
    config, width = self.config, self.config.tower.width
    grid = grid_of(image_BHW3.shape, config.patch_size)
    rows, columns = grid_of((config.image_size, config.image_size, 3), config.patch_size)
    num_positions = rows * columns + config.class_token
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
    )
    stream, _ = scan(config, self.attention, self.dtype, name="blocks")(pre, None)
    normed = FLOAT32_NORM(epsilon=config.tower.eps, name="norm")(stream)
    outputs = {"pre": pre, "patch_tokens": normed[:, config.class_token + config.num_registers :]}
    return outputs | ({"cls": normed[:, 0]} if config.class_token else {})


class Block(nn.Module):
  """x += layer_scale1 * attention(ln1(x)); x += layer_scale2 * mlp(ln2(x))."""

  config: FrozenViTConfig
  implementation: str
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], _: None):
    tower = self.config.tower
    norm = partial(nn.LayerNorm, epsilon=tower.eps, use_fast_variance=False, dtype=self.dtype)
    attention = Attention(tower, False, self.implementation, self.dtype, name="attn")
    if self.config.swiglu:
      mlp = SwiGLU(tower.mlp_width, self.dtype, name="mlp")
    else:
      mlp = Mlp(tower.mlp_width, ACTIVATIONS[tower.activation], normal, normal, self.dtype, name="mlp")
    x += self._scaled("layer_scale1", attention(norm(name="ln1")(x)))
    x += self._scaled("layer_scale2", mlp(norm(name="ln2")(x)))
    self.sow("intermediates", "output", x)
    return x, None

  def _scaled(self, name: str, branch: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    branch = branch.astype(jnp.float32)
    if not self.config.layer_scale:
      return branch
    return branch * self.param(name, nn.initializers.ones, branch.shape[-1:])[None, None, :]


class SwiGLU(nn.Module):
  """fc2(silu(a) * b) with (a, b) the halves of fc1(x)."""

  hidden: int
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    gate, value = jnp.split(nn.Dense(2 * self.hidden, dtype=self.dtype, name="fc1")(x), 2, axis=-1)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(nn.silu(gate) * value)


def resize_table(
  table: Float[Array, "M D"], grid: tuple[int, int], class_token: bool, method: str
) -> Float[Array, "T D"]:
  """The positions [g², D], or [1 + g², D] with a class token's, for another grid of patches."""
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
