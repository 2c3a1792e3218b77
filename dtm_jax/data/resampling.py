"""Resizing by Pillow or OpenCV, of a whole image or of the part that is needed.

Resized to a shorter side of 256, an image of 1 x 4000 pixels has 262 million pixels. A centre crop needs
50,000 of them. Each output pixel is a weighted sum along one axis and then along the other. So the part needs
only the weights of its own rows and columns.
"""

from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from dtm_jax.arrays import Float, Int, UInt8

cv2.setNumThreads(0)  # examples are already processed in parallel, and OpenCV's threads would slow them

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
"""Only the crop is computed if the resized image has more than this many times its area."""

Box = tuple[int, int, int, int]
"""(top, left, height, width), in pixels of the source image."""

Pixels = UInt8[np.ndarray, "_ _ 3"]
"""8-bit RGB, [H, W, 3]."""


def resize(
  image: Pixels, size: tuple[int, int], interpolation: str, antialias: bool, box: Box | None = None
) -> Pixels:
  """Crop `box` and resize the crop to `size` = (height, width) in pixels.

  Pixels outside of the box have no influence.

  Args:
    interpolation: a key of CV2_FILTERS.
    antialias: True widens the filter when the image shrinks (Pillow). False keeps the filter as it is, so it
      sees the same few source pixels (OpenCV). The results differ by about one grey level on photos, and
      Pillow has half the throughput.
    box: default the whole image.
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
  """Return `region` of the image resized to `size`. If the rest is much larger, it is not computed.

  Args:
    size: (height, width) of the whole resized image, in pixels.
    region: (top, left, height, width) in the resized image.
    interpolation, antialias: see `resize`.
  """
  top, left, h, w = region
  if size[0] * size[1] > WIDE * h * w:
    return _part_of_resized(image, size, region, interpolation, antialias)
  return resize(image, size, interpolation, antialias)[top : top + h, left : left + w]


def _part_of_resized(
  image: Pixels,
  size: tuple[int, int],
  region: Box,
  interpolation: str,
  antialias: bool,
) -> Pixels:
  """Return `resized[top : top + h, left : left + w]` of the image resized to `size`.

  The image must be long, and both axes must have about the same factor. With `antialias` the pixels then
  equal Pillow's exactly. Pillow rounds between the two axes, and it starts with the rows of a tall image that
  shrinks. Without `antialias` the pixels differ from OpenCV's by at most one grey level, except where
  rounding makes OpenCV's "area" miss a border between two pixels.
  """
  weights_of, finish = (_pillow_weights, _pillow_round) if antialias else (_opencv_weights, lambda sums: sums)
  top, left, h, w = region
  first_row, rows = weights_of(interpolation, image.shape[0], size[0], np.arange(top, top + h))
  first_column, columns = weights_of(interpolation, image.shape[1], size[1], np.arange(left, left + w))
  window = image[first_row : first_row + rows.shape[1], first_column : first_column + columns.shape[1]]
  rows_first = size[0] < image.shape[0] > image.shape[1]
  result = np.empty((h, w, 3), np.uint8)
  for channel in range(3):  # one at a time, because float64 takes eight times the memory
    level = window[..., channel].astype(np.float64)
    if rows_first:
      level = finish(finish(rows @ level) @ columns.T)
    else:
      level = finish(rows @ finish(level @ columns.T))
    result[..., channel] = np.clip(np.rint(level), 0, 255)
  return result


def _pillow_round(sums: Float[np.ndarray, "_ _"]) -> Float[np.ndarray, "_ _"]:
  """Return the grey levels of sums of weights in units of 2^-22, which float64 holds exactly."""
  return np.clip(np.floor((sums + 2 ** (PILLOW_BITS - 1)) / 2**PILLOW_BITS), 0, 255)


def _pillow_weights(
  interpolation: str, old: int, new: int, outputs: Int[np.ndarray, " n"]
) -> tuple[int, Float[np.ndarray, "n m"]]:
  """Return the first input and the weights of the m inputs from there on, for n outputs along one axis.

  The weights are multiples of 2^-22. The kernel widens when the image shrinks. Inputs beyond the border have
  no weight.

  Args:
    old, new: length of the axis before and after, in pixels.
    outputs: places of the n outputs.
  """
  support, kernel = PILLOW_KERNELS[interpolation]
  scale = old / new
  stretch = max(scale, 1.0)
  centre = (outputs + 0.5) * scale
  low = np.maximum((centre - support * stretch + 0.5).astype(int), 0)
  high = np.minimum((centre + support * stretch + 0.5).astype(int), old)
  taps = low[:, None] + np.arange((high - low).max())
  weights = kernel((taps - centre[:, None] + 0.5) * (1 / stretch)) * (taps < high[:, None])
  weights /= np.cumsum(weights, axis=1)[:, -1:]  # cumsum adds in Pillow's order
  weights = np.trunc(weights * 2**PILLOW_BITS + np.where(weights < 0, -0.5, 0.5))
  return _dense(np.minimum(taps, old - 1), weights)


def _opencv_weights(
  interpolation: str, old: int, new: int, outputs: Int[np.ndarray, " n"]
) -> tuple[int, Float[np.ndarray, "n m"]]:
  """Return what `_pillow_weights` returns, with weights as fractions.

  The kernel never widens. Beyond the border, the border's pixels are repeated.
  """
  scale = old / new
  if interpolation == "area":  # weight = share of the output that the input covers
    start, stop = outputs[:, None] * scale, (outputs[:, None] + 1) * scale
    taps = start.astype(int) + np.arange(int(scale) + 2)
    weights = np.maximum(np.minimum(stop, taps + 1) - np.maximum(start, taps), 0)
  else:
    support, kernel = OPENCV_KERNELS[interpolation]
    centre = (outputs[:, None] + 0.5) * scale - 0.5
    taps = np.floor(centre).astype(int) + np.arange(1 - support, 1 + support)
    weights = kernel(taps - centre)
  return _dense(np.clip(taps, 0, old - 1), weights / weights.sum(axis=1, keepdims=True))


def _dense(
  taps: Int[np.ndarray, "n k"], weights: Float[np.ndarray, "n k"]
) -> tuple[int, Float[np.ndarray, "n m"]]:
  """Return the first of the inputs `taps`, and the weights as a matrix of n outputs and m inputs."""
  first = taps.min()
  matrix = np.zeros((len(taps), taps.max() + 1 - first))
  np.add.at(matrix, (np.arange(len(taps))[:, None], taps - first), weights)
  return int(first), matrix


def _triangle(x: np.ndarray) -> np.ndarray:
  return np.maximum(1 - np.abs(x), 0)


def _box(x: np.ndarray) -> np.ndarray:
  return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def _cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
  """Return Keys' cubic kernel with the parameter `a`."""

  def kernel(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))

  return kernel


def _lanczos(lobes: int) -> Callable[[np.ndarray], np.ndarray]:
  return lambda x: np.where(np.abs(x) < lobes, np.sinc(x) * np.sinc(x / lobes), 0)


PILLOW_KERNELS = {
  "area": (0.5, _box),
  "bilinear": (1, _triangle),
  "bicubic": (2, _cubic(-0.5)),
  "lanczos": (3, _lanczos(3)),
}
"""Support in pixels and kernel of every interpolation."""
OPENCV_KERNELS = {"bilinear": (1, _triangle), "bicubic": (2, _cubic(-0.75)), "lanczos": (4, _lanczos(4))}
