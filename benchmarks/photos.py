"""Photos made up on the spot: JPEGs with the size and the number of bytes of a usual photo."""

from pathlib import Path

import numpy as np

SHAPE = (375, 500, 3)


def write_photos(folder: Path, count: int) -> float:
  """Write `count` JPEGs of quality 90, smooth colours with grain, and return their mean size in bytes."""
  import cv2

  rng = np.random.default_rng(0)
  for i in range(count):
    smooth = cv2.resize(rng.random((12, 16, 3), np.float32), SHAPE[1::-1], interpolation=cv2.INTER_CUBIC)
    coarse = cv2.resize(rng.standard_normal((188, 250, 3), np.float32), SHAPE[1::-1])
    pixels = 255 * np.clip(smooth + 0.04 * coarse, 0, 1)
    cv2.imwrite(str(folder / f"{i:05}.jpg"), pixels.astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
  return float(np.mean([path.stat().st_size for path in folder.glob("*.jpg")]))
