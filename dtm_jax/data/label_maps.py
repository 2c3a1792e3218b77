"""Decode, resize and pad label maps, which hold one class id for each pixel of an image.

In memory a map is uint8 [H, W] with ids 0..G-1, and 255 where a pixel is ignored. On disk it is a picture of
one channel (grey, palette or 16 bits).

An image and its map are separate files, and each is turned by its own EXIF orientation. So a map must be
drawn on the displayed image, as labelling tools do.
"""

import dataclasses

import cv2
import numpy as np
from absl import logging
from PIL import UnidentifiedImageError

from dtm_jax.arrays import UInt8
from dtm_jax.data.image_decoding import MAX_PIXELS, CorruptImageError, decode_stored, open_picture
from dtm_jax.data.orientation import UPRIGHT, turn
from dtm_jax.data.resampling import Pixels
from dtm_jax.errors import OptionError

IGNORE = 255

Map = UInt8[np.ndarray, "_ _"]
"""Class ids 0..G-1, and 255 where a pixel is ignored."""
EncodedMap = bytes | np.ndarray
"""A stored map: the bytes of an encoded file, or an array of integers."""


@dataclasses.dataclass(frozen=True)
class MapCoding:
  """Describes how a data set stores its maps.

  Attributes:
    num_classes: G, at most 255.
    zero_is_ignored: whether 0 means "no class" and the classes are 1..G, as in ADE20K. Otherwise the classes
      are 0..G-1. In both cases 255 is ignored.
  """

  num_classes: int
  zero_is_ignored: bool = False

  def __post_init__(self):
    if not 1 <= self.num_classes <= IGNORE:
      raise OptionError(f"num_classes={self.num_classes}: a label map has 1 to {IGNORE} classes.")

  def decode(self, data: EncodedMap, name: str, max_pixels: int = MAX_PIXELS) -> Map:
    """Return the map of a file, turned by its EXIF orientation.

    Args:
      name: the file's name, for messages.

    Raises:
      CorruptImageError: the bytes are not a picture, or the picture has more than `max_pixels`.
      ValueError: the picture has several channels that differ, or a label that is not allowed.
    """
    raw = data if isinstance(data, np.ndarray) else _read(data, name, max_pixels)
    first = int(self.zero_is_ignored)
    count = np.bincount(raw.ravel())
    allowed = np.zeros(max(len(count), IGNORE + 1), bool)
    allowed[first : first + self.num_classes] = allowed[IGNORE] = True
    allowed[0] |= self.zero_is_ignored
    wrong = np.flatnonzero((count > 0) & ~allowed[: len(count)])
    if wrong.size:
      raise ValueError(
        f"{name}: label {wrong[0]} at {count[wrong[0]]} pixels is not allowed. Allowed are the "
        f"{self.num_classes} classes {first}..{first + self.num_classes - 1}, and "
        f"{'0 or ' if first else ''}{IGNORE} for ignored pixels."
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
      f"{name}: a picture of shape {array.shape} and type {array.dtype} is not a label map. A label map has "
      "one integer for each pixel."
    )
  return array.astype(np.int64)


def decode_pair(example: dict, coding: MapCoding, max_pixels: int = MAX_PIXELS) -> tuple[Pixels, Map]:
  """Return the image and the label map of an example that has "image", "map", "name" and "map_name".

  Raises:
    CorruptImageError: one of them is not a picture, or has more than `max_pixels`.
    ValueError: their sizes differ, or `MapCoding.decode` refuses the map.
  """
  image, exif = decode_stored(example["image"], max_pixels)
  label_map = coding.decode(example["map"], example["map_name"], max_pixels)
  if image.shape[:2] != label_map.shape:
    sizes = [f"{shape[0]}x{shape[1]}" for shape in (label_map.shape, image.shape)]
    turned = f" after it is turned by its EXIF orientation {exif}" if exif != UPRIGHT else ""
    raise ValueError(
      f"{example['map_name']} has {sizes[0]} pixels, but its image {example['name']} has {sizes[1]}{turned}."
    )
  if exif != UPRIGHT:
    logging.log_first_n(
      logging.WARNING,
      "%s is turned by its EXIF orientation %d. All images with an EXIF orientation are turned. Their label "
      "maps must be drawn on the displayed image; an equal size alone does not prove that.",
      1,
      example["name"],
      exif,
    )
  return image, label_map


def fit_size(shape: tuple[int, int], shorter: int | float, longer: int | float) -> tuple[int, int]:
  """Return the largest (height, width) that keeps the aspect ratio of `shape` and fits both limits in pixels.

  Args:
    shorter: limit of the shorter side.
    longer: limit of the longer side.
  """
  factor = min(shorter / min(shape), longer / max(shape))
  height, width = (max(1, int(side * factor + 0.5)) for side in shape)
  return height, width


def resize_map(label_map: Map, size: tuple[int, int]) -> Map:
  """Resize a map to `size` = (height, width) by nearest neighbours, aligned as in `resampling.resize`."""
  return cv2.resize(label_map, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def pad_to(array: np.ndarray, size: tuple[int, int], value: int | tuple[int, ...]) -> np.ndarray:
  """Pad an array [H, W, ...] with `value` at the bottom and right, to at least `size` = (height, width)."""
  height, width = (max(have, want) for have, want in zip(array.shape, size, strict=False))
  if (height, width) == array.shape[:2]:
    return array
  padded = np.empty((height, width, *array.shape[2:]), array.dtype)
  padded[:] = value
  padded[: array.shape[0], : array.shape[1]] = array
  return padded
