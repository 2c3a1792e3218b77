"""Augment a batch of images on the device: flip, colour jitter, random erasing, mixup and CutMix.

The host sends uint8 crops. Everything else happens here, inside the jitted step, in float32 with values in
[0, 1]. Every image has its own key (`rngs.per_example`), so sharding does not change the result. Only `mix`
draws once for the whole batch.
"""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dtm_jax.arrays import Array, Float, Key, RandomKey, UInt8
from dtm_jax.normalizations import Triple

LUMINANCE = (0.299, 0.587, 0.114)


def augment(
  keys_B: Key[Array, " B"],
  image: UInt8[Array | np.ndarray, "B H W 3"],
  *,
  flip: float = 0.5,
  color_jitter: float = 0.0,
) -> Float[Array, "B H W 3"]:
  """Apply colour jitter and a random flip, and return images in [0, 1] without normalisation.

  Args:
    flip: probability of a left-right flip.
    color_jitter: strength of brightness, contrast and saturation in `jitter_colors`; 0 turns them off.
  """
  jitter_keys_B, flip_keys_B = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)
  result = to_float(image)
  if color_jitter:
    result = jitter_colors(jitter_keys_B, result, color_jitter, color_jitter, color_jitter)
  return random_flip(flip_keys_B, result, flip)


def to_float(image: UInt8[Array | np.ndarray, "B H W 3"]) -> Float[Array, "B H W 3"]:
  """Return image / 255 in float32."""
  return jnp.asarray(image, jnp.float32) / 255


def normalize(image: Float[Array, "B H W 3"], mean: Triple, std: Triple) -> Float[Array, "B H W 3"]:
  """Return (image - mean) / std, channel by channel."""
  shift, scale = (jnp.asarray(value, jnp.float32)[None, None, None, :] for value in (mean, std))
  return (image - shift) / scale


def resize_to(image: Float[Array, "B H W 3"], side: int) -> Float[Array, "B side side 3"]:
  """Resize square images in [0, 1] by antialiased bicubic interpolation, and clip the result to [0, 1]."""
  if image.shape[1:3] == (side, side):
    return image
  return jnp.clip(jax.image.resize(image, (image.shape[0], side, side, 3), "cubic"), 0.0, 1.0)


def random_flip(
  keys_B: Key[Array, " B"], image: Float[Array, "B H W 3"], prob: float = 0.5
) -> Float[Array, "B H W 3"]:
  """Mirror each image left to right with probability `prob`."""
  flip_B = jax.vmap(lambda key: jax.random.bernoulli(key, prob))(keys_B)
  return jnp.where(einops.rearrange(flip_B, "B -> B 1 1 1"), image[:, :, ::-1], image)


def jitter_colors(
  keys_B: Key[Array, " B"],
  image: Float[Array, "B H W 3"],
  brightness: float,
  contrast: float,
  saturation: float,
) -> Float[Array, "B H W 3"]:
  """Change brightness, contrast and saturation at random: torchvision's ColorJitter without hue.

  Three operations run in an order that is drawn for each image. Each computes clip(f·x + (1-f)·base, 0, 1)
  with f ~ U[max(0, 1-s), 1+s] for its strength s. The base is 0 for brightness, the image's mean luminance
  for contrast, and the luminance of each pixel for saturation. Pillow rounds to whole grey levels after each
  operation; this function does not.
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
  keys_B: Key[Array, " B"],
  image: Float[Array, "B H W 3"],
  prob: float = 0.25,
  *,
  area: tuple[float, float] = (0.02, 1 / 3),
  aspect: tuple[float, float] = (0.3, 1 / 0.3),
  tries: int = 10,
) -> Float[Array, "B H W 3"]:
  """With probability `prob`, fill one box of each normalised image with noise N(0, 1).

  The box has area ~ U(`area`)·HW and log(h/w) ~ U(log `aspect`). The function draws `tries` boxes and uses
  the first one that is smaller than the image in height and width. Its position is uniform. If no box fits,
  the image does not change. Source: random erasing, arXiv 1708.04896.
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


def mix(
  key: RandomKey,
  image: Float[Array, "B H W 3"],
  target: Float[Array, "B G"],
  *,
  mixup: float = 0.8,
  cutmix: float = 1.0,
  cutmix_prob: float = 0.5,
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B G"]]:
  """Mix a batch with itself by mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899).

  The partner x' of image i is image B-1-i. Both methods return w·x + (1-w)·x' and λ·y + (1-λ)·y', where λ is
  the mean of w. They differ in w, which `mixing_weights` draws once for the batch.
  """
  if not mixup and not cutmix:
    return image, target
  _, height, width, _ = image.shape
  weight = mixing_weights(key, (height, width), mixup=mixup, cutmix=cutmix, cutmix_prob=cutmix_prob)
  lam = weight.mean()
  weight = weight[None, :, :, None]
  return weight * image + (1 - weight) * image[::-1], lam * target + (1 - lam) * target[::-1]


def mixing_weights(
  key: RandomKey, size: tuple[int, int], *, mixup: float, cutmix: float, cutmix_prob: float = 0.5
) -> Float[Array, "H W"]:
  """Draw w, the weight of image x at each pixel. Its partner x' gets 1 - w, see `mix`.

  Mixup uses the same w = λ at every pixel. CutMix uses w = 0 inside a box and 1 outside.

  Args:
    size: (height, width) in pixels.
    mixup, cutmix: strengths a of λ ~ Beta(a, a). A strength of 0 turns its method off.
    cutmix_prob: probability of CutMix if both methods are on.
  """
  choice_key, lam_key, box_key = jax.random.split(key, 3)
  use_cutmix = jax.random.bernoulli(choice_key, cutmix_prob if mixup and cutmix else float(cutmix > 0))
  strength = jnp.where(use_cutmix, cutmix, mixup)
  lam = jax.random.beta(lam_key, strength, strength)
  return jnp.where(use_cutmix, 1.0 - _cutmix_box(box_key, size, lam), lam)


def _cutmix_box(key: RandomKey, size: tuple[int, int], lam: Float[Array, ""]) -> Float[Array, "H W"]:
  """Return 1 inside a box and 0 outside.

  The box has sides ⌊sqrt(1-λ)·H⌋ and ⌊sqrt(1-λ)·W⌋. Its centre is uniform in the image, and
  parts outside the image are cut off.
  """

  def inside(key: RandomKey, length: int) -> Float[Array, " _"]:
    half = jnp.floor(length * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    offset = jnp.arange(length) - jax.random.randint(key, (), 0, length)
    return ((offset >= -half) & (offset < half)).astype(jnp.float32)

  row_key, column_key = jax.random.split(key)
  return inside(row_key, size[0])[:, None] * inside(column_key, size[1])[None, :]
