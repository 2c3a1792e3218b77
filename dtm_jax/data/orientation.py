"""The EXIF orientation of an encoded picture: how a viewer turns the stored pixels to show them.

XMP may name an orientation too. It is ignored, as browsers do, so that all formats follow one rule.
"""

import struct

import numpy as np
from PIL import ExifTags, Image

UPRIGHT = 1
EXIF = b"Exif\x00\x00"
APP1, START_OF_SCAN, END_OF_IMAGE = 0xE1, 0xDA, 0xD9
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
INTEGERS = {1: "B", 3: "H", 4: "I"}
"""EXIF's types of integers, in the letters of `struct`."""


def of_jpeg(data: bytes) -> int:
  """Return the orientation 1..8 of a JPEG. Reads only the segments before the pixels; damaged EXIF is 1."""
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
      return _of_exif(data[place + 10 : place + 2 + length])
    place += 2 + length
  return UPRIGHT


def _of_exif(block: bytes) -> int:
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


def of_picture(picture: Image.Image) -> int:
  """Return how the pixels of a loaded picture must still be turned. Pillow has turned those of a TIFF."""
  forget_xmp(picture)
  try:
    return _valid(picture.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
  except Exception:  # Pillow raises SyntaxError, struct.error, ... on damaged EXIF
    return UPRIGHT


def forget_xmp(picture: Image.Image) -> None:
  """Keep Pillow from taking an orientation from XMP."""
  for name in ("xmp", "XML:com.adobe.xmp"):
    picture.info.pop(name, None)


def _valid(orientation: object) -> int:
  return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else UPRIGHT


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Turn stored pixels [h, w, ...] as the orientation says: 3 by 180 degrees, 6 by 90 clockwise."""
  if orientation == UPRIGHT:
    return pixels
  if orientation >= 5:
    pixels = pixels.swapaxes(0, 1)
  if orientation in (3, 4, 7, 8):
    pixels = pixels[::-1]
  if orientation in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  return np.ascontiguousarray(pixels)
