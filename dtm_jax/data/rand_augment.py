"""RandAugment (arXiv 1909.13719) on the host: a few of Pillow's operations, drawn for each image.

The policy is the one that fine-tuning recipes name "rand-m9-mstd0.5-inc1": every operation gets stronger with
the magnitude ("inc1"), which varies a little around 9 of 10.
"""

import dataclasses
import functools
import re

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from dtm_jax.arrays import UInt8
from dtm_jax.errors import OptionError

FILL = (124, 116, 104)
"""What comes in from outside of the image: ImageNet's mean colour."""
MAX_MAGNITUDE = 10


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """`num_ops` operations, drawn uniformly with replacement, each applied with probability `prob`.

  Its strength is a = clip(N(magnitude, magnitude_std²), 0, 10) / 10; a coin decides the sign, if any.
  """

  magnitude: float = 9.0
  magnitude_std: float = 0.5
  num_ops: int = 2
  prob: float = 0.5

  def __call__(
    self, image: UInt8[np.ndarray, "_ _ 3"], rng: np.random.Generator
  ) -> UInt8[np.ndarray, "_ _ 3"]:
    picture = Image.fromarray(image)
    for name in rng.choice(list(OPERATIONS), self.num_ops):
      if rng.random() < self.prob:
        strength = np.clip(rng.normal(self.magnitude, self.magnitude_std), 0, MAX_MAGNITUDE) / MAX_MAGNITUDE
        sign = 1 if rng.random() < 0.5 else -1
        picture = OPERATIONS[name](picture, float(strength), sign)
    return np.asarray(picture)


@functools.cache
def parse(policy: str) -> RandAugment:
  """What "rand-m9-mstd0.5-inc1" names; n is the number of operations, p their probability.

  Raises:
    OptionError: it is not of this form, or without "inc1": operations that get weaker are not made here.
  """
  letters = {"m": "magnitude", "mstd": "magnitude_std", "n": "num_ops", "p": "prob"}
  kind, *parts = policy.split("-")
  matches = [re.fullmatch(r"(m|mstd|n|p|inc)(\d+(?:\.\d+)?)", part) for part in parts]
  if kind != "rand" or None in matches or "inc1" not in parts:
    raise OptionError(f'Unknown RandAugment policy {policy!r}. One is "rand-m9-mstd0.5-inc1".')
  options = {letters[m[1]]: int(m[2]) if m[1] == "n" else float(m[2]) for m in matches if m[1] != "inc"}
  return RandAugment(**options)


def _enhance(kind):
  """x ← base + f·(x - base) with f = 1 ± 0.9 a, but at least 0.1; the base is Pillow's."""
  return lambda image, a, sign: kind(image).enhance(max(0.1, 1 + 0.9 * a * sign))


def _affine(image: Image.Image, *matrix: int | float) -> Image.Image:
  """Output pixel (x, y) shows input (ax + by + c, dx + ey + f)."""
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL
  )


def _rotate(image: Image.Image, a: float, sign: int) -> Image.Image:
  return image.rotate(30 * a * sign, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def _posterize(image: Image.Image, a: float, sign: int) -> Image.Image:
  """The highest 4 - int(4 a) bits; none are left at full strength, which Pillow's own operation refuses."""
  mask = 255 & ~(2 ** (4 + int(4 * a)) - 1)
  return image.point([i & mask for i in range(256)] * 3)


def _solarize_add(image: Image.Image, a: float, sign: int) -> Image.Image:
  added = int(110 * a)
  return image.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


# (image, strength 0..1, sign) -> image
OPERATIONS = {
  "auto_contrast": lambda image, a, sign: ImageOps.autocontrast(image),
  "equalize": lambda image, a, sign: ImageOps.equalize(image),
  "invert": lambda image, a, sign: ImageOps.invert(image),
  "rotate": _rotate,
  "posterize": _posterize,
  "solarize": lambda image, a, sign: ImageOps.solarize(image, 256 - int(256 * a)),
  "solarize_add": _solarize_add,
  "color": _enhance(ImageEnhance.Color),
  "contrast": _enhance(ImageEnhance.Contrast),
  "brightness": _enhance(ImageEnhance.Brightness),
  "sharpness": _enhance(ImageEnhance.Sharpness),
  "shear_x": lambda image, a, sign: _affine(image, 1, 0.3 * a * sign, 0, 0, 1, 0),
  "shear_y": lambda image, a, sign: _affine(image, 1, 0, 0, 0.3 * a * sign, 1, 0),
  "translate_x": lambda image, a, sign: _affine(image, 1, 0, 0.45 * a * sign * image.width, 0, 1, 0),
  "translate_y": lambda image, a, sign: _affine(image, 1, 0, 0, 0, 1, 0.45 * a * sign * image.height),
}
