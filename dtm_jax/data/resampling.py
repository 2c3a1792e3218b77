"""Resizing by Pillow or OpenCV, of a whole image or of the part that is needed.

An image of 1 x 4000 pixels that is resized to a shorter side of 256 has 262 million pixels, of which a centre
crop needs 50,000. Each output pixel is a weighted sum along one axis and then the other, so the part needs
the weights of its own rows and columns only.
"""

from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from dtm_jax.arrays import Float, Int, UInt8

cv2.setNumThreads(0)  # the pipeline is parallel over examples; OpenCV's own threads only get in its way

PIL_FILTERS = {
  "bicubic": Image.Resampling.BICUBIC,
  "bilinear": Image.Resampling.BILINEAR,
  "area": Image.Resampling.BOX,
  "lanczos": Image.Resampling.LANCZOS,
}
CV2_FILTERS = {
  "bicubic": cv2.INTER_CUBIC,
  "bilinear": cv2.INTER_LINEAR,
  "area": cv2.INTER_AREA,
  "lanczos": cv2.INTER_LANCZOS4,
}
PILLOW_BITS = 22
"""Pillow rounds weights to multiples of 2^-22."""
WIDE = 16
"""Area of a resized image, in crops, from which on only the crop is computed."""

Box = tuple[int, int, int, int]
"""(top, left, height, width), in pixels of the source image."""

Pixels = UInt8[np.ndarray, "_ _ 3"]
"""RGB, of any height and width."""


def resize(
  image: Pixels, size: tuple[int, int], interpolation: str, antialias: bool, box: Box | None = None
) -> Pixels:
  """Crop `box` (default: the whole image) and resize the crop to `size` = (height, width).

  Without `antialias` (OpenCV) a filter looks at the same few source pixels however much it shrinks; with it
  (Pillow) the filter widens. The two differ by about one grey level on photos; Pillow costs half the
  throughput. Neither sees pixels outside of the box.
  """
  top, left, h, w = box or (0, 0, *image.shape[:2])
  crop = image[top : top + h, left : left + w]
  if (h, w) == size:
    return crop
  if not antialias:
    return cv2.resize(crop, size[::-1], interpolation=CV2_FILTERS[interpolation])
  return np.asarray(Image.fromarray(crop).resize(size[::-1], PIL_FILTERS[interpolation]))


def resize_region(
  image: Pixels, size: tuple[int, int], region: Box, interpolation: str, antialias: bool
) -> Pixels:
  """Return `region` of the image resized to `size`. Where the rest is much larger, it is not computed."""
  top, left, h, w = region
  if size[0] * size[1] > WIDE * h * w:
    return part_of_resized(image, size, region, interpolation, antialias)
  return resize(image, size, interpolation, antialias)[top : top + h, left : left + w]


def part_of_resized(
  image: Pixels,
  size: tuple[int, int],
  region: Box,
  interpolation: str,
  antialias: bool,
) -> Pixels:
  """Return `resized[top : top + h, left : left + w]` of the image resized to `size`.

  The image must be long, and both axes must have about the same factor. Then, with `antialias`, the pixels
  are exactly those of Pillow, which rounds between the two axes; it begins with the rows of a tall image that
  shrinks. Without `antialias` they are those of OpenCV to one grey level, except where OpenCV's "area" misses
  a border between two pixels by its rounding.

  Args:
    size: (height, width) of the whole resized image.
    region: (top, left, h, w) in the resized image.
  """
  weights_of, finish = (_pillow_weights, _pillow_round) if antialias else (_opencv_weights, lambda sums: sums)
  top, left, h, w = region
  first_row, rows = weights_of(interpolation, image.shape[0], size[0], np.arange(top, top + h))
  first_column, columns = weights_of(interpolation, image.shape[1], size[1], np.arange(left, left + w))
  window = image[first_row : first_row + rows.shape[1], first_column : first_column + columns.shape[1]]
  rows_first = size[0] < image.shape[0] > image.shape[1]
  result = np.empty((h, w, 3), np.uint8)
  for channel in range(3):  # one at a time, since float64 takes eight times the memory
    level = window[..., channel].astype(np.float64)
    if rows_first:
      level = finish(finish(rows @ level) @ columns.T)
    else:
      level = finish(rows @ finish(level @ columns.T))
    result[..., channel] = np.clip(np.rint(level), 0, 255)
  return result


