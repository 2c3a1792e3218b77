"""From encoded bytes to uint8 pixels on the host: decode, choose a box, crop, resize.

simplejpeg (libjpeg-turbo) decodes JPEG, and OpenCV resizes, which together are two to four times as fast as
tf.data per core. Pillow reads all other formats and any JPEG that simplejpeg refuses, so Pillow decides
whether an image is corrupt. OpenCV reads the TIFFs of deep pixels that Pillow does not know.

Every image is turned as its EXIF orientation says, and its values are scaled to 8 bits (`pixel_values`).
"""

import contextlib
import dataclasses
import functools
import io
import math
from collections.abc import Collection, Iterator

import cv2
import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from dtm_jax.data import orientation, pixel_values, rand_augment
from dtm_jax.data.resampling import CV2_FILTERS, Box, Pixels, resize, resize_region
from dtm_jax.errors import UserError

Image.MAX_IMAGE_PIXELS = None  # the limit here is max_pixels, for all formats
cv2.utils.logging.setLogLevel(
  cv2.utils.logging.LOG_LEVEL_ERROR
)  # odd TIFF tags that it can read all the same

MAX_PIXELS = 200_000_000
"""A photo of 200 megapixels is read; larger images are refused before their pixels are decoded."""
JPEG_START = b"\xff\xd8"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PILLOW_FORMATS = (
  *("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF", "JPEG2000"),
  *("DIB", "TGA", "QOI", "SGI", "SUN", "PCX", "DDS", "FITS"),
)
"""Formats of one picture. Others may hide a larger picture inside (ICO), or start a program (EPS)."""
CROPS = ("random_resized", "pad", "none")

Encoded = bytes | Pixels
"""What a data set stores: an encoded file, or the pixels themselves."""


class CorruptImageError(UserError, ValueError):
  """These bytes are no image that can be read in full, or one that is larger than allowed."""


def decode(data: Encoded, max_pixels: int = MAX_PIXELS) -> Pixels:
  """Return the 8-bit RGB pixels of an encoded image, as a viewer shows them; pixels pass through.

  Args:
    max_pixels: larger images are refused. The size is read from the header, before anything is decoded.

  Raises:
    CorruptImageError: the bytes are cut short, damaged, or no image at all; the image is too large, or its
      values have no defined white (`pixel_values.levels`).
  """
  return decode_stored(data, max_pixels)[0]


def decode_stored(data: Encoded, max_pixels: int = MAX_PIXELS) -> tuple[Pixels, int]:
  """Return what `decode` returns, and the EXIF orientation 1..8 by which the stored pixels were turned."""
  if isinstance(data, np.ndarray):
    return data, orientation.UPRIGHT
  pixels = _decode_jpeg(data, max_pixels) if data[:2] == JPEG_START else None
  if pixels is not None:
    exif = orientation.of_jpeg(data)
    return orientation.turn(pixels, exif), exif
  try:
    with open_picture(data, max_pixels) as (picture, exif, turned):
      return orientation.turn(pixel_values.rgb(picture), turned), exif
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
  """Yield a picture that Pillow has loaded, its EXIF orientation, and the one that its pixels still need.

  Raises:
    CorruptImageError: as in `decode`, whatever fails in the body included.
    UnidentifiedImageError: Pillow knows no such format.
  """
  try:
    with Image.open(io.BytesIO(data), formats=_formats()) as picture:
      _require_size(picture.height, picture.width, max_pixels)
      orientation.forget_xmp(picture)
      exif = orientation.of_picture(picture) if picture.format == "TIFF" else None
      picture.load()
      turned = orientation.of_jpeg(data) if data[:2] == JPEG_START else orientation.of_picture(picture)
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
    pixels = pixel_values.levels(stored)
  except CorruptImageError:
    raise
  except Exception as error:  # of Pillow as in open_picture; OpenCV raises cv2.error
    raise CorruptImageError(f"{type(error).__name__}: {error}") from error
  pixels = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels[..., 2::-1]
  if tags.get(pixel_values.TIFF_PHOTOMETRIC) == pixel_values.WHITE_IS_ZERO:
    pixels = 255 - pixels
  exif = tags.get(TiffImagePlugin.ExifTags.Base.Orientation, orientation.UPRIGHT)
  return np.ascontiguousarray(pixels), exif  # OpenCV has turned them


