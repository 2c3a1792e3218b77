"""From encoded bytes to uint8 pixels on the host: decode, choose a box, crop, resize.

JPEG goes through simplejpeg (libjpeg-turbo) and is resized by OpenCV, which is two to four times what
tf.data does per core. Everything else, and any JPEG that simplejpeg refuses, goes through Pillow, which alone
decides whether an image is corrupt. EXIF orientation is ignored, as torchvision does.
"""

import dataclasses
import io
import math
from collections.abc import Collection

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from dtm_jax import rand_augment
from dtm_jax.arrays import UInt8

cv2.setNumThreads(0)  # the pipeline is parallel over examples; OpenCV's own threads only get in its way

PIL_FILTERS = {
  "bicubic": Image.Resampling.BICUBIC,
  "bilinear": Image.Resampling.BILINEAR,
  "area": Image.Resampling.BOX,
  "lanczos": Image.Resampling.LANCZOS,
}
CV2_FILTERS = {
  "bicubic": cv2.INTER_CUBIC,
  "bilinear": cv2.INTER_LINEAR,
  "area": cv2.INTER_AREA,
  "lanczos": cv2.INTER_LANCZOS4,
}
CROPS = ("random_resized", "pad", "none")

Box = tuple[int, int, int, int]
"""(top, left, height, width), in pixels of the source image."""

Pixels = UInt8[np.ndarray, "_ _ 3"]
"""RGB, of any height and width."""
Encoded = bytes | Pixels
"""What a data set stores: an encoded file, or the pixels themselves."""


class CorruptImageError(ValueError):
  """These bytes are no image that Pillow can read in full."""


def decode(data: Encoded) -> Pixels:
  """RGB pixels of an encoded image; pixels pass through.

  Raises:
    CorruptImageError: the bytes are cut short, damaged, or no image at all.
  """
  if isinstance(data, np.ndarray):
    return data
  if data[:2] == b"\xff\xd8":
    try:
      return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
      pass
  try:
    with Image.open(io.BytesIO(data)) as image:
      return np.array(image.convert("RGB"))
  except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ... for bad bytes
    raise CorruptImageError(f"{type(error).__name__}: {error}") from error


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


def resize(
  image: Pixels, size: tuple[int, int], interpolation: str, antialias: bool, box: Box | None = None
) -> Pixels:
  """`box` of the image (default: all of it) at `size` = (height, width).

  Without `antialias` (OpenCV) a filter looks at the same few source pixels however much it shrinks;
  with it (Pillow) the filter widens. The two differ by about one grey level on photos; Pillow costs
  half the throughput.
  """
  top, left, h, w = box or (0, 0, *image.shape[:2])
  if (h, w) == size:
    return image[top : top + h, left : left + w]
  if antialias:
    extent = (left, top, left + w, top + h)
    return np.asarray(Image.fromarray(image).resize(size[::-1], PIL_FILTERS[interpolation], box=extent))
  return cv2.resize(
    image[top : top + h, left : left + w], size[::-1], interpolation=CV2_FILTERS[interpolation]
  )


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
    image = resize(image, size, self.interpolation, self.antialias)
    top, left = round((size[0] - self.image_size) / 2), round((size[1] - self.image_size) / 2)
    return image[top : top + self.image_size, left : left + self.image_size]


def check_choice(option: str, value: str, choices: Collection[str]) -> None:
  """Raises a ValueError that lists the choices if `value` is none of them."""
  if value not in choices:
    raise ValueError(f"Unknown {option} {value!r}. Available: {', '.join(choices)}.")
