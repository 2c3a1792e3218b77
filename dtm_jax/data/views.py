"""Square views of a decoded image: random crops for training, the centre crop for evaluation."""

import dataclasses
import math

import numpy as np

from dtm_jax.data import rand_augment
from dtm_jax.data.label_maps import IGNORE, Map, fit_size, pad_to, resize_map
from dtm_jax.data.rand_augment import FILL
from dtm_jax.data.resampling import CV2_FILTERS, Box, Pixels, resize, resize_region
from dtm_jax.errors import OptionError, check_choice

CROPS = ("random_resized", "pad", "none")
BOX_ATTEMPTS = 10
MAP_ATTEMPTS = 11
"""The largest number of squares that `JointView` draws."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
  """How a random square view of an image is made, `image_size` pixels a side.

  Attributes:
    crop: "random_resized" crops a box of `random_resized_box` and resizes it.
      "pad" resizes the image, pads it with `padding` black pixels on each side, and crops a square at random;
      this is the usual CIFAR augmentation.
      "none" resizes the whole image and does not keep its aspect ratio.
    scale, ratio: range of the box's share of the area, and of its aspect width / height.
    interpolation, antialias: see `resampling.resize`.
    rand_augment: a policy of `rand_augment.parse`, which changes the cropped view; None for no change.
  """

  image_size: int
  crop: str = "random_resized"
  scale: tuple[float, float] = (0.2, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  padding: int = 4
  interpolation: str = "bicubic"
  antialias: bool = False
  rand_augment: str | None = None

  def __post_init__(self):
    check_choice("crop", self.crop, CROPS)


class TrainView(TrainOptions):
  """A random square view of an image, made on the host."""

  def __post_init__(self):
    super().__post_init__()
    check_choice("interpolation", self.interpolation, CV2_FILTERS)
    if self.rand_augment:
      rand_augment.parse(self.rand_augment)

  def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
    box = None
    if self.crop == "random_resized":
      height, width = image.shape[:2]
      box = random_resized_box(rng, height, width, self.scale, self.ratio)
    view = resize(image, (self.image_size,) * 2, self.interpolation, self.antialias, box)
    if self.crop == "pad":
      top, left = rng.integers(2 * self.padding + 1, size=2)
      padded = np.zeros((view.shape[0] + 2 * self.padding, view.shape[1] + 2 * self.padding, 3), np.uint8)
      padded[self.padding : -self.padding or None, self.padding : -self.padding or None] = view
      view = padded[top : top + self.image_size, left : left + self.image_size]
    return rand_augment.parse(self.rand_augment)(view, rng) if self.rand_augment else view


def random_resized_box(
  rng: np.random.Generator,
  height: int,
  width: int,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> Box:
  """Draw a box of area ~ U(scale)·HW and log(w/h) ~ U(log ratio) at a uniform place: torchvision's rule.

  If ten boxes do not fit, returns `largest_centred_box`.
  """
  for _ in range(BOX_ATTEMPTS):
    area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(low + (high - low) * rng.random())
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(height - h + 1))
      left = int(rng.integers(width - w + 1))
      return top, left, h, w
  return largest_centred_box(height, width, ratio)


def largest_centred_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
  """Return the largest centred box with an aspect width / height within `ratio`."""
  h, w = height, width
  if width / height < ratio[0]:
    h = min(height, round(width / ratio[0]))
  elif width / height > ratio[1]:
    w = min(width, round(height * ratio[1]))
  return (height - h) // 2, (width - w) // 2, h, w


@dataclasses.dataclass(frozen=True)
class EvalView:
  """The centre square of `image_size` pixels a side, after the shorter side is resized to `resize` pixels.

  Attributes:
    resize: default image_size.
    interpolation, antialias: see `resampling.resize`.
  """

  image_size: int
  resize: int | None = None
  interpolation: str = "bicubic"
  antialias: bool = True

  def __post_init__(self):
    check_choice("interpolation", self.interpolation, CV2_FILTERS)
    if self.resize is not None and self.resize < self.image_size:
      raise OptionError(f"resize={self.resize} is smaller than image_size={self.image_size}.")

  def __call__(self, image: Pixels) -> Pixels:
    height, width = image.shape[:2]
    factor = (self.resize or self.image_size) / min(height, width)
    size = max(self.image_size, int(height * factor)), max(self.image_size, int(width * factor))
    top, left = round((size[0] - self.image_size) / 2), round((size[1] - self.image_size) / 2)
    region = (top, left, self.image_size, self.image_size)
    return resize_region(image, size, region, self.interpolation, self.antialias)


@dataclasses.dataclass(frozen=True)
class JointView:
  """A random square view of an image and its label map, `image_size` pixels a side: mmseg's usual recipe.

  Draws s ~ U(`scale`) and resizes both, so that the shorter side has s·`shorter` pixels and the longer side
  at most s·`longer`. Then crops a square at random. If one class has more than `max_class_share` of the
  square's labelled pixels, or all of them, another square is drawn, up to ten times. If the image is smaller
  than the square, the right and bottom are padded: grey in the image, and ignored in the map.

  Attributes:
    shorter: default image_size.
    longer: default 4·image_size.
    interpolation, antialias: of the image, see `resampling.resize`. The map uses nearest neighbours.
  """

  image_size: int
  scale: tuple[float, float] = (0.5, 2.0)
  shorter: int | None = None
  longer: int | None = None
  max_class_share: float = 0.75
  interpolation: str = "bilinear"
  antialias: bool = False

  def __post_init__(self):
    check_choice("interpolation", self.interpolation, CV2_FILTERS)

  def __call__(self, image: Pixels, label_map: Map, rng: np.random.Generator) -> tuple[Pixels, Map]:
    factor = self.scale[0] + (self.scale[1] - self.scale[0]) * rng.random()
    shorter = self.shorter or self.image_size
    size = fit_size(image.shape[:2], factor * shorter, factor * (self.longer or 4 * self.image_size))
    image = resize(image, size, self.interpolation, self.antialias)
    label_map = resize_map(label_map, size)
    box = self._box(label_map, rng)
    square = (self.image_size,) * 2
    return pad_to(image[box], square, FILL), pad_to(label_map[box], square, IGNORE)

  def _box(self, label_map: Map, rng: np.random.Generator) -> tuple[slice, slice]:
    for _ in range(MAP_ATTEMPTS):
      starts = [int(rng.integers(max(side - self.image_size, 0) + 1)) for side in label_map.shape]
      rows, columns = (slice(start, start + self.image_size) for start in starts)
      count = np.bincount(label_map[rows, columns].ravel(), minlength=IGNORE + 1)[:IGNORE]
      if count.max() <= self.max_class_share * count.sum() and np.count_nonzero(count) > 1:
        break
    return rows, columns
