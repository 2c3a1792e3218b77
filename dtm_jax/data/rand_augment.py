"""RandAugment (arXiv 1909.13719) on the host: a few Pillow operations, which are drawn for each image.

Fine-tuning recipes name the policy "rand-m9-mstd0.5-inc1". The magnitude varies a little around 9 of 10
("m9-mstd0.5"), and every operation gets stronger with the magnitude ("inc1").
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from dtm_jax.arrays import UInt8
from dtm_jax.errors import OptionError

FILL = (124, 116, 104)
"""The colour of pixels from outside of the image: ImageNet's mean."""
MAX_MAGNITUDE = 10

Operation = Callable[[Image.Image, float, int], Image.Image]
"""(image, strength a in [0, 1], sign) -> image."""


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """Draw `num_ops` operations uniformly with replacement, and apply each with probability `prob`.

  The strength is a = clip(N(magnitude, magnitude_std²), 0, 10) / 10. The sign is drawn with equal
  probabilities; some operations do not use it.
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
  """Return the policy of a text such as "rand-m9-mstd0.5-n2-p0.5-inc1".

  Args:
    policy: m is the magnitude, mstd its standard deviation, n the number of operations, and p their
      probability. "inc1" is required, because operations that get weaker are not implemented.

  Raises:
    OptionError: the text does not have this form.
  """
  fields = {"m": "magnitude", "mstd": "magnitude_std", "n": "num_ops", "p": "prob"}
  kind, *parts = policy.split("-")
  matches = [re.fullmatch(r"(m|mstd|n|p|inc)(\d+(?:\.\d+)?)", part) for part in parts]
  if kind != "rand" or None in matches or "inc1" not in parts:
    raise OptionError(f'Unknown RandAugment policy {policy!r}. One is "rand-m9-mstd0.5-inc1".')
  options: dict[str, Any] = {}
  for letter, number in (match.groups() for match in matches if match):
    if letter != "inc":
      options[fields[letter]] = int(number) if letter == "n" else float(number)
  return RandAugment(**options)


def _enhance(kind: Any) -> Operation:
  """Return x ← base + f·(x - base) with f = max(0.1, 1 ± 0.9 a). Pillow's class `kind` makes the base."""
  return lambda image, a, sign: kind(image).enhance(max(0.1, 1 + 0.9 * a * sign))


def _affine(image: Image.Image, *matrix: int | float) -> Image.Image:
  """Make output pixel (x, y) show input (ax + by + c, dx + ey + f), with `matrix` = (a, b, c, d, e, f)."""
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL
  )


def _rotate(image: Image.Image, a: float, sign: int) -> Image.Image:
  return image.rotate(30 * a * sign, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def _posterize(image: Image.Image, a: float, sign: int) -> Image.Image:
  """Keep the highest 4 - int(4 a) bits. At full strength none is left, which Pillow's operation refuses."""
  mask = 255 & ~(2 ** (4 + int(4 * a)) - 1)
  return image.point([i & mask for i in range(256)] * 3)


def _solarize_add(image: Image.Image, a: float, sign: int) -> Image.Image:
  added = int(110 * a)
  return image.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


OPERATIONS: dict[str, Operation] = {
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
