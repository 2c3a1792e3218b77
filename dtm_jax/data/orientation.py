"""The EXIF orientation of an encoded picture: how a viewer turns the stored pixels to show them.

XMP may also name an orientation. It is ignored, as in browsers, so that all formats follow one rule.
"""

import struct

import numpy as np
from PIL import ExifTags, Image

UPRIGHT = 1
EXIF = b"Exif\x00\x00"
APP1, START_OF_SCAN, END_OF_IMAGE = 0xE1, 0xDA, 0xD9
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
INTEGERS = {1: "B", 3: "H", 4: "I"}
"""EXIF's integer types, and their letters in `struct`."""


def jpeg_orientation(data: bytes) -> int:
  """Return the orientation 1..8 of a JPEG, or 1 if its EXIF block is missing or damaged.

  Reads only the segments before the pixels.
  """
  place = 2
  while place + 4 <= len(data) and data[place] == 0xFF:
    marker = data[place + 1]
    if marker in (START_OF_SCAN, END_OF_IMAGE):
      break
    if marker == 0xFF or marker in WITHOUT_LENGTH:  # 0xFF: a fill byte
      place += 1 if marker == 0xFF else 2
      continue
    length = int.from_bytes(data[place + 2 : place + 4], "big")
    if marker == APP1 and data[place + 4 : place + 10] == EXIF:
      return _exif_orientation(data[place + 10 : place + 2 + length])
    place += 2 + length
  return UPRIGHT


def _exif_orientation(block: bytes) -> int:
  order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
  if order is None:
    return UPRIGHT
  try:
    (directory,) = struct.unpack_from(order + "I", block, 4)
    (entries,) = struct.unpack_from(order + "H", block, directory)
    for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
      tag, kind = struct.unpack_from(order + "HH", block, entry)
      if tag == ExifTags.Base.Orientation and kind in INTEGERS:
        return _valid(struct.unpack_from(order + INTEGERS[kind], block, entry + 8)[0])
  except struct.error:  # the block is cut short
    pass
  return UPRIGHT


def picture_orientation(picture: Image.Image) -> int:
  """Return the orientation 1..8 by which the pixels of a picture must still be turned.

  Pillow turns the pixels of a TIFF when it loads them, so the result is then 1.
  """
  drop_xmp(picture)
  try:
    return _valid(picture.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
  except Exception:  # Pillow raises SyntaxError, struct.error, ... on damaged EXIF
    return UPRIGHT


def drop_xmp(picture: Image.Image) -> None:
  """Remove XMP from a picture, so that Pillow does not read an orientation from it."""
  for name in ("xmp", "XML:com.adobe.xmp"):
    picture.info.pop(name, None)


def _valid(orientation: object) -> int:
  return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else UPRIGHT


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Return stored pixels [h, w, ...] turned as the orientation says, [h, w, ...] or [w, h, ...].

  For example, 3 turns by 180 degrees, and 6 by 90 degrees clockwise.
  """
  if orientation == UPRIGHT:
    return pixels
  if orientation >= 5:
    pixels = pixels.swapaxes(0, 1)
  if orientation in (3, 4, 7, 8):
    pixels = pixels[::-1]
  if orientation in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  return np.ascontiguousarray(pixels)