def _pillow_round(sums: Float[np.ndarray, "_ _"]) -> Float[np.ndarray, "_ _"]:
  """Grey levels of sums of whole numbers, which float64 holds exactly."""
  return np.clip(np.floor((sums + 2 ** (PILLOW_BITS - 1)) / 2**PILLOW_BITS), 0, 255)


def _pillow_weights(
  interpolation: str, old: int, new: int, outputs: Int[np.ndarray, " n"]
) -> tuple[int, Float[np.ndarray, "n m"]]:
  """(first input, weights of the m inputs from there on, as multiples of 2^-22) of n outputs of one axis.

  The kernel widens when the image shrinks. Beyond the border there is nothing: weights there are left out.
  """
  support, kernel = PILLOW_KERNELS[interpolation]
  scale = old / new
  stretch = max(scale, 1.0)
  centre = (outputs + 0.5) * scale
  low = np.maximum((centre - support * stretch + 0.5).astype(int), 0)
  high = np.minimum((centre + support * stretch + 0.5).astype(int), old)
  taps = low[:, None] + np.arange((high - low).max())
  weights = kernel((taps - centre[:, None] + 0.5) * (1 / stretch)) * (taps < high[:, None])
  weights /= np.cumsum(weights, axis=1)[:, -1:]  # summed in Pillow's order
  weights = np.trunc(weights * 2**PILLOW_BITS + np.where(weights < 0, -0.5, 0.5))
  return _dense(np.minimum(taps, old - 1), weights)


def _opencv_weights(
  interpolation: str, old: int, new: int, outputs: Int[np.ndarray, " n"]
) -> tuple[int, Float[np.ndarray, "n m"]]:
  """As `_pillow_weights`, as fractions. The kernel never widens; the border's pixels go on beyond it."""
  scale = old / new
  if interpolation == "area":  # the share of each input that the output covers
    start, stop = outputs[:, None] * scale, (outputs[:, None] + 1) * scale
    taps = start.astype(int) + np.arange(int(scale) + 2)
    weights = np.maximum(np.minimum(stop, taps + 1) - np.maximum(start, taps), 0)
  else:
    support, kernel = OPENCV_KERNELS[interpolation]
    centre = (outputs[:, None] + 0.5) * scale - 0.5
    taps = np.floor(centre).astype(int) + np.arange(1 - support, 1 + support)
    weights = kernel(taps - centre)
  return _dense(np.clip(taps, 0, old - 1), weights / weights.sum(axis=1, keepdims=True))


def _dense(taps: Int[np.ndarray, "n k"], weights: Float[np.ndarray, "n k"]) -> tuple[int, np.ndarray]:
  first = taps.min()
  matrix = np.zeros((len(taps), taps.max() + 1 - first))
  np.add.at(matrix, (np.arange(len(taps))[:, None], taps - first), weights)
  return int(first), matrix


def _triangle(x: np.ndarray) -> np.ndarray:
  return np.maximum(1 - np.abs(x), 0)


def _box(x: np.ndarray) -> np.ndarray:
  return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def _cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
  """Keys' kernel."""

  def kernel(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))

  return kernel


def _lanczos(lobes: int) -> Callable[[np.ndarray], np.ndarray]:
  return lambda x: np.where(np.abs(x) < lobes, np.sinc(x) * np.sinc(x / lobes), 0)


# interpolation -> (support, kernel)
PILLOW_KERNELS = {
  "area": (0.5, _box),
  "bilinear": (1, _triangle),
  "bicubic": (2, _cubic(-0.5)),
  "lanczos": (3, _lanczos(3)),
}
OPENCV_KERNELS = {"bilinear": (1, _triangle), "bicubic": (2, _cubic(-0.75)), "lanczos": (4, _lanczos(4))}