def _require_size(height: int, width: int, max_pixels: int) -> None:
  if height * width > max_pixels:
    raise CorruptImageError(
      f"The header says {height}x{width} = {height * width} pixels, and at most {max_pixels} are read "
      "(in training: data.view.max_pixels)."
    )


@functools.cache
def _formats() -> list[str]:
  Image.init()
  return [name for name in PILLOW_FORMATS if name in Image.OPEN]  # a Pillow may lack some


def random_resized_box(
  rng: np.random.Generator,
  height: int,
  width: int,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> Box:
  """A box of area ~ U(scale)·HW and log aspect (w/h) ~ U(log ratio), placed uniformly (torchvision's rule).

  After ten boxes that do not fit: the largest centred box whose aspect is within `ratio`.
  """
  for _ in range(10):
    area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(low + (high - low) * rng.random())
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(height - h + 1))
      left = int(rng.integers(width - w + 1))
      return top, left, h, w
  h, w = height, width
  if width / height < ratio[0]:
    h = min(height, round(width / ratio[0]))
  elif width / height > ratio[1]:
    w = min(width, round(height * ratio[1]))
  return (height - h) // 2, (width - w) // 2, h, w


@dataclasses.dataclass(frozen=True)
class TrainView:
  """A random square view of an image, `image_size` pixels a side.

  crop:
    "random_resized": see `random_resized_box`, with `scale` and `ratio`.
    "pad": the image at image_size, with `padding` black pixels on each side, cropped at random (the
      usual CIFAR augmentation).
    "none": the whole image at image_size, its aspect not kept.
  rand_augment: a policy of `rand_augment.parse` for the cropped view, or None.
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
    check_choice("interpolation", self.interpolation, CV2_FILTERS)
    if self.rand_augment:
      rand_augment.parse(self.rand_augment)

  def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
    box = None
    if self.crop == "random_resized":
      box = random_resized_box(rng, *image.shape[:2], self.scale, self.ratio)
    view = resize(image, (self.image_size,) * 2, self.interpolation, self.antialias, box)
    if self.crop == "pad":
      top, left = rng.integers(2 * self.padding + 1, size=2)
      padded = np.zeros((view.shape[0] + 2 * self.padding, view.shape[1] + 2 * self.padding, 3), np.uint8)
      padded[self.padding : -self.padding or None, self.padding : -self.padding or None] = view
      view = padded[top : top + self.image_size, left : left + self.image_size]
    return rand_augment.parse(self.rand_augment)(view, rng) if self.rand_augment else view


@dataclasses.dataclass(frozen=True)
class EvalView:
  """The shorter side to `resize` pixels (default: image_size), then the centre square of image_size."""

  image_size: int
  resize: int | None = None
  interpolation: str = "bicubic"
  antialias: bool = True

  def __post_init__(self):
    check_choice("interpolation", self.interpolation, CV2_FILTERS)
    if self.resize is not None and self.resize < self.image_size:
      raise ValueError(f"resize={self.resize} is smaller than image_size={self.image_size}.")

  def __call__(self, image: Pixels) -> Pixels:
    height, width = image.shape[:2]
    factor = (self.resize or self.image_size) / min(height, width)
    size = max(self.image_size, int(height * factor)), max(self.image_size, int(width * factor))
    top, left = round((size[0] - self.image_size) / 2), round((size[1] - self.image_size) / 2)
    region = (top, left, self.image_size, self.image_size)
    return resize_region(image, size, region, self.interpolation, self.antialias)


def check_choice(option: str, value: str, choices: Collection[str]) -> None:
  """Raises a ValueError that lists the choices if `value` is none of them."""
  if value not in choices:
    raise ValueError(f"Unknown {option} {value!r}. Available: {', '.join(choices)}.")
