"""Decode encoded bytes to 8-bit RGB pixels, as a viewer shows them.

simplejpeg (libjpeg-turbo) decodes JPEG. With OpenCV's resizing it is two to four times as fast as tf.data per
core. Pillow reads all other formats, and any JPEG that simplejpeg refuses, so Pillow decides whether an image
is corrupt. OpenCV reads TIFFs with deep pixels that Pillow does not know.

Every image is turned as its EXIF orientation says (`orientation`). Values of other depths are scaled to 8
bits (`pixel_depth`).
"""

import contextlib
import functools
import io
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from dtm_jax.data import orientation, pixel_depth
from dtm_jax.data.resampling import Pixels
from dtm_jax.errors import UserError

Image.MAX_IMAGE_PIXELS = None  # max_pixels is the limit here, for all formats
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # no warnings about odd TIFF tags

MAX_PIXELS = 200_000_000
"""Larger images are refused before their pixels are decoded."""
JPEG_START = b"\xff\xd8"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PILLOW_FORMATS = (
  *("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF", "JPEG2000"),
  *("DIB", "TGA", "QOI", "SGI", "SUN", "PCX", "DDS", "FITS"),
)
"""Formats of one picture. Others may hide a larger picture inside (ICO), or start a program (EPS)."""

Encoded = bytes | Pixels
"""A stored image: the bytes of an encoded file, or an array of pixels."""


class CorruptImageError(UserError, ValueError):
  """The bytes are not an image that can be read completely, or the image is larger than allowed."""


def decode(data: Encoded, max_pixels: int = MAX_PIXELS) -> Pixels:
  """Return the pixels of an encoded image as uint8 [H, W, 3]. Pixels are returned unchanged.

  Args:
    max_pixels: larger images are refused. The size is read from the header, before anything is decoded.

  Raises:
    CorruptImageError: the bytes are cut short, damaged, or not an image; the image is too large; or its
      values have no defined white, see `pixel_depth.to_8_bits`.
  """
  return decode_stored(data, max_pixels)[0]


def decode_stored(data: Encoded, max_pixels: int = MAX_PIXELS) -> tuple[Pixels, int]:
  """Return the pixels, and the EXIF orientation 1..8 by which the stored pixels were turned.

  Raises:
    CorruptImageError: see `decode`.
  """
  if isinstance(data, np.ndarray):
    return data, orientation.UPRIGHT
  pixels = _decode_jpeg(data, max_pixels) if data[:2] == JPEG_START else None
  if pixels is not None:
    exif = orientation.jpeg_orientation(data)
    return orientation.turn(pixels, exif), exif
  try:
    with open_picture(data, max_pixels) as (picture, exif, turned):
      return orientation.turn(pixel_depth.to_rgb(picture), turned), exif
  except UnidentifiedImageError as error:
    if data[:4] not in TIFF_STARTS:
      raise CorruptImageError(f"{type(error).__name__}: {error}") from error
  return _decode_tiff(data, max_pixels)


def _decode_jpeg(data: bytes, max_pixels: int) -> Pixels | None:
  """Return the stored pixels, or None if simplejpeg cannot read them."""
  try:
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
  except ValueError:
    return None
  _require_size(height, width, max_pixels)
  try:
    return simplejpeg.decode_jpeg(data, "RGB")
  except ValueError:
    return None


@contextlib.contextmanager
def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[Image.Image, int, int]]:
  """Yield a loaded picture, its EXIF orientation, and the orientation by which its pixels are still to turn.

  Raises:
    CorruptImageError: see `decode`. Any error in the body of the `with` statement becomes one too.
    UnidentifiedImageError: Pillow does not know the format.
  """
  try:
    with Image.open(io.BytesIO(data), formats=_formats()) as picture:
      _require_size(picture.height, picture.width, max_pixels)
      orientation.drop_xmp(picture)
      exif = orientation.picture_orientation(picture) if picture.format == "TIFF" else None
      picture.load()  # turns the pixels of a TIFF
      if data[:2] == JPEG_START:
        turned = orientation.jpeg_orientation(data)
      else:
        turned = orientation.picture_orientation(picture)
      yield picture, exif or turned, turned
  except (CorruptImageError, UnidentifiedImageError):
    raise
  except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ... for bad bytes
    raise CorruptImageError(f"{type(error).__name__}: {error}") from error


def _decode_tiff(data: bytes, max_pixels: int) -> tuple[Pixels, int]:
  """Decode a TIFF that Pillow does not know, such as one of floating-point colours."""
  try:
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2:3] == b"+" or data[3:4] == b"+" else 8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    _require_size(tags[TiffImagePlugin.IMAGELENGTH], tags[TiffImagePlugin.IMAGEWIDTH], max_pixels)
    stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None:
      raise ValueError("a TIFF of this kind of pixels cannot be read. Store the image with 8 or 16 bits.")
    pixels = pixel_depth.to_8_bits(stored)
  except CorruptImageError:
    raise
  except Exception as error:  # Pillow's errors, see open_picture, or OpenCV's cv2.error
    raise CorruptImageError(f"{type(error).__name__}: {error}") from error
  pixels = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels[..., 2::-1]
  if tags.get(pixel_depth.TIFF_PHOTOMETRIC) == pixel_depth.WHITE_IS_ZERO:
    pixels = 255 - pixels
  exif = tags.get(TiffImagePlugin.ExifTags.Base.Orientation, orientation.UPRIGHT)
  return np.ascontiguousarray(pixels), exif  # OpenCV has turned the pixels


def _require_size(height: int, width: int, max_pixels: int) -> None:
  if height * width > max_pixels:
    raise CorruptImageError(
      f"The header says {height}x{width} = {height * width} pixels, and at most {max_pixels} are read "
      "(in training: data.view.max_pixels)."
    )


@functools.cache
def _formats() -> list[str]:
  """Return the names in PILLOW_FORMATS that this Pillow can open."""
  Image.init()
  return [name for name in PILLOW_FORMATS if name in Image.OPEN]
