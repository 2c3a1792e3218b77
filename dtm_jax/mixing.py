"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch with itself, on the device.

Both are one operation with different weights: every pixel is w·x + (1-w)·x', where x' is the same place of
the partner, and w is one number for the whole image (mixup), or 0 inside a box and 1 outside (CutMix). One
draw serves the batch; the partner of image i is image B-1-i.
"""

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, RandomKey


def mix(
  key: RandomKey,
  image: Float[Array, "B H W 3"],
  target: Float[Array, "B G"],
  *,
  mixup: float = 0.8,
  cutmix: float = 1.0,
  cutmix_prob: float = 0.5,
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B G"]]:
  """Mixed images, and targets λ·y + (1-λ)·y' with λ the mean of w; see `pixel_weights` for the options."""
  if not mixup and not cutmix:
    return image, target
  weight = pixel_weights(key, image.shape[1:3], mixup=mixup, cutmix=cutmix, cutmix_prob=cutmix_prob)
  lam = weight.mean()
  weight = weight[None, :, :, None]
  return weight * image + (1 - weight) * image[::-1], lam * target + (1 - lam) * target[::-1]


def pixel_weights(
  key: RandomKey, size: tuple[int, int], *, mixup: float, cutmix: float, cutmix_prob: float = 0.5
) -> Float[Array, "H W"]:
  """w of CutMix with probability `cutmix_prob`, else of mixup; λ ~ Beta(a, a) with a its strength.

  A strength of zero leaves the whole choice to the other.
  """
  choice_key, lam_key, box_key = jax.random.split(key, 3)
  use_cutmix = jax.random.bernoulli(choice_key, cutmix_prob if mixup and cutmix else float(cutmix > 0))
  strength = jnp.where(use_cutmix, cutmix, mixup)
  lam = jax.random.beta(lam_key, strength, strength)
  return jnp.where(use_cutmix, 1.0 - _box(box_key, size, lam), lam)


def _box(key: RandomKey, size: tuple[int, int], lam: Float[Array, ""]) -> Float[Array, "H W"]:
  """1 in a box of sides ⌊sqrt(1-λ)·H⌋ and ⌊sqrt(1-λ)·W⌋, its centre anywhere, cut off at the edges."""

  def inside(key: RandomKey, length: int) -> Float[Array, "_"]:
    half = jnp.floor(length * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    offset = jnp.arange(length) - jax.random.randint(key, (), 0, length)
    return ((offset >= -half) & (offset < half)).astype(jnp.float32)

  row_key, column_key = jax.random.split(key)
  return inside(row_key, size[0])[:, None] * inside(column_key, size[1])[None, :]
