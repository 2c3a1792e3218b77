"""Layers that the student, CLIP and the other frozen towers share.

Parameters and the outputs of a tower are float32. `dtype` is the type of the matrix products, and
`stream_dtype` that of the residual stream. In this file, T is the number of tokens of any kind, and d = D/A
is the width of one head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.nn.initializers import Initializer

from dtm_jax.arrays import Array, Float, PyTree
from dtm_jax.errors import OptionError, check_choice
from dtm_jax.models.attention import Implementation, attend

FLOAT32_NORM = partial(nn.LayerNorm, use_fast_variance=False, dtype="float32")
ACTIVATIONS: dict[str, Callable] = {
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "gelu": partial(nn.gelu, approximate=False),
  "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class Tower:
  """The sizes of one transformer.

  Attributes:
    width: D.
    depth: L, the number of blocks.
    num_heads: A. None if the files of the weights do not give it; such a tower cannot be applied.
    mlp_width: width of the hidden layer of the MLPs.
    activation: one of ACTIVATIONS, or None if the files do not give it.
    eps: epsilon of the LayerNorms.

  Raises:
    OptionError: the activation is unknown, or the heads do not divide the width.
  """

  width: int
  depth: int
  num_heads: int | None
  mlp_width: int
  activation: str | None = "quick_gelu"
  eps: float = 1e-5

  def __post_init__(self):
    if self.activation is not None:
      check_choice("activation", self.activation, ACTIVATIONS)
    if self.num_heads is not None and (self.num_heads < 1 or self.width % self.num_heads):
      raise OptionError(f"Width {self.width} is not divisible by {self.num_heads} heads.")

  def unknown(self) -> list[str]:
    """Return which of "heads" and "activation" are unknown."""
    facts = {"heads": self.num_heads, "activation": self.activation}
    return [name for name, value in facts.items() if value is None]

  def known(self) -> tuple[int, str]:
    """Return the number of heads and the activation.

    Raises:
      OptionError: one of them is unknown.
    """
    if self.num_heads is None or self.activation is None:
      missing = " and ".join(self.unknown())
      raise OptionError(f"The files of the weights do not give {missing} of the tower. Give them as options.")
    return self.num_heads, self.activation


def grid_of(image_shape: tuple[int, ...], patch_size: int) -> tuple[int, int]:
  """Return the (rows, columns) of patches in an image [..., H, W, 3].

  Raises:
    OptionError: the patch size does not divide the height and the width.
  """
  height, width = image_shape[-3:-1]
  if height % patch_size or width % patch_size:
    raise OptionError(f"Image size {height}x{width} is not divisible by patch size {patch_size}.")
  return height // patch_size, width // patch_size


class PatchEmbed(nn.Module):
  """Map every patch linearly to a token: a convolution with its kernel size as stride, as one product."""

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
  """Multi-head self-attention with a separate linear map for query, key and value.

  Attributes:
    causal: whether a token sees only itself and the tokens before it.
    implementation: see `models.attention`.
  """

  tower: Tower
  causal: bool
  implementation: Implementation
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    width, depth = self.tower.width, self.tower.depth
    normal = nn.initializers.normal
    dense = partial(nn.Dense, width, dtype=self.dtype)
    num_heads, _ = self.tower.known()
    query, key, value = (
      split_heads(dense(kernel_init=normal(width**-0.5), name=name)(x), num_heads)
      for name in ("query", "key", "value")
    )
    mixed = attend(query, key, value, causal=self.causal, implementation=self.implementation)
    return dense(kernel_init=normal((2 * depth * width) ** -0.5), name="out")(merge_heads(mixed))


class Mlp(nn.Module):
  """Compute fc2(activation(fc1(x))) for every token."""

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
  """Split the channels into A heads; the d = D/A channels of a head are consecutive."""
  return rearrange(x, "b t (a d) -> b t a d", a=num_heads)


def merge_heads(x: Float[Array, "B T A d"]) -> Float[Array, "B T D"]:
  """Join the heads to one axis of channels; the inverse of `split_heads`."""
  return rearrange(x, "b t a d -> b t (a d)")


def variable_shapes(model: nn.Module, *inputs: jax.ShapeDtypeStruct) -> PyTree:
  """Return the shapes of the variables that `model.init` makes for such inputs. Computes nothing."""
  return jax.tree.map(lambda shape: shape, _variable_shapes(model, *inputs))  # a copy: callers may change it


@lru_cache(maxsize=128)
def _variable_shapes(model: nn.Module, *inputs: jax.ShapeDtypeStruct) -> PyTree:
  """Trace a model once, because a run asks for its shapes at several places."""
  return jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), *inputs)


def image_shape(height: int, width: int) -> jax.ShapeDtypeStruct:
  """Return the shape of one float32 image [1, H, W, 3], for `variable_shapes`."""
  return jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
