"""Crop and resize images on the device as `views.TrainView` does on the host, with draws of JAX keys.

The boxes have the distribution of the host's boxes, but other draws. Given the same box, the pixels equal the
host's but for rounding: OpenCV and Pillow compute with weights in fixed point, this file in float32. So a
grey level may differ by one.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, Int, RandomKey, UInt8
from dtm_jax.data.views import BOX_ATTEMPTS, TrainOptions, largest_centred_box
from dtm_jax.errors import OptionError

Box = tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""], Int[Array, ""]]
"""(top, left, height, width), in pixels of the source image."""

INTERPOLATIONS = {False: ("bicubic", "bilinear", "lanczos"), True: ("bicubic", "bilinear", "area", "lanczos")}
"""The filters without and with `antialias`. OpenCV's "area" has other rules for shrinking and for growing."""


class DeviceView(TrainOptions):
  """A random square view of an image, made inside a jitted function.

  Raises:
    OptionError: the device does not make this view; the message names the option and the choices.
  """

  def __post_init__(self):
    super().__post_init__()
    if self.interpolation not in INTERPOLATIONS[self.antialias]:
      raise OptionError(
        f"data.view.interpolation={self.interpolation} with antialias={self.antialias} is not made on the "
        f"device. Available there: {', '.join(INTERPOLATIONS[self.antialias])}."
      )
    if self.rand_augment:
      raise OptionError(
        f"data.view.rand_augment={self.rand_augment} is not made on the device. Available there: None."
      )

  def __call__(self, key: RandomKey, image: UInt8[Array, "H W 3"]) -> UInt8[Array, "S S 3"]:
    """Return the view of one image that `key` draws."""
    height, width = image.shape[:2]
    box_key, shift_key = jax.random.split(key)
    box = tuple(map(jnp.int32, (0, 0, height, width)))
    if self.crop == "random_resized":
      box = random_resized_box(box_key, height, width, self.scale, self.ratio)
    view = resize_box(image, box, self.image_size, self.interpolation, self.antialias)
    if self.crop == "pad":
      view = jnp.pad(view, ((self.padding,) * 2, (self.padding,) * 2, (0, 0)))
      top, left = jax.random.randint(shift_key, (2,), 0, 2 * self.padding + 1)
      view = jax.lax.dynamic_slice(view, (top, left, 0), (self.image_size, self.image_size, 3))
    return view


