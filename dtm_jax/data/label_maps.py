"""Label maps: one class id for each pixel of an image, and the joint view of both for training.

In memory a map is uint8 [H, W] with ids 0..G-1 and 255 where a pixel does not count. On disk it is a picture
of one channel (grey, palette or 16 bits).

An image is turned as its EXIF orientation says, and a map as its own. So a map must be drawn on the displayed
image, as labelling tools do.
"""

import dataclasses

import cv2
import numpy as np
from absl import logging
from PIL import UnidentifiedImageError

from dtm_jax.arrays import UInt8
from dtm_jax.data.image_decoding import (
  MAX_PIXELS,
  CorruptImageError,
  check_choice,
  decode_stored,
  open_picture,
)
from dtm_jax.data.orientation import UPRIGHT, turn
from dtm_jax.data.rand_augment import FILL
from dtm_jax.data.resampling import CV2_FILTERS, Pixels, resize

IGNORE = 255
CROP_TRIES = 10

Map = UInt8[np.ndarray, "_ _"]
"""Class ids, 255 where ignored."""
EncodedMap = bytes | np.ndarray
"""What a data set stores: an encoded file, or the integers themselves."""


@dataclasses.dataclass(frozen=True)
class MapCoding:
  """How a data set writes its maps.

  Attributes:
    num_classes: G, at most 255.
    zero_is_ignored: 0 is "no class" and 1..G are the classes, as in ADE20K; else classes are 0..G-1. Either
      way 255 is ignored.
  """

  num_classes: int
  zero_is_ignored: bool = False

  def __post_init__(self):
    if not 1 <= self.num_classes <= IGNORE:
      raise ValueError(f"num_classes={self.num_classes}: a map holds 1 to {IGNORE} classes.")

  def decode(self, data: EncodedMap, name: str, max_pixels: int = MAX_PIXELS) -> Map:
    """Return the map of a file called `name`, turned as its EXIF orientation says.

    Raises:
      CorruptImageError: the bytes are no picture, or one of more than `max_pixels`.
      ValueError: several channels that differ, or a label that is none of the classes.
    """
    raw = data if isinstance(data, np.ndarray) else _read(data, name, max_pixels)
    first = int(self.zero_is_ignored)
    count = np.bincount(raw.ravel())  # far fewer values than pixels
    allowed = np.zeros(max(len(count), IGNORE + 1), bool)
    allowed[first : first + self.num_classes] = allowed[IGNORE] = True
    allowed[0] |= self.zero_is_ignored
    wrong = np.flatnonzero((count > 0) & ~allowed[: len(count)])
    if wrong.size:
      raise ValueError(
        f"{name}: label {wrong[0]} at {count[wrong[0]]} pixels is none of the {self.num_classes} classes "
        f"{first}..{first + self.num_classes - 1}, nor {'0 or ' if first else ''}{IGNORE} (ignored)."
      )
    table = np.full(len(allowed), IGNORE, np.uint8)
    table[first : first + self.num_classes] = np.arange(self.num_classes)
    return table[raw]


def _read(data: bytes, name: str, max_pixels: int) -> np.ndarray:
  try:
    with open_picture(data, max_pixels) as (picture, _, turned):
      array = turn(np.array(picture), turned)
  except UnidentifiedImageError as error:
    raise CorruptImageError(f"{name}: {type(error).__name__}: {error}") from error
  except CorruptImageError as error:
    raise CorruptImageError(f"{name}: {error}") from error
  if array.ndim == 3 and (array[..., :1] == array[..., :3]).all():
    array = array[..., 0]
  if array.ndim != 2 or array.dtype.kind not in "bui":
    raise ValueError(
      f"{name}: a picture of shape {array.shape} and type {array.dtype} is no label map, which has one "
      "integer a pixel."
    )
  return array.astype(np.int64)


def decode_pair(example: dict, coding: MapCoding, max_pixels: int = MAX_PIXELS) -> tuple[Pixels, Map]:
  """Return the image and the label map of an example that has "image", "map", "name" and "map_name".

  Raises:
    CorruptImageError: either is no picture, or one of more than `max_pixels`.
    ValueError: their sizes differ, or see `MapCoding.decode`.
  """
  image, exif = decode_stored(example["image"], max_pixels)
  label_map = coding.decode(example["map"], example["map_name"], max_pixels)
  if image.shape[:2] != label_map.shape:
    sizes = [f"{shape[0]}x{shape[1]}" for shape in (label_map.shape, image.shape)]
    turned = f" after it is turned as its EXIF orientation {exif} says" if exif != UPRIGHT else ""
    raise ValueError(
      f"{example['map_name']} has {sizes[0]} pixels, its image {example['name']} has {sizes[1]}{turned}."
    )
  if exif != UPRIGHT:
    logging.log_first_n(
      logging.WARNING,
      "%s is turned as its EXIF orientation %d says, as are all such images. Label maps must be drawn on the "
      "displayed image, which their size alone does not prove.",
      1,
      example["name"],
      exif,
    )
  return image, label_map


def fit_size(shape: tuple[int, int], shorter: int | float, longer: int | float) -> tuple[int, int]:
  """(height, width) of an image whose aspect is kept: the largest with sides up to `shorter`, `longer`."""
  factor = min(shorter / min(shape), longer / max(shape))
  return tuple(max(1, int(side * factor + 0.5)) for side in shape)


def resize_map(label_map: Map, size: tuple[int, int]) -> Map:
  """By the nearest pixel, centres aligned, as `image_decoding.resize` aligns them."""
  return cv2.resize(label_map, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def pad_to(array: np.ndarray, size: tuple[int, int], value: int | tuple[int, ...]) -> np.ndarray:
  """At least `size` = (height, width): `value` below and to the right of the array."""
  height, width = (max(have, want) for have, want in zip(array.shape, size, strict=False))
  if (height, width) == array.shape[:2]:
    return array
  padded = np.empty((height, width, *array.shape[2:]), array.dtype)
  padded[:] = value
  padded[: array.shape[0], : array.shape[1]] = array
  return padded


@dataclasses.dataclass(frozen=True)
class JointView:
  """A random square view of an image and its map, `image_size` pixels a side (mmseg's usual recipe).

  Both are resized so that the shorter side has s·`shorter` pixels and the longer at most s·`longer`, with
  s ~ U(`scale`); then a square is cropped at random, anew up to ten times while one class has more than
  `max_class_share` of its labelled pixels, or all. What is missing at the right and below is grey, and
  ignored.

  Attributes:
    shorter, longer: default image_size and four times that.
    interpolation, antialias: of the image; the map takes the nearest pixel.
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
    for _ in range(1 + CROP_TRIES):
      starts = [int(rng.integers(max(side - self.image_size, 0) + 1)) for side in label_map.shape]
      box = tuple(slice(start, start + self.image_size) for start in starts)
      count = np.bincount(label_map[box].ravel(), minlength=IGNORE + 1)[:IGNORE]
      if count.max() <= self.max_class_share * count.sum() and np.count_nonzero(count) > 1:
        break
    return box
