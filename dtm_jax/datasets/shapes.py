"""Generated pictures of shapes with label maps, which need no files and no network.

One to four shapes lie on a smooth background, each above the ones before. The class decides the outline and
the pattern. Colours, sizes, places and angles are random, and so is the size of the picture.
"""

import zlib

import numpy as np

from dtm_jax.data import Dataset, Example
from dtm_jax.data.label_maps import IGNORE, MapCoding
from dtm_jax.datasets import sliceable
from dtm_jax.errors import check_choice

CLASS_NAMES = ("background", "disc", "square", "triangle")
NUM_EXAMPLES = {"train": 4096, "val": 256}


class _Shapes:
  """Pictures that are drawn when they are read, each from its own generator."""

  def __init__(self, split: str, count: int, side: int, border: int):
    self._split, self._count, self._side, self._border = split, count, side, border

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> Example:
    name = f"shapes/{self._split}/{index}"
    rng = np.random.default_rng((zlib.crc32(self._split.encode()), index))
    image, label_map = draw(rng, self._side)
    if self._border:
      label_map[: self._border] = IGNORE
    return {"image": image, "map": label_map, "label": -1, "name": name, "map_name": f"{name} (map)"}


@sliceable
def build(
  split: str = "train", *, data_dir: str | None = None, side: int = 64, num_examples: int | None = None,
  border: int = 0,
) -> Dataset:  # fmt: skip
  """Open "train" (4,096 pictures) or "val" (256 pictures).

  Args:
    data_dir: not used, because the pictures are generated.
    side: smallest side of a picture in pixels. Each side has `side` to 1.5·`side` pixels.
    num_examples: number of pictures. Default: 4,096 of "train" and 256 of "val".
    border: number of rows of every map, from the top, that are ignored.

  Raises:
    OptionError: the split is unknown.
  """
  check_choice("split of shapes", split, NUM_EXAMPLES)
  source = _Shapes(split, num_examples or NUM_EXAMPLES[split], side, border)
  return Dataset(f"shapes/{split}", len(source), CLASS_NAMES, source, maps=MapCoding(len(CLASS_NAMES)))


def splits(**options) -> tuple[str, ...]:
  """Return both splits."""
  return tuple(NUM_EXAMPLES)


def draw(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
  """Draw a picture, uint8 [H, W, 3], and its map, uint8 [H, W], with H and W in side..1.5·side."""
  height, width = rng.integers(side, side + side // 2 + 1, size=2)
  y, x = np.mgrid[:height, :width].astype(np.float32)
  slope = rng.uniform(-1, 1, (2, 3))
  image = rng.uniform(60, 200, 3) + 40 * (
    slope[0] * (y / height)[..., None] + slope[1] * (x / width)[..., None]
  )
  label_map = np.zeros((height, width), np.uint8)
  for label in rng.integers(1, len(CLASS_NAMES), size=rng.integers(1, 5)):
    radius = side * rng.uniform(0.15, 0.35)
    angle, centre = rng.uniform(0, 2 * np.pi), rng.uniform(0, (height, width))
    v, u = y - centre[0], x - centre[1]
    u, v = (np.cos(angle) * u + np.sin(angle) * v) / radius, (np.cos(angle) * v - np.sin(angle) * u) / radius
    inside = _OUTLINES[CLASS_NAMES[label]](u, v)
    pattern = _PATTERNS[CLASS_NAMES[label]](u * radius, v * radius)
    color = rng.uniform(0, 255, (2, 3))
    image = np.where(inside[..., None], np.where(pattern[..., None], color[0], color[1]), image)
    label_map[inside] = label
  image += rng.normal(0, 8, image.shape)
  return np.clip(image, 0, 255).astype(np.uint8), label_map


_OUTLINES = {
  "disc": lambda u, v: u**2 + v**2 < 1,
  "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.8,
  "triangle": lambda u, v: (v > -0.6) & (v < 1.2 - 1.8 * abs(u)),
}
_PATTERNS = {
  "disc": lambda u, v: (u // 3) % 2 == 0,
  "square": lambda u, v: (u // 4 + v // 4) % 2 == 0,
  "triangle": lambda u, v: np.full(u.shape, True),
}
