"""What the student, CLIP and other frozen towers share: patches, attention, the MLP, split heads.

Parameters are float32; `dtype` is the type of the matrix products. The residual stream and what
leaves a tower stay float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dtm_jax.arrays import Array, Float
from dtm_jax.errors import OptionError

Initializer = nn.initializers.Initializer

FLOAT32_NORM = partial(nn.LayerNorm, use_fast_variance=False, dtype="float32")
ACTIVATIONS = {
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "gelu": partial(nn.gelu, approximate=False),
  "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class Tower:
  """The sizes of one transformer.

  Attributes:
    num_heads, activation: None where files of weights do not tell them; such a tower cannot be applied.
  """

  width: int
  depth: int
  num_heads: int | None
  mlp_width: int
  activation: str | None = "quick_gelu"
  eps: float = 1e-5

  def __post_init__(self):
    if self.activation is not None and self.activation not in ACTIVATIONS:
      raise OptionError(f"Unknown activation {self.activation!r}. Available: {', '.join(ACTIVATIONS)}.")
    if self.num_heads is not None and (self.num_heads < 1 or self.width % self.num_heads):
      raise OptionError(f"Width {self.width} is not divisible by {self.num_heads} heads.")

  def unknown(self) -> list[str]:
    """Return which of "heads" and "activation" are not known."""
    facts = {"heads": self.num_heads, "activation": self.activation}
    return [name for name, value in facts.items() if value is None]

  def known(self) -> "Tower":
    """Return the tower itself.

    Raises:
      OptionError: heads or activation are not known.
    """
    if missing := self.unknown():
      raise OptionError(
        f"The files of the weights do not tell {' and '.join(missing)} of the tower: give them."
      )
    return self


def grid_of(image_shape: tuple[int, ...], patch_size: int) -> tuple[int, int]:
  """(rows, columns) of patches in an image [..., H, W, 3].

  Raises:
    OptionError: the image is not a whole number of patches.
  """
  height, width = image_shape[-3:-1]
  if height % patch_size or width % patch_size:
    raise OptionError(f"Image size {height}x{width} is not divisible by patch size {patch_size}.")
  return height // patch_size, width // patch_size


class PatchEmbed(nn.Module):
  """A linear map of every patch: the convolution whose stride is its kernel, as one matrix product."""

  width: int
  patch_size: int
  use_bias: bool
  kernel_init: Initializer
  dtype: str = "float32"
  bias_init: Initializer = nn.initializers.zeros_init()

  @nn.compact
  def __call__(self, image_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
    rows, columns = grid_of(image_BHW3.shape, self.patch_size)
    pixels = rearrange(image_BHW3, "b (r y) (c x) rgb -> b (r c) (y x rgb)", r=rows, c=columns)
    dense = nn.Dense(
      self.width, use_bias=self.use_bias, kernel_init=self.kernel_init, bias_init=self.bias_init,
      dtype=self.dtype, name="proj",
    )  # fmt: skip
    return dense(pixels).astype(jnp.float32)


class Attention(nn.Module):
  """Multi-head self-attention; `implementation` is that of `jax.nn.dot_product_attention`."""

  tower: Tower
  causal: bool
  implementation: str
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    width, depth = self.tower.width, self.tower.depth
    normal = nn.initializers.normal
    dense = partial(nn.Dense, width, dtype=self.dtype)
    query, key, value = (
      split_heads(dense(kernel_init=normal(width**-0.5), name=name)(x), self.tower.known().num_heads)
      for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(
      query, key, value, is_causal=self.causal, implementation=self.implementation
    )
    return dense(kernel_init=normal((2 * depth * width) ** -0.5), name="out")(merge_heads(mixed))


class Mlp(nn.Module):
  """fc2(activation(fc1(x)))."""

  hidden: int
  activation: Callable
  fc1_init: Initializer
  fc2_init: Initializer
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    hidden = nn.Dense(self.hidden, kernel_init=self.fc1_init, dtype=self.dtype, name="fc1")(x)
    return nn.Dense(x.shape[-1], kernel_init=self.fc2_init, dtype=self.dtype, name="fc2")(
      self.activation(hidden)
    )


def split_heads(x: Float[Array, "B T D"], num_heads: int) -> Float[Array, "B T A d"]:
  """Consecutive channels form a head, as everywhere in the literature."""
  return rearrange(x, "b t (a d) -> b t a d", a=num_heads)


def merge_heads(x: Float[Array, "B T A d"]) -> Float[Array, "B T D"]:
  """Inverse of `split_heads`."""
  return rearrange(x, "b t a d -> b t (a d)")
