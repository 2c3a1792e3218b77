"""Sliding-window inference for semantic segmentation, in NumPy."""

import dataclasses
import functools

import numpy as np

from dtm_jax.arrays import Float, Int
from dtm_jax.data.label_maps import fit_size, pad_to
from dtm_jax.data.rand_augment import FILL
from dtm_jax.data.resampling import Pixels, resize

STRIP = 64
STRIP_PIXELS = 2**17
"""Scores are computed for strips of STRIP rows, or fewer if the image is wider than 2048 pixels."""


@dataclasses.dataclass(frozen=True)
class SlidingWindows:
  """Cuts an image into square windows as mmseg does: at one scale and without flips.

  The image is resized and keeps its aspect ratio. Windows of `crop` pixels start every `stride` pixels, and
  the last one ends with the image. An image that is not larger than `crop` is one window. Grey fills a window
  beyond the image.

  Attributes:
    shorter: pixels of the shorter side of the resized image.
    crop: pixels of a side of a window.
    stride: pixels from one window to the next, at most `crop`.
    longer: most pixels of the longer side of the resized image. Default: four times `shorter`.
    interpolation: filter that resizes the image.
    antialias: whether the filter is widened when it makes the image smaller.

  Raises:
    ValueError: `stride` is not between 1 and `crop`.
  """

  shorter: int
  crop: int
  stride: int
  longer: int | None = None
  interpolation: str = "bilinear"
  antialias: bool = False

  def __post_init__(self):
    if not 0 < self.stride <= self.crop:
      raise ValueError(
        f"stride={self.stride} must lie between 1 and crop={self.crop}, or windows leave gaps."
      )

  def cut(self, image: Pixels) -> tuple[list[Pixels], "Layout"]:
    """Return the windows, row by row, and the layout that puts their scores together."""
    original = image.shape[:2]
    size = fit_size(original, self.shorter, self.longer or 4 * self.shorter)
    image = resize(image, size, self.interpolation, self.antialias)
    starts = (self._starts(size[0]), self._starts(size[1]))
    windows = [
      pad_to(image[y : y + self.crop, x : x + self.crop], (self.crop,) * 2, FILL)
      for y in starts[0]
      for x in starts[1]
    ]
    return windows, Layout(original, size, starts, self.crop)

  def _starts(self, side: int) -> tuple[int, ...]:
    count = -(-max(side - self.crop, 0) // self.stride) + 1
    return tuple(max(min(i * self.stride, side - self.crop), 0) for i in range(count))


@dataclasses.dataclass(frozen=True)
class Layout:
  """The places of an image's windows. It turns the scores of the windows into the classes of the pixels.

  Attributes:
    original: (height, width) of the image.
    size: (height, width) of the resized image that the windows were cut from.
    starts: the first rows and the first columns of the windows.
    crop: pixels of a side of a window.
  """

  original: tuple[int, int]
  size: tuple[int, int]
  starts: tuple[tuple[int, ...], tuple[int, ...]]
  crop: int

  def classes(self, logits: list[Float[np.ndarray, "h w G"]]) -> Int[np.ndarray, "H W"]:
    """Return the class with the highest score at every pixel of the image, the first of equals.

    Three steps give the scores of a pixel. The scores of each window are upsampled bilinearly, averaged where
    windows overlap, and resized bilinearly to the original image. All three are linear along each axis, so
    one matrix for each axis does them together:

        score[y, x] = Σ_ab rows[y, a] columns[x, b] logits[a, b]

    Here a and b run through the cells of all windows.

    Args:
      logits: the scores of each window, in the order of the windows.

    Raises:
      FloatingPointError: a score is NaN or infinite.
    """
    rows, columns = self.starts
    grid = np.stack(logits).reshape(len(rows), len(columns), *logits[0].shape)
    if not np.isfinite(grid).all():
      raise FloatingPointError("A score of the segmentation is NaN or infinite.")
    cells = grid.swapaxes(1, 2).reshape(len(rows) * grid.shape[2], -1)  # [all h, (all w) G]
    row_weights, column_weights = (self._weights(axis, grid.shape[2 + axis]) for axis in (0, 1))
    result = np.empty(self.original, np.int64)
    height = max(1, min(STRIP, STRIP_PIXELS // self.original[1]))
    for first in range(0, self.original[0], height):  # the scores of all pixels may take gigabytes
      strip = row_weights[first : first + height] @ cells
      strip = strip.reshape(len(strip), column_weights.shape[1], -1)
      result[first : first + height] = np.argmax(column_weights @ strip, axis=-1)
    return result

  def _weights(self, axis: int, cells: int) -> Float[np.ndarray, "H a"]:
    """Return the weight of each cell of each window at each pixel along one axis."""
    side, starts = self.size[axis], self.starts[axis]
    within = bilinear_matrix(cells, self.crop)
    parts = np.zeros((len(starts), side, cells))
    for part, start in zip(parts, starts, strict=True):
      part[start : start + self.crop] = within[: side - start]
    parts /= parts.sum(axis=(0, 2))[None, :, None]  # the number of windows at each pixel
    stitched = parts.swapaxes(0, 1).reshape(side, -1)
    low, high, share = _bilinear_taps(side, self.original[axis])
    result = np.empty((len(low), stitched.shape[1]), np.float32)
    for first in range(0, len(low), STRIP_PIXELS // 64):
      rows = slice(first, first + STRIP_PIXELS // 64)
      high_share = share[rows, None]
      result[rows] = (1 - high_share) * stitched[low[rows]] + high_share * stitched[high[rows]]
    return result


@functools.lru_cache(maxsize=64)
def bilinear_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
  """Return the matrix that resizes one axis bilinearly, without antialiasing.

  Pixels are areas, as with align_corners=False in PyTorch.
  """
  low, high, share = _bilinear_taps(old, new)
  matrix = np.zeros((new, old))
  matrix[np.arange(new), low] = 1 - share
  matrix[np.arange(new), high] += share
  return matrix


def _bilinear_taps(
  old: int, new: int
) -> tuple[Int[np.ndarray, " new"], Int[np.ndarray, " new"], Float[np.ndarray, " new"]]:
  """Return the lower and upper input of each output of `bilinear_matrix`, and the weight of the upper one."""
  centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
  low = np.minimum(centre.astype(int), max(old - 2, 0))
  return low, np.minimum(low + 1, old - 1), centre - low
