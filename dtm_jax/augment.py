"""Random changes to a batch of images on the device: flips and colours, normalisation, random erasing.

The host sends uint8 crops; all else happens here, inside the jitted step, in float32 with values in [0, 1].
Each image has a key of its own (`rngs.per_example`), so sharding never changes the result.
"""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dtm_jax.arrays import Array, Float, Key, UInt8
from dtm_jax.normalizations import Triple

LUMINANCE = (0.299, 0.587, 0.114)


def augment(
  keys_B: Key[Array, "B"],
  image: UInt8[Array | np.ndarray, "B H W 3"],
  *,
  flip: float = 0.5,
  color_jitter: float = 0.0,
) -> Float[Array, "B H W 3"]:
  """Colour jitter of strength `color_jitter` (brightness, contrast and saturation alike), then a flip with
  probability `flip`. Values in [0, 1], not normalised."""
  jitter_keys_B, flip_keys_B = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)
  result = to_float(image)
  if color_jitter:
    result = jitter_colors(jitter_keys_B, result, color_jitter, color_jitter, color_jitter)
  return random_flip(flip_keys_B, result, flip)


def to_float(image: UInt8[Array | np.ndarray, "B H W 3"]) -> Float[Array, "B H W 3"]:
  """image / 255 in float32."""
  return jnp.asarray(image, jnp.float32) / 255


def normalize(image: Float[Array, "B H W 3"], mean: Triple, std: Triple) -> Float[Array, "B H W 3"]:
  """(image - mean) / std, channel by channel."""
  mean, std = (jnp.asarray(value, jnp.float32)[None, None, None, :] for value in (mean, std))
  return (image - mean) / std


def resize_to(image: Float[Array, "B H W 3"], side: int) -> Float[Array, "B side side 3"]:
  """Square images with values in [0, 1] at another size: antialiased bicubic, cut off at 0 and 1."""
  if image.shape[1:3] == (side, side):
    return image
  return jnp.clip(jax.image.resize(image, (image.shape[0], side, side, 3), "cubic"), 0.0, 1.0)


def random_flip(
  keys_B: Key[Array, "B"], image: Float[Array, "B H W 3"], prob: float = 0.5
) -> Float[Array, "B H W 3"]:
  """Each image mirrored left to right with probability `prob`."""
  flip_B = jax.vmap(lambda key: jax.random.bernoulli(key, prob))(keys_B)
  return jnp.where(einops.rearrange(flip_B, "B -> B 1 1 1"), image[:, :, ::-1], image)


def jitter_colors(
  keys_B: Key[Array, "B"],
  image: Float[Array, "B H W 3"],
  brightness: float,
  contrast: float,
  saturation: float,
) -> Float[Array, "B H W 3"]:
  """torchvision's ColorJitter without hue.

  Three operations in an order drawn for each image; each is clip(f·x + (1-f)·base, 0, 1) with
  f ~ U[max(0, 1-s), 1+s] for its strength s, and base = 0 (brightness), the mean over pixels of the luminance
  of x (contrast), or that luminance pixel by pixel (saturation). Pillow rounds to whole grey levels after
  each; we do not.
  """
  strengths = jnp.asarray((brightness, contrast, saturation), jnp.float32)

  def jitter(key: Key[Array, ""], x: Float[Array, "H W 3"]) -> Float[Array, "H W 3"]:
    factor_key, order_key = jax.random.split(key)
    low = jnp.maximum(0.0, 1 - strengths)
    factors = low + (1 + strengths - low) * jax.random.uniform(factor_key, (3,))
    for operation in jax.random.permutation(order_key, 3):
      luminance = jnp.einsum("hwc,c->hw", x, jnp.asarray(LUMINANCE), precision="highest")[:, :, None]
      base = jnp.where(operation == 0, 0.0, jnp.where(operation == 1, luminance.mean(), luminance))
      x = jnp.clip(factors[operation] * x + (1 - factors[operation]) * base, 0.0, 1.0)
    return x

  return jax.vmap(jitter)(keys_B, image)


def random_erase(
  keys_B: Key[Array, "B"],
  image: Float[Array, "B H W 3"],
  prob: float = 0.25,
  *,
  area: tuple[float, float] = (0.02, 1 / 3),
  aspect: tuple[float, float] = (0.3, 1 / 0.3),
  tries: int = 10,
) -> Float[Array, "B H W 3"]:
  """Random erasing (arXiv 1708.04896) of normalised images: a box of noise N(0, 1), with probability `prob`.

  Its area is U(area)·HW and its log aspect (h/w) U(log aspect). Taken is the first of `tries` such boxes
  that is smaller than the image both ways, anywhere in it; where none is, nothing happens.
  """
  height, width = image.shape[1:3]

  def erase(key: Key[Array, ""], x: Float[Array, "H W 3"]) -> Float[Array, "H W 3"]:
    chance, area_key, aspect_key, top_key, left_key, noise_key = jax.random.split(key, 6)
    pixels = height * width * jax.random.uniform(area_key, (tries,), minval=area[0], maxval=area[1])
    low, high = np.log(aspect)
    ratio = jnp.exp(jax.random.uniform(aspect_key, (tries,), minval=low, maxval=high))
    h, w = jnp.round(jnp.sqrt(pixels * ratio)), jnp.round(jnp.sqrt(pixels / ratio))
    fits = (h < height) & (w < width)
    h, w = (side[jnp.argmax(fits)].astype(jnp.int32) for side in (h, w))
    top = jnp.arange(height) - jax.random.randint(top_key, (), 0, jnp.maximum(height - h, 0) + 1)
    left = jnp.arange(width) - jax.random.randint(left_key, (), 0, jnp.maximum(width - w, 0) + 1)
    inside = ((top >= 0) & (top < h))[:, None] & ((left >= 0) & (left < w))[None, :]
    inside &= jnp.any(fits) & jax.random.bernoulli(chance, prob)
    return jnp.where(inside[:, :, None], jax.random.normal(noise_key, x.shape), x)

  return jax.vmap(erase)(keys_B, image)
