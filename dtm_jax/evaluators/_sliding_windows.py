"""Semantic segmentation around a model, in NumPy: windows over an image, their scores put together, mIoU."""

import dataclasses
import functools

import numpy as np

from dtm_jax.arrays import Float, Int
from dtm_jax.data.label_maps import IGNORE, Map, fit_size, pad_to
from dtm_jax.data.rand_augment import FILL
from dtm_jax.data.resampling import Pixels, resize

STRIP = 64
STRIP_PIXELS = 2**17
"""Of images wider than 2048, fewer than STRIP rows are scored at once."""


@dataclasses.dataclass(frozen=True)
class Sliding:
  """Sliding-window inference as mmseg has it: one scale, no flips.

  The image is resized, aspect kept, so that its shorter side has `shorter` pixels and the longer at most
  `longer`. Square windows of `crop` pixels start every `stride`, the last one at the end of the image; an
  image no larger than `crop` is one window. Grey fills a window beyond the image.

  Attributes:
    longer: default four times `shorter`.
  """

  shorter: int
  crop: int
  stride: int
  longer: int | None = None
  interpolation: str = "bilinear"
  antialias: bool = False

  def __post_init__(self):
    if not 0 < self.stride <= self.crop:
      raise ValueError(f"stride={self.stride}: windows of crop={self.crop} pixels would leave gaps.")

  def windows(self, image: Pixels) -> tuple[list[Pixels], "Plan"]:
    """The windows, row by row, and how to put their scores together at the image's own size."""
    original = image.shape[:2]
    size = fit_size(original, self.shorter, self.longer or 4 * self.shorter)
    image = resize(image, size, self.interpolation, self.antialias)
    starts = tuple(self._starts(side) for side in size)
    squares = [
      pad_to(image[y : y + self.crop, x : x + self.crop], (self.crop,) * 2, FILL)
      for y in starts[0]
      for x in starts[1]
    ]
    return squares, Plan(original, size, starts, self.crop)

  def _starts(self, side: int) -> tuple[int, ...]:
    count = -(-max(side - self.crop, 0) // self.stride) + 1
    return tuple(max(min(i * self.stride, side - self.crop), 0) for i in range(count))


@dataclasses.dataclass(frozen=True)
class Plan:
  """From the scores of windows to the classes of pixels.

  Attributes:
    original, size: (height, width) of the image, and of its resized self that the windows lie on.
    starts: of the windows' rows and columns.
    crop: side of a window.
  """

  original: tuple[int, int]
  size: tuple[int, int]
  starts: tuple[tuple[int, ...], tuple[int, ...]]
  crop: int

  def classes(self, logits: list[Float[np.ndarray, "h w G"]]) -> Int[np.ndarray, "H W"]:
    """argmax over G of the scores at every pixel of the image; of equal ones the first.

    Scores are bilinear within a window, averaged where windows overlap, and bilinear again from the resized
    to the original image. All three are linear along each axis, hence one pair of matrices:
    score[y, x] = Σ_ab rows[y, a] columns[x, b] logits[a, b], a and b through all windows.

    Raises:
      FloatingPointError: a score is not a number.
    """
    rows, columns = self.starts
    grid = np.stack(logits).reshape(len(rows), len(columns), *logits[0].shape)
    if not np.isfinite(grid).all():
      raise FloatingPointError("A score is not finite.")
    cells = grid.swapaxes(1, 2).reshape(len(rows) * grid.shape[2], -1)  # [Ih, Jw G]
    row_weights, column_weights = (self._weights(axis, grid.shape[2 + axis]) for axis in (0, 1))
    result = np.empty(self.original, np.int64)
    height = max(1, min(STRIP, STRIP_PIXELS // self.original[1]))
    for first in range(0, self.original[0], height):  # all scores at once might be gigabytes
      strip = row_weights[first : first + height] @ cells
      strip = strip.reshape(len(strip), column_weights.shape[1], -1)
      result[first : first + height] = np.argmax(column_weights @ strip, axis=-1)
    return result

  def _weights(self, axis: int, cells: int) -> Float[np.ndarray, "H a"]:
    """What each cell of each window is worth at each pixel along one axis."""
    side, starts = self.size[axis], self.starts[axis]
    within = bilinear_matrix(cells, self.crop)
    parts = np.zeros((len(starts), side, cells))
    for part, start in zip(parts, starts, strict=True):
      part[start : start + self.crop] = within[: side - start]
    parts /= parts.sum(axis=(0, 2))[None, :, None]  # the number of windows there
    stitched = parts.swapaxes(0, 1).reshape(side, -1)
    low, high, share = _bilinear_taps(side, self.original[axis])
    result = np.empty((len(low), stitched.shape[1]), np.float32)
    for first in range(0, len(low), STRIP_PIXELS // 64):
      part = slice(first, first + STRIP_PIXELS // 64)
      high_share = share[part, None]
      result[part] = (1 - high_share) * stitched[low[part]] + high_share * stitched[high[part]]
    return result


@functools.lru_cache(maxsize=64)
def bilinear_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
  """The matrix that resamples one axis, pixels as areas (PyTorch's align_corners=False), not antialiased."""
  low, high, share = _bilinear_taps(old, new)
  matrix = np.zeros((new, old))
  matrix[np.arange(new), low] = 1 - share
  matrix[np.arange(new), high] += share
  return matrix


def _bilinear_taps(
  old: int, new: int
) -> tuple[Int[np.ndarray, " new"], Int[np.ndarray, " new"], Float[np.ndarray, " new"]]:
  """The two inputs of each output of `bilinear_matrix`, and the weight of the second one."""
  centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
  low = np.minimum(centre.astype(int), max(old - 2, 0))
  return low, np.minimum(low + 1, old - 1), centre - low


def confusion(label: Map, predicted: Int[np.ndarray, "H W"], num_classes: int) -> Int[np.ndarray, "G G"]:
  """How many pixels of class [row] were given class [column]; ignored pixels are left out."""
  valid = label != IGNORE
  pair = label[valid].astype(np.int64) * num_classes + predicted[valid]
  return np.bincount(pair, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(confusion_GG: Int[np.ndarray, "G G"]) -> dict[str, float]:
  """miou, pixel_accuracy and mean_accuracy (mmseg's mIoU, aAcc and mAcc) of a whole set's confusion matrix.

  The IoU of a class is |label ∧ predicted| / |label ∨ predicted| over all pixels of the set. A class that
  occurs neither in labels nor in predictions has none, and is left out of the mean; so is from the mean
  accuracy a class that no label has.

  Raises:
    ValueError: no pixel is labelled.
  """
  right, labelled, predicted = confusion_GG.diagonal(), confusion_GG.sum(axis=1), confusion_GG.sum(axis=0)
  if not labelled.sum():
    raise ValueError("No pixel of the set is labelled: all are ignored.")
  union = labelled + predicted - right
  return {
    "miou": float(np.mean(right[union > 0] / union[union > 0])),
    "pixel_accuracy": float(right.sum() / labelled.sum()),
    "mean_accuracy": float(np.mean(right[labelled > 0] / labelled[labelled > 0])),
  }
