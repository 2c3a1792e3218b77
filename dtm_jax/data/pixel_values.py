"""Brightness of any depth as 8-bit RGB: values are scaled, never clipped.

Of a 16-bit value the high byte counts, which is floor(value / 256), as tf.io.decode_png and OpenCV have it.
Floating-point values are fractions of white, so [0, 1] becomes [0, 255]. Anything else has no defined white
and is refused: clipped or stretched pixels would train a model without a word. Transparency is dropped; the
colour that is stored beneath it counts.
"""

import numpy as np
from PIL import Image

from dtm_jax.arrays import UInt8

TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO = 0
UNSIGNED = 1
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
"""Formats whose deepest pixels have 16 bits, though Pillow may hold them in 32."""


def rgb(picture: Image.Image) -> UInt8[np.ndarray, "_ _ 3"]:
  """Return the 8-bit RGB of a loaded picture of any mode, the first frame of an animation.

  Raises:
    ValueError: its values have no defined white, or its mode has no RGB; see `levels`.
  """
  if picture.mode == "F" or picture.mode.startswith("I"):
    return np.repeat(_grey(picture)[..., None], 3, axis=2)
  if picture.mode in ("RGBa", "La"):  # colours multiplied by alpha
    picture = picture.convert(picture.mode.upper())
  picture.info.pop("transparency", None)  # Pillow warns that it gets lost
  return np.array(picture.convert("RGB"))


def _grey(picture: Image.Image) -> UInt8[np.ndarray, "_ _"]:
  tags = getattr(picture, "tag_v2", {})
  bits = tags.get(TIFF_BITS, (32,))[0]
  if picture.format in SIXTEEN_BIT_FORMATS or picture.mode.startswith("I;16"):
    bits = min(bits, 16)
  values = np.array(picture)
  if picture.mode == "I" and bits == 32 and tags and tags.get(TIFF_SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED:
    values = values.view(np.uint32)  # Pillow reads them as signed
  grey = levels(values, bits)
  return 255 - grey if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO else grey


def levels(values: np.ndarray, bits: int | None = None) -> np.ndarray:
  """Return brightness of any type as uint8, of the same shape.

  Integers of up to 16 bits have a white of 2^bits - 1. Integers of 32 bits often hold values of fewer. Their
  depth is the one of 8, 16 and 32 bits that the largest value tells; it must not lie between.

  Args:
    bits: depth of integers, by default that of their type.

  Raises:
    ValueError: negative integers, 32-bit integers of unknown white, or floats that are not in [0, 1].
  """
  if values.dtype.kind == "f":
    return _of_fractions(values)
  bits = bits or 8 * values.dtype.itemsize
  low, high = int(values.min()), int(values.max())
  if low < 0:
    raise ValueError(
      f"integers from {low} to {high}: negative brightness. Store the image with 8 or 16 bits."
    )
  if bits > 16:
    bits = _told_depth(high, signed=values.dtype.kind == "i")
  return (values >> (bits - 8)).astype(np.uint8)


def _told_depth(high: int, signed: bool) -> int:
  full = 31 if signed else 32
  for bits in (8, 16):
    if high < 2**bits:
      return bits
  if high < 2 ** (full - 7):  # less than two grey levels of 255
    raise ValueError(
      f"32-bit integers up to {high}: this is neither 8, 16 nor 32 bits of brightness. Store the image "
      "with 8 or 16 bits."
    )
  return full


def _of_fractions(values: np.ndarray) -> np.ndarray:
  low, high = float(values.min()), float(values.max())
  if not np.isfinite([low, high]).all():  # min and max carry a NaN on
    raise ValueError("floating-point values that are NaN or infinite.")
  if low < 0 or high > 1:
    raise ValueError(
      f"floating-point values from {low:g} to {high:g}: only those in [0, 1] have a defined white. Rescale "
      "them, or store the image with 8 or 16 bits."
    )
  return np.rint(255 * values).astype(np.uint8)
