"""Read photos from files."""

import os

import numpy as np

from dtm_jax.arrays import UInt8
from dtm_jax.storage import paths


def read_photo(file: str | os.PathLike, size: int = 224) -> UInt8[np.ndarray, "side side 3"]:
  """Return the central square of a photo, resized to `size` pixels of a side.

  The photo is decoded and cut as for evaluation. Most formats of photos are known.

  >>> read_photo("assets/photos/cat.jpg", size=64).shape
  (64, 64, 3)

  Raises:
    CorruptImageError: the file is not a readable image.
    FileNotFoundError: there is no such file.
  """
  from dtm_jax.data import image_decoding, views  # they import Grain, which no other picture needs

  pixels = image_decoding.decode(paths.resolve(file).read_bytes())
  return views.EvalView(size)(pixels)
