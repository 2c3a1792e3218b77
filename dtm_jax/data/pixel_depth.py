"""8-bit RGB from pixels of any depth: values are scaled and never clipped.

A 16-bit value becomes its high byte, floor(value / 256), as in tf.io.decode_png and OpenCV. Floating-point
values are fractions of white, so [0, 1] becomes [0, 255]. Other values have no defined white and are refused,
because a model would silently train on clipped or stretched pixels. Transparency is dropped, and the colour
that is stored beneath it is used.
"""

import numpy as np
from PIL import Image

from dtm_jax.arrays import UInt8

TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO = 0
UNSIGNED = 1
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
"""Formats with at most 16 bits, which Pillow may hold in 32 bits."""


def to_rgb(picture: Image.Image) -> UInt8[np.ndarray, "_ _ 3"]:
  """Return the 8-bit RGB of a loaded picture of any mode; of an animation, the first frame.

  Raises:
    ValueError: the values have no defined white, see `to_8_bits`, or Pillow cannot convert the mode to RGB.
  """
  if picture.mode == "F" or picture.mode.startswith("I"):
    return np.repeat(_grey(picture)[..., None], 3, axis=2)
  if picture.mode in ("RGBa", "La"):  # colours are multiplied by alpha
    picture = picture.convert(picture.mode.upper())
  picture.info.pop("transparency", None)  # else Pillow warns that it is lost
  return np.array(picture.convert("RGB"))


def _grey(picture: Image.Image) -> UInt8[np.ndarray, "_ _"]:
  tags = getattr(picture, "tag_v2", {})
  bits = tags.get(TIFF_BITS, (32,))[0]
  if picture.format in SIXTEEN_BIT_FORMATS or picture.mode.startswith("I;16"):
    bits = min(bits, 16)
  values = np.array(picture)
  if picture.mode == "I" and bits == 32 and tags and tags.get(TIFF_SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED:
    values = values.view(np.uint32)  # Pillow reads them as signed
  grey = to_8_bits(values, bits)
  return 255 - grey if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO else grey


def to_8_bits(values: np.ndarray, bits: int | None = None) -> np.ndarray:
  """Return brightness of any type as uint8, in the same shape.

  White is 2^bits - 1 for integers of up to 16 bits. A 32-bit file often holds values of 8 or 16 bits, so the
  largest value decides which of 8, 16 and 32 bits is meant.

  Args:
    bits: depth of integers; default the depth of their type.

  Raises:
    ValueError: integers are negative, the largest 32-bit integer matches no depth, or floats are not
      in [0, 1].
  """
  if values.dtype.kind == "f":
    return _fractions_to_8_bits(values)
  bits = bits or 8 * values.dtype.itemsize
  low, high = int(values.min()), int(values.max())
  if low < 0:
    raise ValueError(
      f"integers from {low} to {high}: negative brightness. Store the image with 8 or 16 bits."
    )
  if bits > 16:
    bits = _depth_of_32_bits(high, signed=values.dtype.kind == "i")
  return (values >> (bits - 8)).astype(np.uint8)


def _depth_of_32_bits(high: int, signed: bool) -> int:
  full = 31 if signed else 32
  for bits in (8, 16):
    if high < 2**bits:
      return bits
  if high < 2 ** (full - 7):  # as 32 bits, all values would be 0 or 1 of 255
    raise ValueError(
      f"32-bit integers up to {high}: this is neither 8, 16 nor 32 bits of brightness. Store the image "
      "with 8 or 16 bits."
    )
  return full


def _fractions_to_8_bits(values: np.ndarray) -> np.ndarray:
  low, high = float(values.min()), float(values.max())
  if not np.isfinite([low, high]).all():  # NaN propagates through min and max
    raise ValueError("floating-point values that are NaN or infinite.")
  if low < 0 or high > 1:
    raise ValueError(
      f"floating-point values from {low:g} to {high:g}: only those in [0, 1] have a defined white. Rescale "
      "them, or store the image with 8 or 16 bits."
    )
  return np.rint(255 * values).astype(np.uint8)