def random_resized_box(
  key: RandomKey, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
  """Draw a box of area ~ U(scale)·HW and log(w/h) ~ U(log ratio) at a uniform place, as `views` does."""
  area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
  area = height * width * jax.random.uniform(area_key, (BOX_ATTEMPTS,), minval=scale[0], maxval=scale[1])
  low, high = math.log(ratio[0]), math.log(ratio[1])
  aspect = jnp.exp(jax.random.uniform(aspect_key, (BOX_ATTEMPTS,), minval=low, maxval=high))
  h, w = jnp.round(jnp.sqrt(area / aspect)), jnp.round(jnp.sqrt(area * aspect))
  fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
  h, w = (side[jnp.argmax(fits)].astype(jnp.int32) for side in (h, w))
  top = jax.random.randint(top_key, (), 0, jnp.maximum(height - h, 0) + 1)
  left = jax.random.randint(left_key, (), 0, jnp.maximum(width - w, 0) + 1)
  centred = largest_centred_box(height, width, ratio)
  found = jnp.any(fits)
  drawn = (top, left, h, w)
  top, left, h, w = (jnp.where(found, *pair) for pair in zip(drawn, centred, strict=True))
  return top, left, h, w


def resize_box(
  image: UInt8[Array, "H W 3"], box: Box, size: int, interpolation: str, antialias: bool
) -> UInt8[Array, "S S 3"]:
  """Crop `box` and resize the crop to S = `size` pixels a side, as `resampling.resize` does.

  Each axis is a product with a matrix of weights, which is zero outside of the box.
  """
  top, left, h, w = box
  weights = _widened_weights if antialias else _weights
  rows_SH = weights(interpolation, top, h, image.shape[0], size)
  columns_SW = weights(interpolation, left, w, image.shape[1], size)
  level = jnp.einsum("tw,hwc->htc", columns_SW, image.astype(jnp.float32), precision="highest")
  if antialias:  # Pillow stores whole grey levels between the two axes
    level = _grey_levels(level)
  level = jnp.einsum("sh,htc->stc", rows_SH, level, precision="highest")
  return _grey_levels(level).astype(jnp.uint8)


def _grey_levels(level: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
  return jnp.clip(jnp.round(level), 0, 255)


def _weights(
  interpolation: str, first: Int[Array, ""], length: Int[Array, ""], old: int, new: int
) -> Float[Array, "new old"]:
  """Return OpenCV's weights of `old` inputs for `new` outputs, for a crop of `length` inputs from `first` on.

  The kernel never widens. Beyond the border of the crop, the border's pixels are repeated.
  """
  reach, kernel = _KERNELS[False][interpolation]
  centre = _centres(length, new) - 0.5
  taps = jnp.floor(centre) + jnp.arange(1 - reach, 1 + reach, dtype=jnp.float32)[None, :]
  weights = kernel(taps - centre)
  weights /= weights.sum(axis=1, keepdims=True)
  taps = jnp.clip(taps.astype(jnp.int32), 0, length - 1) + first
  return jnp.sum(weights[:, :, None] * (taps[:, :, None] == jnp.arange(old)[None, None, :]), axis=1)


def _widened_weights(
  interpolation: str, first: Int[Array, ""], length: Int[Array, ""], old: int, new: int
) -> Float[Array, "new old"]:
  """Return Pillow's weights, see `_weights`. The kernel widens if the crop shrinks.

  Inputs beyond the border of the crop have no weight.
  """
  reach, kernel = _KERNELS[True][interpolation]
  centre = _centres(length, new)
  stretch = jnp.maximum(length / new, 1.0)
  place = (jnp.arange(old) - first)[None, :]
  low = jnp.maximum(jnp.floor(centre - reach * stretch + 0.5), 0)
  high = jnp.minimum(jnp.floor(centre + reach * stretch + 0.5), length)
  weights = kernel((place - centre + 0.5) / stretch) * ((place >= low) & (place < high))
  return weights / weights.sum(axis=1, keepdims=True)


def _centres(length: Int[Array, ""], new: int) -> Float[Array, "new 1"]:
  """Return the centres of the outputs, in inputs from the border of the crop on."""
  return (jnp.arange(1, 2 * new, 2) * length).astype(jnp.float32)[:, None] / (2 * new)


def _triangle(x: Array) -> Array:
  return jnp.maximum(1 - jnp.abs(x), 0)


def _box(x: Array) -> Array:
  return ((x > -0.5) & (x <= 0.5)).astype(jnp.float32)


def _cubic(a: float) -> Callable[[Array], Array]:
  """Return Keys' cubic kernel with the parameter `a`."""

  def kernel(x: Array) -> Array:
    x = jnp.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))

  return kernel


def _lanczos(lobes: int) -> Callable[[Array], Array]:
  return lambda x: jnp.where(jnp.abs(x) < lobes, jnp.sinc(x) * jnp.sinc(x / lobes), 0)


_KERNELS: dict[bool, dict[str, tuple[float, Callable[[Array], Array]]]] = {
  False: {"bilinear": (1, _triangle), "bicubic": (2, _cubic(-0.75)), "lanczos": (4, _lanczos(4))},
  True: {
    "area": (0.5, _box),
    "bilinear": (1, _triangle),
    "bicubic": (2, _cubic(-0.5)),
    "lanczos": (3, _lanczos(3)),
  },
}
"""Support in pixels and kernel of every interpolation, without and with `antialias`; see `resampling`."""
